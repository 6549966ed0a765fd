"""The structured truth of one phantom: what is in the picture, before anything is drawn or said.

A `Scene` is drawn by `medv.phantoms.pictures`, put into words by `medv.phantoms.wording` and scored by `medv.phantoms.facts`;
it knows none of them. The five domains are those of the paper's benchmark (Table 1). Sides follow the radiological
convention where one exists (chest X-ray, CT, MRI): the patient's left is on the right of the image. In histology and gross
pathology left and right are those of the field of view.
"""

from dataclasses import dataclass

import numpy as np

DOMAINS = ("chest_xray", "ct", "mri", "histology", "gross")
NORMAL = "normal"

# What can be wrong in each domain. Every abnormality of the list has a side, a level and a size.
FINDINGS = {
    "chest_xray": ("pleural effusion", "pneumothorax", "consolidation", "nodule"),
    "ct": ("cyst", "calcification", "mass", "fluid collection"),
    "mri": ("tumor", "infarct", "hemorrhage", "edema"),
    "histology": ("inflammation", "necrosis", "carcinoma", "fibrosis"),
    "gross": ("tumor", "hemorrhage", "cyst", "ulcer"),
}
SIDES = ("left", "right")
# The two levels of each domain: axial slices run from front to back, the others from top to bottom.
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

# Seeds of the splits never meet, so no image is in two of them.
SPLIT_SEEDS = {"train": 0, "validation": 1_000_000_000, "test": 2_000_000_000}
SPLIT_SIZE = 1_000_000_000


@dataclass(frozen=True)
class Scene:
    """One phantom in words a program can read. `side`, `level` and `size` are None exactly when `finding` is "normal"."""

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
    """The seed of image `index` of a split; ranges of different splits are disjoint by construction."""
    if split not in SPLIT_SEEDS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLIT_SEEDS)}")
    if not 0 <= index < SPLIT_SIZE:
        raise ValueError(f"image index {index} is outside 0..{SPLIT_SIZE - 1}")
    return SPLIT_SEEDS[split] + index


def sample_scene(seed: int, *, normal_share: float = 0.2, **wanted: str) -> Scene:
    """Draw a scene from its seed; `wanted` fixes attributes, for example `domain="ct"` or `finding="cyst", side="left"`.

    Unfixed attributes are uniform, so that no attribute tells another. Raises ValueError where the wish cannot be met.
    """
    unknown = set(wanted) - {"domain", "finding", "side", "level", "size", "acquisition"}
    if unknown:
        raise ValueError(f"a scene has no attribute {', '.join(sorted(unknown))}")
    rng = np.random.default_rng([seed, 0x5CE7E])
    domain = _pick_domain(rng, wanted)
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


def _pick(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def _pick_domain(rng: np.random.Generator, wanted: dict[str, str]) -> str:
    """A domain in which every wanted value exists."""
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
    return _pick(rng, tuple(fits))
