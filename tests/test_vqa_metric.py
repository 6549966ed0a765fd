"""The VQA metric: equal to the official evaluation, and what stands beside it behaves as its name says."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from medv.companion.audit.controls import majority_answers, shuffled_images
from medv.data.example import Example, Turn
from medv.data.readers import read_dataset
from medv.data.rows import read_rows
from medv.evaluation.pairing import Prediction, Reference, pair, read_predictions, read_references
from medv.evaluation.vqa import evaluate_vqa, normalize
from medv.intervals import bootstrap_interval
from medv.reading import DataError

DATA = Path(os.environ.get("MEDV_SHARED", Path(__file__).parents[1] / "../shared")) / "data"
RAD = DATA / "vqa_rad"
needs_data = pytest.mark.skipif(not RAD.is_dir(), reason=f"the official scores are not at {RAD} (set MEDV_SHARED)")
RUNS = {"gated": "run_eval", "batch": "run_eval_batch"}


def score(reference, prediction, kind="CLOSED", **options):
    return evaluate_vqa([Reference(reference, kind)], [prediction], **options)


@needs_data
@pytest.mark.parametrize("variant", RUNS)
@pytest.mark.parametrize("file", ["answer-file", "answer_file_vqa_rad"])
def test_the_official_scores_are_reproduced(file, variant):
    official = json.loads((RAD / "official_scores/official_scores.json").read_text(encoding="utf-8"))
    expected = official["files"][file][RUNS[variant]]
    paired = pair(read_references(RAD / "testset.json"), read_predictions(RAD / f"official_scores/{file}.jsonl"))
    scores = evaluate_vqa(*paired, variant=variant)
    assert (scores.n_closed, scores.n_open) == (official["n_closed"], official["n_open"]) == (272, 179)
    names = {
        "closed_accuracy": "yes/no accuracy",
        "open_recall": "recall",
        "open_precision": "precision",
        "open_f1": "f1 score",
    }
    for ours, theirs in names.items():
        assert getattr(scores, ours) == pytest.approx(expected[theirs], rel=1e-9)


def edge_cases():
    path = RAD / "official_scores/edge_case_pairs.json"
    return json.loads(path.read_text(encoding="utf-8"))["pairs"] if path.is_file() else []


@needs_data
@pytest.mark.parametrize("case", edge_cases(), ids=lambda case: case["why"])
def test_the_official_edge_cases_are_reproduced(case):
    assert normalize(case["reference"]) == case["reference_norm"]
    assert normalize(case["prediction"]) == case["prediction_norm"]
    for variant, run in RUNS.items():
        scores = score(case["reference"], case["prediction"], case["answer_type"], variant=variant)
        if case["answer_type"] == "CLOSED":
            assert scores.closed_accuracy == 100 * case[f"closed_{run}"]
            assert scores.open_recall is None
        else:
            for name in ("recall", "precision", "f1"):
                assert getattr(scores, f"open_{name}") == pytest.approx(100 * case[name], rel=1e-9)


@pytest.mark.slow
@needs_data
def test_mended_texts_score_like_the_raw_ones():
    for split, file in (("train", "trainset.json"), ("test", "testset.json")):
        raw = {str(row["qid"]): row for row in read_rows(RAD / file)}
        for example in read_dataset("vqa_rad", RAD, split):
            assert normalize(example.answer) == normalize(str(raw[example.id]["answer"]))
    for example, row in zip(
        read_dataset("pathvqa", DATA / "pathvqa", "test"), read_rows(DATA / "pathvqa/test.jsonl"), strict=True
    ):
        assert normalize(example.answer) == normalize(row["answer"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Left lung", "left lung"),
        ("x-ray", "x ray"),
        ("T2-weighted - image", "t2weighted image"),
        ("1,000 x-ray", "1000 xray"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("1.5 cm.", "1.5 cm"),
        ("cant couldnt've couldn'tve its", "can't couldn't've couldn't've its"),
        ("left:", "left:"),
        ("A", ""),
        ("." * 40, "." * 8),
        ("a\tb\u2003c", "b c"),
    ],
)
def test_normalization_follows_the_official_rules(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("reference", "prediction", "batch", "gated", "strict"),
    [
        ("no", "Normal", 100, 100, 0),
        ("no", "Yes, there is no doubt.", 100, 100, 0),
        ("yes", "Yes and no", 100, 100, 100),
        ("no", "Yes and no", 100, 100, 0),
        ("right", "bright", 100, 0, 0),
        ("left", "Left.", 100, 0, 100),
        ("no", "None", 0, 0, 0),
        ("yes", "Assistant: Yes", 100, 100, 100),
        ("A", "anything", 100, 0, 0),
    ],
)
def test_closed_variants_differ_as_described(reference, prediction, batch, gated, strict):
    assert score(reference, prediction).closed_accuracy == batch
    assert score(reference, prediction, variant="gated").closed_accuracy == gated
    assert score(reference, prediction).closed_strict_accuracy == strict


def test_saying_both_answers_games_the_official_accuracy_and_is_shown():
    references = [Reference("yes", "CLOSED"), Reference("no", "CLOSED")]
    scores = evaluate_vqa(references, ["yes no", "yes no"])
    assert scores.closed_accuracy == scores.yes_and_no_share == 100
    assert scores.closed_strict_accuracy == 50


def test_repetition_inflates_recall_but_not_set_recall():
    scores = [score("pleural effusion", "effusion " * times, "OPEN") for times in (1, 3, 20)]
    assert [s.open_recall for s in scores] == pytest.approx([50, 75, 100 * 20 / 21])
    assert [s.open_set_recall for s in scores] == [50, 50, 50]


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", ["vqa_rad", "slake", "pathvqa"])
def test_the_reference_as_prediction_is_perfect_and_the_gate_has_its_published_ceiling(name):
    references = [Reference.of(e) for e in read_dataset(name, DATA / name, "test")]
    answers = [r.answer for r in references]
    scores = evaluate_vqa(references, answers)
    assert scores.closed_accuracy == scores.closed_strict_accuracy == 100
    assert scores.open_recall > 99
    ceiling = {"vqa_rad": 93.38, "slake": 85.34, "pathvqa": 100.0}[name]
    assert evaluate_vqa(references, answers, variant="gated").closed_accuracy == pytest.approx(ceiling, abs=0.005)
    constant = {"vqa_rad": 92.28, "slake": 85.34, "pathvqa": 100.0}[name]
    gamed = evaluate_vqa(references, ["yes no"] * len(answers))
    assert gamed.closed_accuracy == pytest.approx(constant, abs=0.005)


def test_scores_lie_in_range_for_arbitrary_text():
    rng = np.random.default_rng(0)
    alphabet = [*"yesnoaYN ?,.-'\t\n:/\"1,0", "\u0130", "\ufffd", "\u4e2d", "\U0001f9e0", "\x00", "\u0301"]
    texts = ["".join(rng.choice(alphabet, size=rng.integers(0, 30))) for _ in range(400)]
    texts += ["".join(chr(c) for c in rng.integers(1, 0x10FFFF, size=12) if not 0xD800 <= c < 0xE000) for _ in range(100)]
    references = [Reference(text, str(rng.choice(["OPEN", "CLOSED"]))) for text in texts]
    predictions = [texts[i] for i in rng.permutation(len(texts))]
    for variant in RUNS:
        scores = evaluate_vqa(references, predictions, variant=variant)
        values = {k: v for k, v in scores.to_dict().items() if isinstance(v, float)}
        assert len(values) == 7
        assert all(0 <= value <= 100 for value in values.values())
        for metric, value in values.items():
            assert scores.values(metric).mean() == pytest.approx(value)
    assert json.loads(json.dumps(scores.to_dict()))["n_closed"] == scores.n_closed


def test_misuse_is_refused():
    for call, words in (
        (lambda: evaluate_vqa([], []), "nothing to score"),
        (lambda: evaluate_vqa([Reference("a", "OPEN")], []), "1 references but 0 predictions"),
        (lambda: score("a", "b", variant="loose"), "unknown variant 'loose'"),
        (lambda: score("a", None), "must be a string"),
        (lambda: Reference("a", "CLOSED "), "must be 'OPEN' or 'CLOSED'"),
        (lambda: score("a", "b").values("bleu"), "unknown metric"),
        (lambda: bootstrap_interval([], seed=0), "non-empty"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_bootstrap_intervals_cover_the_mean_and_follow_the_seed():
    values = np.random.default_rng(0).integers(0, 2, 200) * 100.0
    low, high = bootstrap_interval(values, seed=1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(200), rel=0.15)
    assert bootstrap_interval(values, seed=1) == (low, high) != bootstrap_interval(values, seed=2)
    assert bootstrap_interval([3.0, 3.0], seed=0) == (3.0, 3.0)


def rad_row(**fields):
    row = {"image_name": "a.png", "answer": "yes", "answer_type": "CLOSED", "phrase_type": "freeform"}
    return row | fields


def refs(*ids, key="qid"):
    return [Reference(f"a{i}", "OPEN", i, key, f"Question {i}?") for i in ids]


def preds(*ids, key="question_id", prompts=None):
    return [Prediction(f"p{i}", i, key, prompt) for i, prompt in zip(ids, prompts or [None] * len(ids), strict=True)]


def test_equal_ids_pair_by_id_whatever_the_order():
    assert pair(refs("1", "2", "3"), preds("3", "1", "2"))[1] == ["p1", "p2", "p3"]


def test_equal_ids_of_unlike_fields_pair_by_id_only_where_no_prompt_asks_something_else():
    prompts = ["Question 2? [yes, no]", "Question 1?"]
    given = preds("1", "2", prompts=prompts)  # numbered by its own rows
    assert pair(refs("2", "1"), given)[1] == ["p1", "p2"]
    assert pair(refs("2", "1"), preds("1", "2", prompts=prompts[::-1]))[1] == ["p2", "p1"]
    with pytest.raises(DataError, match="not in the same order"):
        pair(refs("1", "2"), given)


@pytest.mark.parametrize("form", ["{}", "{}.0", "00{}", "q{}", "qid_{}", "test_000{}", "vqa2-{}.00"])
def test_ids_that_differ_in_form_alone_pair_by_id(form):
    given = preds(*(form.format(number) for number in (12, 3, 1)))
    assert pair(refs("1", "3", "12"), given)[1] == [given[2].text, given[1].text, given[0].text]


@pytest.mark.parametrize(
    "predictions",
    [
        preds(None, None, key=None),  # no ids
        preds("2", "3", prompts=["Question 1? [yes, no]", "QUESTION 2?\n<image>"]),  # settled by the prompts
    ],
)
def test_what_has_no_ids_or_has_prompts_pairs_by_order(predictions):
    assert pair(refs("1", "2"), predictions)[1] == [p.text for p in predictions]


@pytest.mark.parametrize(
    ("predictions", "words"),
    [
        (preds("1"), r"2 questions but 1 predictions.*1 unanswered \(first: 2\)"),
        (preds("1", "2", "3"), r"1 unknown \(first: 3\)"),
        (preds("2", "3"), r"ids .* do not match \(1 unanswered \(first: 1\), 1 unknown \(first: 3\)\)"),
        (preds("7", "8", key="qid"), "do not match"),
        (preds("1", "1"), "repeat id 1"),
        (preds("5", "9", prompts=["Question 2?", "Question 1?"]), "not in the same order"),
        (preds("0", "1"), "do not match"),  # row numbers
        (preds("77", "78"), "do not match"),  # another numbering
        (preds("q2", "p1"), "do not match"),  # two prefixes
        (preds("2.5", "1.5"), "do not match"),
        (preds("-2", "-1"), "do not match"),
        (preds("2", "02"), "do not match"),
        (preds("q1", "q01"), "do not match"),
        (preds("2", None), "some predictions have an id and others have none"),
    ],
)
def test_contradicting_ids_counts_and_orders_are_refused(predictions, words):
    with pytest.raises(DataError, match=words):
        pair(refs("1", "2"), predictions)


def test_prediction_files_may_say_text_or_answer(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question_id": 4, "text": "a\u2028b"}\n{"answer": "c"}\n', encoding="utf-8")
    assert read_predictions(path) == [Prediction("a\u2028b", "4", "question_id"), Prediction("c")]
    path.write_text('{"text": "a"}\n{"question_id": 4}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2: no 'text' or 'answer'"):
        read_predictions(path)
    with pytest.raises(DataError, match="no annotation file"):
        read_references(path)


@pytest.mark.parametrize("identity", ["2.0", '"2"', "2", '"2.0"', '"02"', '"q2"'])
def test_answers_in_any_order_are_scored_by_their_ids(tmp_path, identity):
    rows = [rad_row(qid=1, question="A?"), rad_row(qid=2, question="B?", answer="no")]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    answers = f'{{"question_id": {identity}, "text": "no"}}\n{{"question_id": {identity.replace("2", "1")}, "text": "yes"}}\n'
    (tmp_path / "p.jsonl").write_text(answers)
    references, texts = pair(read_references(tmp_path / "r.json"), read_predictions(tmp_path / "p.jsonl"))
    assert evaluate_vqa(references, texts).closed_accuracy == 100


@pytest.mark.slow
@needs_data
def test_every_annotation_file_is_a_reference_file():
    files = {
        "vqa_rad/testset.json": 451,
        "slake/test.json": 1061,
        "pathvqa/test.jsonl": 6761,
        "pathvqa/lxmert/pvqa_test.json": 6761,
    }
    for file, rows in files.items():
        assert len(read_references(DATA / file)) == rows


def qa(number, question, answer, kind, image="a.jpg"):
    return Example(str(number), Path(image), (Turn("user", question), Turn("assistant", answer)), kind, {"image": image})


def test_majority_answers_use_training_frequencies_only():
    train = [
        qa(0, "Is it?", "Yes", "CLOSED"),
        qa(1, "Is it?", "no", "CLOSED"),
        qa(2, "Is it?", "No", "CLOSED"),
        qa(3, "Else?", "yes", "CLOSED"),
        qa(4, "More?", "yes", "CLOSED"),
        qa(5, "What?", "lung", "OPEN"),
    ]
    test = [qa(9, "is it", "-", "CLOSED"), qa(8, "New?", "-", "CLOSED"), qa(7, "Which?", "-", "OPEN")]
    blind = majority_answers(train, test)
    assert blind.majority == ["Yes", "Yes", "lung"]
    assert blind.lookup == ["no", "Yes", "lung"]
    with pytest.raises(ValueError, match="no training example"):
        majority_answers(train[:5], test)


def test_shuffled_images_never_leave_an_example_its_own_picture():
    rng = np.random.default_rng(0)
    for seed in range(20):
        examples = [qa(n, "?", "-", "OPEN", f"{rng.integers(6)}.jpg") for n in range(40)]
        shuffled = shuffled_images(examples, seed)
        assert all(a.image != b.image and a.turns == b.turns and a.id == b.id for a, b in zip(examples, shuffled, strict=True))
        assert sorted(e.image for e in shuffled) == sorted(e.image for e in examples)
        assert all(Path(e.meta["image"]) == e.image for e in shuffled)
        assert shuffled == shuffled_images(examples, seed) != shuffled_images(examples, seed + 1)


def test_shuffling_what_cannot_be_shuffled_is_refused():
    with pytest.raises(ValueError, match="3 of the 4 examples"):
        shuffled_images([qa(n, "?", "-", "OPEN", "a.jpg" if n else "b.jpg") for n in range(4)], 0)
    with pytest.raises(ValueError, match="has no image"):
        shuffled_images([Example("1", None, (Turn("user", "?"),))], 0)


def test_two_ids_of_a_prediction_that_differ_are_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"qid": 1, "question_id": 1.0, "text": "a"}\n')
    assert read_predictions(path)[0].id == "1"
    path.write_text('{"qid": 2, "question_id": 1, "text": "b"}\n')
    with pytest.raises(DataError, match="'question_id' and 'qid' differ"):
        read_predictions(path)
