"""The judge: the official prompt and values, reading that is tolerant of form and strict about range, and no line lost."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from command import run

from medv.evaluation.judge import Judgement, JudgeScores, judge_messages, parse_scores, read_judgements

QA50 = Path(os.environ.get("MEDV_SHARED", Path(__file__).parents[1] / "../shared")) / "data/qa50"
needs_data = pytest.mark.skipif(not QA50.is_dir(), reason=f"the judge's file is not at {QA50} (set MEDV_SHARED)")
JUDGED = QA50 / "llava_med_eval_qa50_qa_ans.jsonl"


def rows(name):
    return [json.loads(line) for line in (QA50 / name).read_text(encoding="utf-8").splitlines()]


def judged(question_id, result, **fields):
    flags = {"chest_xray": False, "mri": True, "histology": False, "gross": False, "ct_scan": True}
    return {"question_id": question_id, "type": "conversation", "domain": flags, "result": result, **fields}


def write(path, items):
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def official_groups(items):
    """The official aggregation, from its description: mean of s2 / s1 over the questions of a group, times 100."""
    ratios = {}
    for row in items:
        first, second = row["result"].split("\n")[0].split(" ")
        order = ("chest_xray", "mri", "histology", "gross", "ct_scan")
        for group in ("overall", row["type"], next(name for name in order if row["domain"][name])):
            ratios.setdefault(group, []).append(float(second) / float(first))
    return {group: sum(values) / len(values) * 100 for group, values in ratios.items()}, ratios


@needs_data
def test_the_real_judgements_give_the_official_values():
    done = run("evaluate", "judge", "--judgements", str(JUDGED), "--json")
    scores = json.loads(done.stdout)
    means, ratios = official_groups(rows(JUDGED.name))
    assert {group: scores[group] for group in means} == pytest.approx(means, rel=1e-12)
    assert scores["counts"] == {group: len(values) for group, values in ratios.items()}
    assert scores["overall"] == pytest.approx(46.214, abs=5e-4) and not scores["unjudged"]
    assert scores["detailed_description"] == pytest.approx(41.214, abs=5e-4)


@needs_data
def test_the_193_prompts_are_the_official_ones_byte_by_byte():
    """The hash was taken over the messages that the official script (LLaVA-Med v1.0.0) builds for the same two files."""
    digest = hashlib.sha256()
    answers = rows("llava_med_60k_3epoch_answers.jsonl")
    for question, answer in zip(rows("llava_med_eval_qa50_qa.jsonl"), answers, strict=True):
        digest.update(json.dumps(judge_messages(question, answer["text"]), sort_keys=True).encode() + b"\n")
    assert digest.hexdigest() == "21a96154974bff895e032773eb6ff77711bfffb412d3f49f85f09e5909cefbe0"


@needs_data
def test_spoiled_lines_of_the_real_file_are_listed_and_the_rest_counts(tmp_path):
    items = rows(JUDGED.name)
    spoiled = {3: "no scores", 50: "11 5\nfine", 77: "", 120: "0 4"}
    for place, text in spoiled.items():
        items[place] = items[place] | {"result": text}
    lines = [*items[:-1], json.dumps(items[-1])[:40]]
    scores = read_judgements(write(tmp_path / "j.jsonl", lines)).to_dict()
    whole = [row for place, row in enumerate(items[:-1]) if place not in spoiled]
    assert scores["overall"] == pytest.approx(official_groups(whole)[0]["overall"], rel=1e-12)
    assert [item["question_id"] for item in scores["unjudged"]] == [
        *(str(items[place]["question_id"]) for place in spoiled),
        "line 192",
    ]
    assert scores["counts"]["overall"] + len(scores["unjudged"]) == 192


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("9 5\n\nbecause", (9, 5)),
        ("8, 9", (8, 9)),
        ("8 | 9", (8, 9)),
        ("```\n8 9\n```\nbecause", (8, 9)),
        ("```text\n8 9\n```", (8, 9)),
        ("`8 9`", (8, 9)),
        ("Scores: 9 5", (9, 5)),
        ("**Score:** 9, 5", (9, 5)),
        ("Scores:\n9 5", (9, 5)),
        ("Assistant 1: 8, Assistant 2: 7", (8, 7)),
        ("**Assistant 1**: 8/10\n**Assistant 2**: 7.5/10\nbecause", (8, 7.5)),
        ("<think>\n1 2\nor 3?\n</think>\n\n8 7\nbecause", (8, 7)),
        ("Let me see: 1 2.\n</think>\n8 7", (8, 7)),
        ("<THINKING>hm</THINKING>8 7", (8, 7)),
        ("8/10 9/10", (8, 9)),
        ("8 / 10, 7.5 / 10", (8, 7.5)),
        ("**9 5**", (9, 5)),
        ("\n 7\t8 \r\nrest", (7, 8)),
        ("10 and 1.", (10, 1)),
    ],
)
def test_two_scores_are_read_in_many_forms(text, scores):
    assert parse_scores(text) == scores


@pytest.mark.parametrize(
    "text",
    [
        *("", "9", "10 11", "-1 5", "0 5", "5 0.5", "9 5 3", "nan 5", "1e1 5", "8-9", "nine five", "9;", "\u0669 \u0665"),
        *("8/10", "8 / 10", "8/9", "8/10 7", "8 7/10", "8,7", "8,5 7,5", "Score: 8\n7", "8\n7", "Score: 8/10", "8/100 7/100"),
        *("Assistant 2: 7, Assistant 1: 8", "Assistant 1: 8", "I would give 8 7", "The scores lie between 8 and 10"),
        *("<think>8 7", "<think>\n8 7\n", "<think></think>", "8 7</think>", "8 7\n</think>\n9 6"),
        *("<think>a</think>\n8 7\nhe says </think>\n1 10", "<think>he says </think>\n1 10\n</think>\n8 7"),
    ],
)
def test_what_is_not_two_scores_in_range_is_refused(text):
    with pytest.raises(ValueError, match="first line"):
        parse_scores(text)


def test_the_first_flag_in_the_official_order_names_the_domain_and_a_group_without_questions_has_no_score(tmp_path):
    scores = read_judgements(write(tmp_path / "j.jsonl", [judged(1, "10 5"), judged(2, "5 5")])).to_dict()
    assert (scores["mri"], scores["ct_scan"]) == (75.0, None)
    assert scores["overall"] == scores["conversation"] == 75.0  # a ratio of means would be 66.7


def test_no_row_is_lost_whatever_it_holds(tmp_path):
    items = [judged(1, "8 8"), "{broken", "[1, 2]", judged(2, None), {"question_id": 3}, judged(1, "8 4"), judged(4, 7)]
    scores = read_judgements(write(tmp_path / "j.jsonl", items)).to_dict()
    assert scores["overall"] == 100.0 and scores["counts"]["overall"] == 1
    assert [item["question_id"] for item in scores["unjudged"]] == ["line 2", "line 3", "2", "3", "1", "4"]
    assert all(item["reason"] for item in scores["unjudged"])


def test_pretty_printed_files_are_read_too(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text("\n".join(json.dumps(judged(n, "8 4"), indent=2) for n in range(3)))
    assert read_judgements(path).to_dict()["counts"]["overall"] == 3


def test_scores_of_any_judge_are_aggregated_alike():
    scores = JudgeScores((Judgement("a", 1.0, 0.5, "conversation", "gross"), Judgement("b", 1.0, 1.0, domain="gross")))
    assert scores.to_dict()["gross"] == 75.0 and list(scores.relative("conversation")) == [50.0]
    with pytest.raises(ValueError, match="unknown group"):
        scores.relative("xray")


def test_a_question_that_cannot_be_judged_says_what_it_lacks():
    with pytest.raises(ValueError, match="question 7 has no gpt4_answer, fig_label"):
        judge_messages({"question_id": 7, "text": "What?"}, "x")


def test_a_missing_file_is_one_sentence(tmp_path):
    done = run("evaluate", "judge", "--judgements", str(tmp_path / "none.jsonl"))
    assert done.exit_code == 2 and "does not exist" in done.stderr


def test_one_question_under_two_forms_of_its_id_counts_once_and_what_is_no_id_never(tmp_path):
    path = tmp_path / "j.jsonl"
    rows = [{"question_id": name, "result": "8 4"} for name in (1, 1.0, "1", " 1", True, None, [1])]
    path.write_text("\n".join(map(json.dumps, rows)))
    scores = read_judgements(path)
    assert [item.id for item in scores.judged] == ["1"] and len(scores.unjudged) == 6
