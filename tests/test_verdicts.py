"""Without a score there is no verdict: every comparison says "not measured", and a result without its numbers has a gap."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny import model, processor

from medv.companion.figures import plots as figures
from medv.companion.figures.plots import setting_curves
from medv.companion.reproduction.registry import Node
from medv.companion.reproduction.run import Run
from medv.companion.studies import adaptation, conversation, generation, summaries
from medv.companion.studies import fast_sampling as quality
from medv.companion.studies import initialization as init
from medv.companion.studies import lora as lora_study
from medv.companion.studies import repetition as repetition_study
from medv.companion.studies import training_stages as stages
from medv.companion.studies.requests import scored_by, text_scores
from medv.data.example import Turn
from medv.data.texts import Document
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.intervals import NOT_MEASURED, Estimate, bootstrap, own_items
from medv.phantoms.sets import description_set
from medv.profiles import get_profile

SMOKE = get_profile("smoke")


def asked(settings: list[str], score: float = np.nan, **measures: float) -> pd.DataFrame:
    """Answers of settings to four requests, all with the same score and words."""
    values = dict.fromkeys(generation.METRICS, 1.0) | measures | {"score": score}
    return pd.DataFrame([{"setting": s, "seed": 0, "id": i, **values} for s in settings for i in range(4)])


def test_a_word_is_said_of_an_interval_and_none_of_no_interval():
    said = [Estimate(0, *ends).verdict() for ends in ((1, 2), (-2, -1), (-1, 1))]
    assert said == ["higher", "lower", "no difference shown"]
    nothing = Estimate(np.nan, np.nan, np.nan)
    assert nothing.verdict(between="no change shown") == nothing.cell() == NOT_MEASURED
    assert Estimate(1.25, -0.5, 3).cell("+.1f") == "+1.2 [-0.5, +3.0]" and Estimate(1.25, 0, 3).cell(ends=".0f") == "1.2 [0, 3]"


def test_one_item_has_a_mean_and_neither_an_interval_nor_a_verdict():
    one = bootstrap([3.0])
    assert (one.value, one.n, one.verdict(), one.cell("+.1f")) == (3, 1, NOT_MEASURED, "+3.0 (no interval)")
    for many in (bootstrap([3.0, 3.0]), own_items(np.full((2, 1), 3.0)), Estimate(3, 3, 3)):
        assert many.verdict() == "higher"
    row = summaries.check_effects(
        asked(["a"], 5.0).head(1).merge(asked(["b"], 9.0).head(1), how="outer"), [("a claim", "score", "a", "b", "rises")]
    ).iloc[0]
    assert (row["here"], row["n"], row["appears here"]) == ("+4.0 (no interval)", 1, NOT_MEASURED)


@pytest.mark.parametrize("expected", ["rises", "falls", "no change shown"])
def test_a_claim_about_a_score_that_nobody_gave_does_not_appear_whatever_it_expects(expected):
    found = summaries.check_effects(asked(["a", "b"]), [("a claim", "score", "a", "b", expected)]).iloc[0]
    assert (found["here"], found["n"], found["appears here"]) == (NOT_MEASURED, 0, NOT_MEASURED)
    assert summaries.check_effects(asked(["a", "b"]), [("x", "words", "a", "b", "rises")]).iloc[0]["n"] == 4


def test_an_answer_without_a_score_stands_in_no_mean_and_in_no_count():
    items = asked(["a", "b"], 50.0)
    items.loc[0, "score"] = np.nan
    summary = summaries.summarize_answers(items, ["score"]).set_index("setting")
    assert summary.loc["a", ["value", "low", "high", "n"]].tolist() == [50, 50, 50, 3] and summary.loc["b", "n"] == 4
    found = summaries.change(items, "score", "a", "b")
    assert found == Estimate(0, 0, 0, n=3) and summaries.direction(found) == "no change shown"


def test_schedules_are_not_said_to_score_no_lower_where_nothing_is_scored():
    names = ["linear, 4 forwards", "cosine, 4 forwards"]
    for score, words in ((np.nan, NOT_MEASURED), (50.0, "and no lower score shown")):
        items = asked(names, score)
        assert words in repetition_study.schedule_verdict(items, [4])
        assert ("no lower score" in repetition_study.schedule_verdict(items, [4])) == (score == 50)
        assert (NOT_MEASURED in repetition_study.schedule_table(items, [4]).to_csv()) == (score != 50)


def test_the_starts_are_not_compared_by_what_they_were_not_scored_by():
    rows = [
        {"condition": arm.name, "seed": seed, "id": i, "adjacent_duplicates": 9.0 * k}
        for (k, arm), seed, i in itertools.product(enumerate(init.ARMS), (0, 1), range(4))
    ]
    items = pd.DataFrame(rows).reindex(columns=["condition", "seed", "id", *init.METRICS])
    lines = init.conclusion(init.differences(items)).split("\n")
    assert [f": {NOT_MEASURED};" in line for line in lines] == [True, True, False, False]
    assert ": appears;" in lines[2]
    assert init.table4(summaries.summarize(items, list(init.METRICS))).loc[0, "findings F1 (%) (ours)"] == NOT_MEASURED


def test_neither_lora_nor_full_wins_without_a_score():
    arms = itertools.product((lora_study.FULL, "LoRA r = 2"), (64, 512), (0, 1), range(4))
    items = pd.DataFrame(arms, columns=["arm", "size", "seed", "id"]).assign(score=np.nan)
    said = lora_study.conclusion(lora_study.gaps(items))
    assert "appear" not in said and said.count(NOT_MEASURED) == 2 * 3 + 2


@pytest.mark.slow
def test_a_diverged_adaptation_has_no_effect_that_could_be_better_or_worse():
    plan = SMOKE.adaptation
    rows = [
        {"condition": arm, "seed": 0, "id": f"text {i}", "adjacent_duplicates": 1.0, "cross_entropy": np.nan}
        | dict(zip(adaptation.FACTORS, arm.split(", "), strict=True))
        for arm, i in itertools.product(adaptation.arms_of(plan), range(4))
    ]
    said = adaptation.conclusion(adaptation.effects(pd.DataFrame(rows))).split("\n")
    assert [NOT_MEASURED in line for line in said] == [True, False] * 3
    assert NOT_MEASURED in set(
        adaptation.arm_table(pd.DataFrame(rows), [Document("a text")])[adaptation.METRICS["cross_entropy"]]
    )


def test_a_stage_is_no_gain_over_texts_that_nobody_scored():
    judged = pd.DataFrame([("a", 0, "f1", np.nan), ("b", 0, "f1", np.nan)], columns=["system", "id", "metric", "score"])
    assert stages.difference(judged, "a", "b").endswith(NOT_MEASURED)
    assert summaries.summarize_scores(judged)["n"].tolist() == [0, 0]


def test_a_table_of_conversations_says_which_scores_are_not_there():
    items = pd.DataFrame({"system": "ours", "type": ["conversation", "description"], "domain": ["ct", "mri"]})
    table = conversation.table1(items.assign(score=np.nan, words=5.0))
    assert table["overall"].iloc[0] == NOT_MEASURED and table["overall"].iloc[1] == "0"


def test_a_table_of_conversations_says_where_its_systems_have_unlike_numbers_of_scores():
    items = pd.DataFrame({"system": ["a", "a", "b", "b"], "type": "conversation", "domain": "ct", "words": 5.0})
    table = conversation.table1(items.assign(score=[50.0, 50.0, 50.0, np.nan]))
    assert table[table["source"] == "ours: questions"]["overall"].tolist() == ["1 to 2"]


def test_a_text_about_a_real_image_is_scored_by_the_words_of_the_reference():
    real = replace(
        description_set("test", 1)[0], turns=(Turn("user", "What?"), Turn("assistant", "pleural effusion left lung"))
    )
    real = replace(real, meta={})
    assert text_scores("effusion", real) == {"precision": 100, "recall": 25, "f1": 40}
    assert text_scores(real.answer, real)["f1"] == 100 and text_scores("", real)["f1"] == 0
    assert scored_by([real]) == "words of the reference" and scored_by(description_set("test", 2)) == "facts"


def test_samplers_are_neither_better_nor_worse_by_a_score_that_nobody_gave():
    written = description_set("test", 2)
    known, config = quality.chosen([quality.BASE, quality.OURS]), SamplerConfig(8, 8, 8)
    items = quality.model_quality(known, Answerer(model(), processor()), written, config, [4])
    items.loc[items["metric"] == "f1", "score"] = np.nan
    (told,) = quality.verdicts(quality.against(items), keeps="f1")
    assert told.endswith(f"gap {NOT_MEASURED} ({NOT_MEASURED}), n = 0") and "longest run" in told
    points = quality.quality_points({"model": (quality.summarize_quality(items), "f1")})
    assert not points[points["metric"] == "f1"]["front"].any()
    assert quality.on_front(points, ["f1"]) == f"model, f1: {NOT_MEASURED}"
    items.loc[items["metric"] == "adjacent_duplicates", "score"] = 0.0
    assert "0.00 -> 0.00 % (nothing to halve)" in quality.verdicts(quality.against(items), keeps="f1")[0]


@pytest.mark.slow
def test_what_was_not_measured_is_a_gap_of_the_result(tmp_path):
    run = Run(Node("toy", "toy.ipynb", "A toy", results=("table5",)), SMOKE, 0, tmp_path)
    for frame, gaps in (
        (pd.DataFrame({"words": [3.0], "score": [np.nan]}), ["score: not measured"]),
        (pd.DataFrame({"score [95 %]": [NOT_MEASURED, "5 [4, 6]"], "n": 1}), ["score [95 %]: not measured"]),
        (pd.DataFrame({"metric": ["score", "words"], "value": [np.nan, 1]}), ["score: not measured"]),
        (pd.DataFrame({"score": [np.nan, 1.0]}), []),
    ):
        run.figure(figures.new_figure()[0], "table5", frame)
        about = pd.read_json(tmp_path / "figures" / "table5.json", typ="series")["about"]
        assert about["gaps"] == gaps


def test_an_empty_panel_says_why_it_is_empty():
    rows = {"z": [1, 2], "metric": "score", "value": np.nan, "low": np.nan, "high": np.nan}
    (axes,) = setting_curves(pd.DataFrame(rows), "z", xlabel="Z", names={"score": "facts"}).axes
    assert [text.get_text() for text in axes.texts] == [NOT_MEASURED]
