"""One check of a printed number, with its arithmetic and its verdict; and a table of many."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd

AGREES, DIFFERS, REMARK = "agrees", "differs", "remark"
OURS = "LLaDA-MedV"


@dataclass(frozen=True)
class Finding:
    """One check. check: its family; verdict: "agrees", "differs", or "remark" where there is nothing to agree with."""

    check: str
    where: str
    printed: str
    arithmetic: str
    verdict: str
    reading: str


def agreement(agrees: bool) -> str:
    """The verdict of a check that can fail."""
    return AGREES if agrees else DIFFERS


def findings_frame(findings: Sequence[Finding]) -> pd.DataFrame:
    """The findings as a table, differences first, then remarks, in their order."""
    order = (DIFFERS, REMARK, AGREES)
    ranked = sorted(findings, key=lambda finding: order.index(finding.verdict))
    return pd.DataFrame([asdict(finding) for finding in ranked])


def counts_that_give(percent: float, n: int, *, places: int = 2) -> list[int]:
    """The counts k for which 100 k / n rounds to `percent` at `places` decimals; empty if there is none."""
    if n < 1:
        raise ValueError(f"n is {n}: a percentage needs at least one question")
    nearest = round(percent * n / 100)
    half = 0.5 * 10**-places + 1e-9
    return [k for k in range(max(0, nearest - 2), min(n, nearest + 2) + 1) if abs(100 * k / n - percent) <= half]
