"""How much a text repeats itself: pure functions on lists of tokens (ids or words).

The paper reports repetition by eye (section 6.4, Fig. 5 and 10); these are the usual measures of degenerate text (unlikelihood
training, arXiv 1908.04319, for rep-n; arXiv 1510.03055 for distinct-n). A text that is too short for a measure has none of it:
0 repetition, 1 distinct.
"""

import re
from collections.abc import Sequence
from itertools import groupby, pairwise

SPAN = 4
"""Words that must come again together, away from their first place, to count as a repeated span."""


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


def repeated_spans(tokens: Sequence, n: int = SPAN) -> list[tuple[int, int]]:
    """Where a text says again what it has said: half-open spans of token indices, in order and apart.

    Marked is the second and every later saying, never the first: n or more tokens in a row that stood together before, and
    fewer than n that come again at once ("the the", "of the of the"). Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}: a span has at least one token")
    again, seen = [False] * len(tokens), set()
    for start in range(len(tokens)):
        for size in range(1, n):
            unit = tuple(tokens[start : start + size])
            if len(unit) == size <= start and unit == tuple(tokens[start - size : start]):
                again[start : start + size] = [True] * size
        gram = tuple(tokens[start : start + n])
        if len(gram) == n and gram in seen:
            again[start : start + n] = [True] * n
        seen.add(gram)
    marked = [index for index, repeats in enumerate(again) if repeats]
    starts = [index for index in marked if index - 1 not in marked]
    return [(start, next(end for end in range(start, len(tokens) + 1) if end not in marked)) for start in starts]


def repeated_parts(text: str, n: int = SPAN) -> list[tuple[str, bool]]:
    """The text cut into parts, each with whether it is a repetition; joined they are the text.

    Words are compared without case and without the punctuation around them.
    """
    words = [(found.start(), found.end()) for found in re.finditer(r"\S+", text)]
    bare = [text[start:end].lower().strip(".,;:!?\"'()[]") for start, end in words]
    parts, place = [], 0
    for first, last in repeated_spans(bare, n):
        start, end = words[first][0], words[last - 1][1]
        parts += [(text[place:start], False), (text[start:end], True)]
        place = end
    return [part for part in [*parts, (text[place:], False)] if part[0]]


def mark_repeats(text: str, n: int = SPAN, *, before: str = "[", after: str = "]") -> str:
    """The text with `before` and `after` around each repeated part."""
    return "".join(f"{before}{part}{after}" if again else part for part, again in repeated_parts(text, n))
