"""The audit: every finding's arithmetic holds, nothing is accused without a sum, and gaming is measured, not claimed."""

import json
import random

import pytest
from published import DATA, needs_data

from medv.companion.audit import paper as audit
from medv.companion.audit.annotations import annotation_findings
from medv.companion.audit.findings import AGREES, DIFFERS, counts_that_give, findings_frame
from medv.companion.audit.gaming import TRUTH, game_findings, game_vqa, inflation
from medv.paper import table
from medv.phantoms.sets import description_set, vqa_set


@pytest.fixture(scope="module")
def findings():
    return audit.audit()


def of(findings, check, verdict):
    return [finding for finding in findings if (finding.check, finding.verdict) == (check, verdict)]


def test_only_the_row_that_does_not_add_up_is_said_not_to(findings):
    (wrong,) = of(findings, "weighted means", DIFFERS)
    assert "LLaVA," in wrong.where and "39.924" in wrong.arithmetic and "39.664" in wrong.arithmetic
    (rest,) = of(findings, "weighted means", AGREES)
    assert "9 other rows" in rest.where and "LLaDA-MedV" in rest.reading


def test_95_15_percent_is_no_count_of_3391_and_the_other_two_are_counts(findings):
    (wrong,) = of(findings, "closed counts", DIFFERS)
    assert "pathvqa" in wrong.where and "3362" in wrong.arithmetic
    assert not any(round(100 * k / 3391, 2) == 95.15 for k in range(3392))
    right = " ".join(finding.arithmetic for finding in of(findings, "closed counts", AGREES))
    assert "231 / 272" in right and "384 / 416" in right


@pytest.mark.parametrize("n", [1, 7, 272, 416, 3391])
def test_counts_that_give_a_percentage_are_those_that_round_to_it(n):
    chance = random.Random(n)
    for value in [round(100 * k / n, 2) for k in range(0, n + 1, max(1, n // 40))] + [round(chance.random() * 100, 2)]:
        assert counts_that_give(value, n) == [k for k in range(n + 1) if abs(100 * k / n - value) <= 0.005 + 1e-9]


def test_the_margin_on_vqa_rad_is_two_questions(findings):
    margin = next(finding for finding in findings if finding.check == "margins" and "vqa_rad" in finding.where)
    assert "= 2 of 272" in margin.arithmetic
    low, high = audit.wilson(231, 272)
    assert (low, high) == pytest.approx((80.19, 88.71), abs=0.02)  # the usual formula, by hand


def test_words_and_seconds_of_table_3_agree_row_by_row(findings):
    assert len(of(findings, "seconds per word", AGREES)) == len(table("table3"))
    (counted,) = of(findings, "words per query", AGREES)
    assert all(total in counted.arithmetic for total in ("7012", "7898", "32151", "32887"))


def test_the_text_and_the_table_count_pathvqa_differently_and_the_others_alike(findings):
    wrong = of(findings, "data set counts", DIFFERS)
    assert all("PathVQA" in finding.where for finding in wrong)
    assert ["= 4315" in wrong[0].arithmetic, "= 32795" in wrong[1].arithmetic, "832" in wrong[2].arithmetic] == [True] * 3


def test_a_changed_table_is_noticed(monkeypatch):
    def spoiled(name):
        frame = table(name)
        if name == "table3":
            frame.loc[2, "seconds_per_word"] = 0.5
        if name == "table5":
            frame.loc[3, "overall_score"] += 1
        return frame

    monkeypatch.setattr(audit, "table", spoiled)
    assert [f.where for f in audit.words_and_seconds() if f.verdict == DIFFERS] == ["Table 3, LLaDA-MedV, Z = 256 (L=256)"]
    assert [f.check for f in audit.table5_settings() if f.verdict == DIFFERS] == ["settings"]


def test_every_finding_has_its_sum_and_stays_neutral(findings):
    for finding in findings:
        assert finding.printed and finding.arithmetic and finding.reading.endswith((".", '"'))
        said = " ".join((finding.where, finding.reading)).lower()
        assert not any(word in said for word in ("wrong", "error", "mistake", "false", "mislead", "incorrect", "fake"))
    frame = findings_frame(findings)
    assert frame["verdict"].tolist() == sorted(frame["verdict"], key=["differs", "remark", "agrees"].index)


def test_yes_no_is_always_right_on_balanced_phantoms_and_strict_accuracy_sees_through_it():
    scores = game_vqa("phantoms", vqa_set("train", 400), vqa_set("test", 200)).set_index("answer to every question")
    assert scores.at['"yes no"', "closed accuracy"] == 100 and scores.at['"yes no"', "closed, strict"] == 50
    assert scores.at[TRUTH, "closed, strict"] == scores.at[TRUTH, "open recall"] == 100
    many = scores.loc["the 10 most frequent words"]
    assert many["open recall"] > 40 > many["open precision"]


def test_repetition_inflates_recall_and_leaves_set_recall():
    grown = inflation("phantoms", vqa_set("test", 300))
    assert grown["open recall"].is_monotonic_increasing and grown["open recall"].iloc[-1] > 90
    assert grown["open set recall"].nunique() == 1 and grown["open set recall"].iloc[0] < 60


@pytest.mark.slow
def test_stating_every_fact_buys_recall_with_precision():
    train, test = description_set("train", 120), description_set("test", 40)
    scores = game_findings("phantoms", train, test).set_index("answer to every question")
    everything = scores.loc["every fact there is"]
    assert everything["facts recall"] > 95 and everything["facts precision"] < 25
    assert scores["facts F1"].drop(TRUTH).max() < 40 < scores.at[TRUTH, "facts F1"]


@pytest.mark.slow
@needs_data
def test_the_published_files_give_the_known_counts():
    found = annotation_findings({name: DATA / name for name in ("vqa_rad", "slake", "pathvqa", "qa50")})
    sums = " | ".join(finding.arithmetic for finding in found)
    for known in ("254 / 272 = 93.38", "355 / 416 = 85.34", "no k / 3391", "3199 / 3362 = 95.1517", "832 different"):
        assert known in sums
    for known in (f"{k} / {n} =" for k, n in audit.CEILINGS.values()):
        assert known in sums
    assert f"{audit.IMAGES} different" in sums
    for known in ("2 of 179", "104 of 179", "46.214", "44.431", "9417 / 193 = 48.793"):
        assert known in sums


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", ["vqa_rad", "slake", "pathvqa"])
def test_the_answer_yes_no_scores_what_is_recorded_on_the_published_sets(name):
    from medv.data.readers import read_dataset

    closed = [example for example in read_dataset(name, DATA / name, "test") if example.answer_type == "CLOSED"]
    scores = game_vqa(name, [], closed).set_index("answer to every question")
    k, n = audit.YES_NO[name]
    assert scores.at['"yes no"', "closed accuracy"] == scores.at['"yes no"', "closed, gated"] == pytest.approx(100 * k / n)
    assert scores.at['"yes no"', "n closed"] == n


def test_a_set_that_is_not_there_yields_nothing_and_an_unknown_one_is_refused(tmp_path):
    assert annotation_findings({"slake": None, "qa50": tmp_path}) == []
    with pytest.raises(ValueError, match="unknown data set"):
        annotation_findings({"mimic": None})


@pytest.mark.parametrize("kind", ["OPEN", "CLOSED"])
def test_a_set_of_one_type_of_question_yields_no_finding_on_the_other(tmp_path, kind):
    row = {"question": "q", "answer": "yes", "answer_type": kind, "image_name": "a.jpg", "phrase_type": "freeform"}
    for name in ("trainset.json", "testset.json"):
        (tmp_path / name).write_text(json.dumps([row | {"qid": 1}, row | {"qid": 2, "question": "r"}]))
    checks = {"OPEN": {"shared answers"}, "CLOSED": {"metric variants"}}[kind]
    assert {finding.check for finding in annotation_findings({"vqa_rad": tmp_path})} == checks
    judged = {"question_id": 1, "result": "8 6\nbecause", "type": "conversation", "domain": "mri"}
    (tmp_path / "llava_med_eval_qa50_qa_ans.jsonl").write_text(json.dumps(judged) + "\n")
    assert annotation_findings({"qa50": tmp_path}) == [], "one judgement does not scatter"


def test_findings_are_plain_data(findings):
    rows = findings_frame(findings).to_dict("records")
    assert json.loads(json.dumps(rows)) == rows
