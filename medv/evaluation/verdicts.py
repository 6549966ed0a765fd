"""What an interval of a difference says, in a word; without a score there is no verdict."""

import math

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
