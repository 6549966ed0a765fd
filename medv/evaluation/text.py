"""Measures of answers as texts (Table 3, Fig. 5, 10): length, time, forwards, length error, repetition.

A word is what `str.split` gives; the paper's counting rule is not known (its words per query are whole numbers over 193
questions, which any count of words gives). Seconds per word are seconds per query over words per query, as in Table 3.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from medv.data.rows import Row, read_rows
from medv.evaluation.repetition import repeated_spans, repetition

AMOUNTS = ("tokens", "seconds", "forwards", "asked_words", "gen_length")


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def answer_text(row: Mapping[str, Any]) -> str:
    """The text of one answer, `text` or `answer`; raises ValueError for a row without one."""
    text = next((row[key] for key in ("text", "answer") if row.get(key) is not None), None)
    if not isinstance(text, str):
        raise ValueError(f"the answer to question {row.get('question_id', row.get('id', '?'))} has no 'text'")
    return text


def measure_answer(row: Mapping[str, Any], *, asked_words: int | None = None) -> dict[str, Any]:
    """The measures of one answer: `text` (or `answer`), and, if it has them, `seconds`, `forwards`, `tokens` and the asked
    length: `asked_words` (words) or else `gen_length` (tokens, also inside a dict `settings`).

    length_error: |length - asked| / asked in percent, in the unit asked for; repeated_share: percent of the words that stand
    in repeated spans. What the row lacks is None. Raises ValueError for a row without a text.
    """
    lower = [word.lower() for word in words(answer_text(row))]
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
