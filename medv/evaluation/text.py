"""Measures of answers as texts (Table 3, Fig. 5, 10): length, time, forwards, length error, repetition.

A word is what `str.split` gives; the paper's counting rule is not known (its words per query are whole numbers over 193
questions, which any count of words gives). Seconds per word are seconds per query over words per query, as in Table 3. The
paper reports repetition by eye; ours are the usual measures of degenerate text (unlikelihood training, arXiv 1908.04319, for
rep-n; arXiv 1510.03055 for distinct-n). A text that is too short for a measure has 0 repetition and 1 distinct.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from medv.data.rows import Row, read_rows

AMOUNTS = ("tokens", "seconds", "forwards", "asked_words", "gen_length")
SPAN = 4  # words that must recur together, away from their first place, to count as a repeated span


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


def measure_answer(row: Mapping[str, Any], *, asked_words: int | None = None) -> dict[str, Any]:
    """The measures of one answer: `text` (or `answer`), and, if it has them, `seconds`, `forwards`, `tokens` and the asked
    length: `asked_words` (words) or else `gen_length` (tokens, also inside a dict `settings`).

    length_error: |length - asked| / asked in percent, in the unit asked for; repeated_share: percent of the words that stand
    in repeated spans. A value that the row lacks is None. Raises ValueError for a row without a text.
    """
    text = next((row[key] for key in ("text", "answer") if row.get(key) is not None), None)
    if not isinstance(text, str):
        raise ValueError(f"the answer to question {row.get('question_id', row.get('id', '?'))} has no 'text'")
    lower = [word.lower() for word in text.split()]
    settings = row["settings"] if isinstance(row.get("settings"), Mapping) else {}
    asked, length = asked_words or row.get("asked_words"), len(lower)
    if not asked:
        asked, length = row.get("gen_length") or settings.get("gen_length"), row.get("tokens")
    return {
        "id": str(row.get("question_id", row.get("id", ""))),
        "words": len(lower),
        **{name: row.get(name) for name in ("tokens", "seconds", "forwards")},
        "length_error": 100.0 * abs(length - asked) / asked if asked and length is not None else None,
        **repetition(lower),
        "repeated_share": 100.0 * sum(end - start for start, end in repeated_spans(lower)) / max(len(lower), 1),
    }


def measure_texts(rows: Sequence[Mapping[str, Any]], *, asked_words: int | None = None) -> dict[str, Any]:
    """Means over answers, as Table 3 counts them: n, words_per_query, tokens_per_query, seconds_per_query, seconds_per_word,
    forwards_per_query, length_error (percent), and the repetition measures.

    A mean over rows of which one lacks the value is None. Raises ValueError where there is no row.
    """
    if not rows:
        raise ValueError("there is nothing to measure: no answers were given")
    items = [measure_answer(row, asked_words=asked_words) for row in rows]
    columns = {name: [item[name] for item in items] for name in items[0] if name != "id"}
    means = {name: None if None in values else fmean(values) for name, values in columns.items()}
    per_query = {f"{name}_per_query": means.pop(name) for name in ("words", "tokens", "seconds", "forwards")}
    seconds, count = per_query["seconds_per_query"], per_query["words_per_query"]
    per_query["seconds_per_word"] = seconds / count if seconds is not None and count else None
    return {"n": len(items), **per_query, **means}


def read_answers(path: str | Path) -> list[Row]:
    """The rows of an answer file; raises DataError where a row has no text, or an amount that is no number."""
    rows = read_rows(path)
    for row in rows:
        row.answer()
        settings = row.get("settings")
        for place in (row, row.with_fields(settings) if isinstance(settings, dict) else {}):
            for name in AMOUNTS if place else ():
                place.amount(name)
    return rows
