"""Repetition within a text: pure functions on lists of tokens (ids or words).

The paper reports repetition by eye (section 6.4, Fig. 5 and 10); these are the usual measures of degenerate text (unlikelihood
training, arXiv 1908.04319, for rep-n; arXiv 1510.03055 for distinct-n). A text that is too short for a measure has
0 repetition and 1 distinct.
"""

import re
from collections.abc import Sequence
from itertools import groupby, pairwise

SPAN = 4
"""Words that must recur together, away from their first place, to count as a repeated span."""


def distinct_n(tokens: Sequence, n: int) -> float:
    """Different n-grams over all n-grams, 0 .. 1."""
    if n < 1:
        raise ValueError(f"n is {n}: an n-gram has at least one token")
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(tokens: Sequence) -> dict[str, float]:
    """All measures of one text: adjacent_duplicates, the share of neighboring pairs that are equal; longest_run, the length of
    the longest stretch of one token (0 for an empty text); rep_n, the share of n-grams that occurred before; distinct_1.
    """
    return {
        "adjacent_duplicates": sum(a == b for a, b in pairwise(tokens)) / max(len(tokens) - 1, 1),
        "longest_run": max((sum(1 for _ in run) for _, run in groupby(tokens)), default=0),
        "rep_2": 1 - distinct_n(tokens, 2),
        "rep_4": 1 - distinct_n(tokens, 4),
        "distinct_1": distinct_n(tokens, 1),
    }


def repeated_spans(tokens: Sequence, n: int = SPAN) -> list[tuple[int, int]]:
    """Half-open spans of repeated tokens, in order and apart.

    Marked is the second and every later occurrence, never the first: n or more tokens in a row that stood together before, and
    fewer than n that recur at once ("the the", "of the of the"). Raises ValueError for n < 1.
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
    spans, start = [], 0
    for repeats, run in groupby(again):
        end = start + sum(1 for _ in run)
        if repeats:
            spans.append((start, end))
        start = end
    return spans


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


def mark_repeats(text: str) -> str:
    """The text with each repeated part in brackets."""
    return "".join(f"[{part}]" if again else part for part, again in repeated_parts(text))
