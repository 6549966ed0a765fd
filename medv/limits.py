"""Checks of numbers, made where a setting is made: no meaningless setting is run, saved or published."""

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

LARGEST_SEED = 2**32 - 1  # numpy's legacy generator takes 32 bits


def whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises ValueError unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} is {value!r}: it must be a whole number")
    if value < least:
        raise ValueError(f"{name} is {value}: it must be at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name} is {value}: it must be at most {most}")


def real(name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, open_ends: str = "") -> None:
    """Raises ValueError unless `value` is a finite number from `least` to `most`; `open_ends` names excluded ends."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}: it must be a finite number")
    if value < least or ("least" in open_ends and value == least):
        raise ValueError(f"{name} is {value}: it must be {'above' if 'least' in open_ends else 'at least'} {least:g}")
    if value > most or ("most" in open_ends and value == most):
        raise ValueError(f"{name} is {value}: it must be {'below' if 'most' in open_ends else 'at most'} {most:g}")


def named(kind: str, value: Any, known: Collection[str]) -> None:
    """Raises ValueError unless `value` is one of the names `known` of a kind."""
    if value not in known:
        raise ValueError(f"unknown {kind} {value!r}: use one of {', '.join(known)}")


def seed(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a seed: an integer from 0 to LARGEST_SEED."""
    whole(name, value, 0, LARGEST_SEED)
