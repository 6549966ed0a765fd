"""Length, time and repetition of answers: what Table 3 counts, and where a text repeats itself."""

import json
import random

import pytest
from command import run

from medv.evaluation.text import mark_repeats, measure_answer, measure_texts, repeated_parts, repeated_spans


def test_seconds_per_word_are_seconds_per_query_over_words_per_query():
    rows = [{"text": "one two three", "seconds": 2.0}, {"text": "one", "seconds": 4.0}]
    measured = measure_texts(rows)
    assert (measured["words_per_query"], measured["seconds_per_query"]) == (2.0, 3.0)
    assert measured["seconds_per_word"] == 1.5  # a mean of ratios would be 2.33


def test_the_length_error_is_in_the_unit_that_was_asked_for():
    assert measure_answer({"text": "a b c d", "asked_words": 5})["length_error"] == pytest.approx(20)
    assert measure_answer({"text": "a b", "tokens": 48, "gen_length": 64})["length_error"] == pytest.approx(25)
    assert measure_answer({"text": "a b", "tokens": 48, "settings": {"gen_length": 32}})["length_error"] == 50
    assert measure_answer({"text": "a b", "tokens": 48, "gen_length": 64}, asked_words=2)["length_error"] == 0
    assert measure_answer({"text": "a b"})["length_error"] is None


def test_what_one_row_does_not_say_has_no_mean():
    measured = measure_texts([{"text": "a", "forwards": 8}, {"text": "b"}])
    assert measured["forwards_per_query"] is None and measured["n"] == 2


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("", []),
        ("a b c", []),
        ("a a", [(1, 2)]),
        ("a a a b", [(1, 3)]),
        ("x of the of the y", [(3, 5)]),
        ("x of the of the of the y", [(3, 7)]),
        ("a b c d e a b c d f", [(5, 9)]),
        ("a b c d e a b c f", []),
        ("a b c a b c", [(3, 6)]),
    ],
)
def test_the_second_saying_is_marked_and_never_the_first(text, spans):
    assert repeated_spans(text.split()) == spans


def test_a_token_repeated_without_end_is_one_span():
    assert repeated_spans([7] * 50) == [(1, 50)]


def test_parts_join_to_the_text_and_words_are_compared_without_case_and_punctuation():
    text = "The lung is  clear.\nYes: the lung is clear, indeed."
    parts = repeated_parts(text)
    assert "".join(part for part, _ in parts) == text
    assert [part for part, again in parts if again] == ["the lung is clear,"]
    assert mark_repeats("no no") == "no [no]"


def test_spans_are_apart_in_order_and_inside_whatever_the_text():
    chance = random.Random(0)
    for _ in range(200):
        tokens = [chance.randrange(3) for _ in range(chance.randrange(30))]
        spans = repeated_spans(tokens, chance.randrange(1, 6))
        edges = [edge for span in spans for edge in span]
        assert edges == sorted(set(edges)) and (not edges or (edges[0] > 0 and edges[-1] <= len(tokens)))


def test_the_command_prints_means_and_marks_repeats(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question_id": 1, "text": "a lung lung", "seconds": 3, "forwards": 4}) + "\n")
    done = run("evaluate", "text", "--answers", str(path), "--json")
    measured = json.loads(done.stdout)
    assert (measured["words_per_query"], measured["seconds_per_word"], measured["forwards_per_query"]) == (3, 1, 4)
    assert measured["repeated_share"] == pytest.approx(100 / 3)
    assert "a lung [lung]" in run("evaluate", "text", "--answers", str(path), "--marked").stdout
    path.write_text('{"question_id": 1}\n')
    done = run("evaluate", "text", "--answers", str(path))
    assert done.exit_code == 2 and "line 1: no 'text'" in done.stderr
