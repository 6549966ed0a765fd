"""How much a text repeats itself: pure functions on lists of tokens (ids or words).

The paper reports repetition by eye (section 6.4, Fig. 5 and 10); these are the usual measures of degenerate text (unlikelihood
training, arXiv 1908.04319, for rep-n; arXiv 1510.03055 for distinct-n). A text that is too short for a measure has none of it:
0 repetition, 1 distinct.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise


def adjacent_duplicates(tokens: Sequence) -> float:
    """The share of neighboring pairs that are equal, 0 .. 1."""
    return sum(a == b for a, b in pairwise(tokens)) / max(len(tokens) - 1, 1)


def longest_run(tokens: Sequence) -> int:
    """The length of the longest stretch of one token; 1 where nothing repeats, 0 for an empty text."""
    return max((sum(1 for _ in run) for _, run in groupby(tokens)), default=0)


def distinct_n(tokens: Sequence, n: int) -> float:
    """Different n-grams over all n-grams, 0 .. 1."""
    if n < 1:
        raise ValueError(f"n is {n}: an n-gram has at least one token")
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def rep_n(tokens: Sequence, n: int) -> float:
    """The share of n-grams that have occurred before, 1 - distinct-n."""
    return 1 - distinct_n(tokens, n)


def repetition(tokens: Sequence) -> dict[str, float]:
    """All measures of one text."""
    return {
        "adjacent_duplicates": adjacent_duplicates(tokens),
        "longest_run": longest_run(tokens),
        "rep_2": rep_n(tokens, 2),
        "rep_4": rep_n(tokens, 4),
        "distinct_1": distinct_n(tokens, 1),
    }
