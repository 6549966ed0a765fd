"""The structured truth of one phantom, before it is drawn (`pictures`), described (`wording`) or scored (`facts`).

The five domains are those of the paper's benchmark (Table 1). In chest X-ray, CT and MRI the patient's left is on the right of
the image, by radiological convention; in histology and gross pathology left and right are those of the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DOMAINS = ("chest_xray", "ct", "mri", "histology", "gross")
NORMAL = "normal"

# Each finding has a side, a level and a size.
FINDINGS = {
    "chest_xray": ("pleural effusion", "pneumothorax", "consolidation", "nodule"),
    "ct": ("cyst", "calcification", "mass", "fluid collection"),
    "mri": ("tumor", "infarct", "hemorrhage", "edema"),
    "histology": ("inflammation", "necrosis", "carcinoma", "fibrosis"),
    "gross": ("tumor", "hemorrhage", "cyst", "ulcer"),
}
SIDES = ("left", "right")
# Axial slices run from front to back, the others from top to bottom.
LEVELS = {
    "chest_xray": ("upper", "lower"),
    "ct": ("anterior", "posterior"),
    "mri": ("anterior", "posterior"),
    "histology": ("upper", "lower"),
    "gross": ("upper", "lower"),
}
SIZES = ("small", "large")
ACQUISITIONS = {
    "chest_xray": ("upright", "portable"),
    "ct": ("contrast", "non-contrast"),
    "mri": ("T1", "T2"),
    "histology": ("low power", "high power"),
    "gross": ("fresh", "fixed"),
}

# Seeds of different splits are disjoint, so no image is in two of them.
SPLIT_SEEDS = {"train": 0, "validation": 1_000_000_000, "test": 2_000_000_000}
SPLIT_SIZE = 1_000_000_000


@dataclass(frozen=True)
class Scene:
    """One phantom; `side`, `level` and `size` are None exactly when `finding` is "normal"."""

    domain: str
    seed: int
    finding: str
    side: str | None
    level: str | None
    size: str | None
    acquisition: str

    def facts(self) -> frozenset[tuple[str, str]]:
        """The (attribute, value) pairs that a full description states."""
        names = ("domain", "finding", "side", "level", "size", "acquisition")
        return frozenset((name, getattr(self, name)) for name in names if getattr(self, name) is not None)


def split_seed(split: str, index: int) -> int:
    """The seed of image `index` of a split."""
    if split not in SPLIT_SEEDS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLIT_SEEDS)}")
    if not 0 <= index < SPLIT_SIZE:
        raise ValueError(f"image index {index} is outside 0..{SPLIT_SIZE - 1}")
    return SPLIT_SEEDS[split] + index


def sample_scene(seed: int, *, normal_share: float = 0.2, **wanted: str) -> Scene:
    """Draw a scene from its seed; `wanted` fixes attributes, for example `domain="ct"` or `finding="cyst", side="left"`.

    The other attributes are uniform and independent. Raises ValueError where no scene has the wanted ones.
    """
    unknown = set(wanted) - {"domain", "finding", "side", "level", "size", "acquisition"}
    if unknown:
        raise ValueError(f"a scene has no attribute {', '.join(sorted(unknown))}")
    rng = np.random.default_rng([seed, 0x5CE7E])
    tables = {"finding": FINDINGS, "level": LEVELS, "acquisition": ACQUISITIONS}
    fits = [
        domain
        for domain in DOMAINS
        if wanted.get("domain") in (None, domain)
        and all(
            wanted[name] in table[domain] or (name == "finding" and wanted[name] == NORMAL)
            for name, table in tables.items()
            if name in wanted
        )
    ]
    if not fits:
        raise ValueError(f"no domain has {wanted}: see FINDINGS, LEVELS and ACQUISITIONS in medv.phantoms.scene")
    domain = _pick(rng, fits)
    abnormal = any(name in wanted for name in ("side", "level", "size"))
    is_normal = rng.random() < normal_share and not abnormal
    finding = wanted.get("finding") or (NORMAL if is_normal else _pick(rng, FINDINGS[domain]))
    if finding == NORMAL and abnormal:
        raise ValueError("a normal image has no side, level or size")
    values = {
        "side": _pick(rng, SIDES),
        "level": _pick(rng, LEVELS[domain]),
        "size": _pick(rng, SIZES),
        "acquisition": _pick(rng, ACQUISITIONS[domain]),
    } | {name: value for name, value in wanted.items() if name not in ("domain", "finding")}
    if finding == NORMAL:
        values |= dict.fromkeys(("side", "level", "size"))
    return Scene(domain=domain, seed=seed, finding=finding, **values)


def _pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]
