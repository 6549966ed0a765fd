"""What an interval of a difference says, in a word; without a score there is no verdict."""

import math
from collections.abc import Sequence

import numpy as np

NOT_MEASURED = "not measured"


def verdict(
    low: float, high: float, *, above: str = "higher", below: str = "lower", between: str = "no difference shown"
) -> str:
    """`above` or `below` where the interval of a difference lies on one side of 0, else `between`; NaN is "not measured"."""
    if math.isnan(low) or math.isnan(high):
        return NOT_MEASURED
    return above if low > 0 else below if high < 0 else between


def span(value: float, low: float, high: float, *, form: str = ".1f") -> str:
    """ "value [low, high]" in this form, or "not measured"."""
    return NOT_MEASURED if math.isnan(value) else f"{value:{form}} [{low:{form}}, {high:{form}}]"


def bootstrap_interval(
    values: Sequence[float], *, seed: int | Sequence[int], level: float = 0.95, resamples: int = 2000
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
