"""One check of a printed number, with its arithmetic and its verdict; and many of them as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd

AGREES, DIFFERS, REMARK = "agrees", "differs", "remark"


@dataclass(frozen=True)
class Finding:
    """One check. check: its family; verdict: "agrees", "differs", or "remark" where there is nothing to agree with."""

    check: str
    where: str
    printed: str
    arithmetic: str
    verdict: str
    reading: str


def findings_frame(findings: Sequence[Finding]) -> pd.DataFrame:
    """The findings as a table, differences first, then remarks, in their order."""
    order = (DIFFERS, REMARK, AGREES)
    ranked = sorted(findings, key=lambda finding: order.index(finding.verdict))
    return pd.DataFrame([asdict(finding) for finding in ranked])
