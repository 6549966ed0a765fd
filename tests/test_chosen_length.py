"""Notebook 22: ways at equal forwards, a threshold from validation items, and sentences that follow from the answers."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny import model, processor, shape

from medv.companion.figures.studies import length_figure
from medv.companion.studies import chosen_length as study
from medv.companion.studies.generation import METRICS
from medv.evaluation.answering import Answerer
from medv.intervals import NOT_MEASURED
from medv.phantoms.sets import description_set
from medv.profiles import get_profile

TINY = get_profile("tiny")


def answers(values: dict[tuple[str, str], tuple[float, float, float]], count: int = 40) -> pd.DataFrame:
    """Made-up answers: (arm, way) -> length error, repeated words, score, each with a little spread from image to image."""
    rng = np.random.default_rng(0)
    rows = []
    for (arm, way), (error, repeated, score) in values.items():
        for seed in (0, 1):
            for number in range(count):
                wave = {"repeated_share": repeated + rng.normal(0, 0.2), "length_error": error + rng.normal(0, 1)}
                row = dict.fromkeys(METRICS, 1.0) | wave | {"score": score + rng.normal(0, 1), "id": f"{seed}/{number}"}
                rows.append({"arm": arm, "way": way, "seed": seed, **row})
    return pd.DataFrame(rows).assign(setting=lambda frame: frame["arm"] + ": " + frame["way"])


GOOD = {
    (study.WITH, study.FIXED): (40, 20, 70),
    (study.WITH, study.FULL): (40, 30, 72),
    (study.WITH, study.STOP): (90, 1, 20),
    (study.WITH, study.CHOSEN): (12, 8, 71),
    (study.WITH, study.VETO): (12, 4, 60),
}


@pytest.mark.parametrize("profile", ["tiny", "small", "paper", "smoke"])
def test_the_ways_take_the_same_forwards_and_the_longest_canvas_is_that_of_the_padding(profile):
    for trial in study.trials_of(get_profile(profile)).values():
        ways = study.ways_of(trial, 0.5)
        spent = {name: config.steps + (config.length is not None) for name, config in ways.items()}
        assert len({count for name, count in spent.items() if name != study.FULL}) == 1
        assert spent[study.FULL] == trial.canvas == ways[study.FIXED].min_length
        assert trial.padding in (None, "none", f"fixed:{ways[study.CHOSEN].gen_length}")
    assert set(study.trials_of(TINY)) == {"none", "padded"} and set(study.trials_of(get_profile("paper"))) == {"model"}


def test_the_threshold_is_the_one_whose_lengths_are_nearest(monkeypatch):
    profile = replace(TINY, model=shape(), evaluation_descriptions=6)
    built = model()
    answerer, trial = Answerer(built, processor()), study.LengthTrial(study.WITH, None, 0, 64, 120)
    true = [len(processor().tokenizer.encode(e.answer, add_special_tokens=False)) for e in description_set("validation", 6)]

    def answer(examples, config, quiet):
        off = abs(config.length.threshold - 0.4)
        return [type("Short", (), {"tokens": round(length * (1 + off))}) for length in true]

    monkeypatch.setattr(answerer, "answer", answer)
    assert study.threshold_for(answerer, trial, profile) == 0.4


def test_the_sentences_say_what_was_reached_and_what_not():
    known = {"repeated words of the references": 5.8}
    said = study.verdict(answers(GOOD), known).splitlines()
    first, second = ([line.rpartition(": ")[2] for line in said[start : start + 6]] for start in (0, 6))
    assert first == ["reached", "smaller", "not reached", "reached", "not reached", "reached"]
    assert second == ["reached", "smaller", "reached", "not reached", "reached", "not reached"]
    assert (
        "of 20.0 %, ratio 0.40" in said[2] and "n = 80" in said[0] and "5.8 %" in said[-1] and "chosen length +2.2" in said[-2]
    )
    worse = GOOD | {(study.WITH, study.CHOSEN): (16, 8, 71), (study.WITH, study.FIXED): (16, 20, 70)}
    told = study.verdict(answers(worse), known).splitlines()
    assert told[0].endswith(": not reached") and told[1].endswith("n = 80: no difference is shown")


def test_without_arms_and_scores_it_says_so():
    one = {(study.ALONE, way): (e, r, np.nan) for (_, way), (e, r, _) in GOOD.items()}
    said = study.verdict(answers(one), {})
    assert said.startswith(f"the two arms of stage 2 are {NOT_MEASURED}") and said.count(f"not below -2: {NOT_MEASURED}") == 4
    assert study.length_table(study.measures(answers(one)), "score")["score"].tolist() == [NOT_MEASURED] * 5


def test_a_share_of_no_repetition_is_not_reached_by_having_none():
    said = study.verdict(answers(GOOD).assign(repeated_share=0.0), {})
    assert said.count("0.0 of 0.0 %") == said.count(": nothing to lower") == 4


def test_a_row_of_the_table_is_the_median_and_the_means_of_its_answers():
    items = answers(GOOD)
    found = study.measures(items).set_index("way")
    for way, part in items.groupby("way"):
        row = found.loc[way]
        below, above = sorted(part["length_error"])[39:41]
        assert below <= row["error"].value <= above
        assert row["repeated"].value == pytest.approx(part["repeated_share"].mean()) and row["n"] == 80
        assert row["error"].low <= row["error"].value <= row["error"].high
    fig = length_figure(study.points_of(study.measures(items)), "title", asked=15, level=5.8)
    assert len(fig.axes[0].containers) == 5 and fig.axes[0].get_xscale() == "log"


def test_references_differ_from_each_other_even_for_the_same_phantom():
    known = study.levels(description_set("test", 60))
    assert 2 < known["another description of the same phantom"] < 25 and known["repeated words of the references"] > 1
    assert 2 < known["always the median length"] < 25


def test_the_arms_are_trained_and_asked_once(tmp_path):
    start = tmp_path / "start"
    model().save_pretrained(start)
    processor().save_pretrained(start)
    smoke = get_profile("smoke")
    profile = replace(smoke, model=shape(), evaluation_descriptions=3)
    items = study.compare_lengths(profile, start, tmp_path / "trials")
    assert set(items["arm"]) == {study.WITH, study.WITHOUT} and items["way"].nunique() == 5
    assert items[items["arm"] == study.WITH]["threshold"].isin(study.THRESHOLDS).all() and items["length_error"].ge(0).all()
    again = study.compare_lengths(replace(profile, seeds=(0,)), start / "nowhere", tmp_path / "trials")
    pd.testing.assert_frame_equal(items, again)
