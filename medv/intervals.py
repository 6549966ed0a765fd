"""Means with 95 % intervals: three resamplings, one notation and one verdict. A mean of nothing is "not measured".

`bootstrap` draws values, `shared_items` seeds and then the items that all seeds share, `own_items` seeds and then the items of
each. A paired comparison applies one of them to differences, item by item.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NOT_MEASURED = "not measured"
RESAMPLES, LEVEL = 2000, 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its 95 % interval over n items (0: not told) and so many seeds; all three are NaN where nothing
    was measured, the ends also for one item, which has no interval.
    """

    value: float
    low: float
    high: float
    n: int = 0
    seeds: int = 1

    def __post_init__(self):
        if self.n == 1:
            for end in ("low", "high"):
                object.__setattr__(self, end, math.nan)

    @classmethod
    def of(cls, row: Any) -> "Estimate":
        """The estimate in a row of a frame, with its columns value, low and high."""
        return cls(row.value, row.low, row.high)

    def cell(self, form: str = ".1f", ends: str | None = None) -> str:
        """ "value [low, high]" in this format, with another one for the `ends`; "value (no interval)", or "not measured"."""
        if math.isnan(self.low) or math.isnan(self.high):
            return NOT_MEASURED if math.isnan(self.value) else f"{self.value:{form}} (no interval)"
        return f"{self.value:{form}} [{self.low:{ends or form}}, {self.high:{ends or form}}]"

    def verdict(self, above: str = "higher", below: str = "lower", between: str = "no difference shown") -> str:
        """`above` or `below` if the interval of a difference lies on one side of 0, else `between`; NaN is "not measured"."""
        if math.isnan(self.low) or math.isnan(self.high):
            return NOT_MEASURED
        return above if self.low > 0 else below if self.high < 0 else between


def bootstrap_interval(
    values: Sequence[float], *, seed: int | Sequence[int], level: float = LEVEL, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `values`, in their unit; the same seed gives the same interval."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError("a bootstrap needs a one-dimensional, non-empty list of finite values")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level {level} must lie between 0 and 1, and resamples {resamples} must be at least 1")
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, size=values.size).mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap(values: Sequence[float], *, resamples: int = RESAMPLES) -> Estimate:
    """The mean of the values that are not NaN, by `bootstrap_interval` with seed 0."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if not known.size:
        return Estimate(np.nan, np.nan, np.nan)
    return Estimate(float(known.mean()), *bootstrap_interval(known, seed=0, resamples=resamples), known.size)


def shared_items(grid: np.ndarray) -> Estimate:
    """The mean of a grid [seeds, items] by a two-level bootstrap: seeds are drawn, then items, the same ones for every seed."""
    rng = np.random.default_rng(0)
    seeds, items = grid.shape
    if np.isnan(grid).all():
        return Estimate(np.nan, np.nan, np.nan, items, seeds)
    drawn = (rng.integers(items, size=items) for _ in range(RESAMPLES))
    means = [_mean_of_known(grid[rng.integers(seeds, size=seeds)][:, columns]) for columns in drawn]
    low, high = map(float, np.nanquantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Estimate(float(np.nanmean(grid)), low, high, items, seeds)


def own_items(grid: np.ndarray) -> Estimate:
    """The mean of a grid [seeds, items] by a two-level bootstrap: seeds are drawn, then items within each drawn seed."""
    rng = np.random.default_rng(0)
    seeds, items = grid.shape
    if np.isnan(grid).all():
        return Estimate(np.nan, np.nan, np.nan, 0, seeds)
    chosen = grid[rng.integers(seeds, size=(RESAMPLES, seeds))]  # [resamples, seeds, items]
    inside = rng.integers(items, size=(RESAMPLES, seeds, items))
    means = _mean_of_known(np.take_along_axis(chosen, inside, axis=2), axis=(1, 2))
    low, high = map(float, np.nanquantile(means, [0.025, 0.975]))
    return Estimate(float(_mean_of_known(grid)), low, high, int((~np.isnan(grid)).sum()), seeds)


def _mean_of_known(values: np.ndarray, axis: tuple[int, ...] | None = None) -> np.ndarray:
    """The mean of the values that are not NaN; NaN, without numpy's warning, where a resample holds none."""
    if not np.isnan(values).any():
        return values.mean(axis=axis)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        return np.nanmean(values, axis=axis)
