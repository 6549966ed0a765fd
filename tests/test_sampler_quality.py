"""Samplers judged at equal forwards: what is measured is what was written, and the adaptive schedule earns its place."""

import pandas as pd
import pytest
import torch
from tiny import model, processor

from medv.companion.bench.sampler import PRESETS, BenchResult, Measurement
from medv.companion.figures import studies
from medv.companion.studies import fast_sampling as quality
from medv.companion.studies.fast_sampling import on_front, oracle_strategies, quality_points, speed_table
from medv.companion.studies.markov import word_chain
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.phantoms.sets import description_set
from medv.profiles import get_profile

CONFIG = SamplerConfig(32, 16, 32)
EQUAL = (quality.BASE, "fixed + veto", "adaptive", quality.OURS)


@pytest.fixture(scope="module")
def items():
    return quality.oracle_quality(quality.chosen(EQUAL), CONFIG, [4, 8], texts=32, seeds=(0,))


def test_every_schedule_is_there_bare_and_filtered_and_an_unknown_name_is_refused_in_words():
    known = quality.strategies()
    for name in quality.SCHEDULES:
        assert {name, f"{name} + veto", f"{name} + spacing + veto"} <= set(known)
    assert len({str(strategy) for strategy in known.values()}) == len(known) and set(oracle_strategies()) <= set(known)
    with pytest.raises(ValueError, match="unknown strategy fast: use fixed"):
        quality.chosen(["fixed", "fast"])


def test_budgets_are_multiples_of_the_blocks():
    assert quality.budgets(SamplerConfig(72, 24, 72)) == [9, 18, 36]
    assert quality.budgets(SamplerConfig(128, 64, 128)) == [16, 32, 64]
    assert quality.budgets(SamplerConfig(16, 4, 16)) == [4, 8]


def test_equal_budgets_are_spent_equally(items):
    spent = items[(items["metric"] == "forwards") & (items["strategy"] != quality.TEXT)]
    assert (spent["score"] == spent["steps"]).all()


def test_the_adaptive_schedule_with_the_veto_repeats_less_and_is_likelier(items):
    compared = quality.against(items)
    for _, part in compared.groupby("steps"):
        by = part.set_index("metric")
        assert by.loc["adjacent_duplicates", "base"] > 0
        assert by.loc["adjacent_duplicates", "ratio"] < 1
        assert by.loc["log_likelihood", "gap"] > 0
    told = quality.verdicts(compared, keeps="log_likelihood")
    assert len(told) == 2 and not any("(worse)" in line for line in told)


@pytest.mark.slow
def test_a_strategy_beside_itself_shows_no_difference(items):
    twin = items[items["strategy"] == quality.BASE]
    both = pd.concat([twin, twin.assign(strategy="twin")])
    compared = quality.against(both, "twin")
    assert (compared["gap"] == 0).all() and (compared["low"] == 0).all() and (compared["high"] == 0).all()


def test_bigrams_of_a_long_draw_are_near_the_chain_and_shuffled_ones_are_not():
    chain = word_chain(24)
    text = chain.draw(16, 400)
    near = quality.bigram_distance(chain, text)
    shuffled = text[:, torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    assert near < 0.15 < 0.4 < quality.bigram_distance(chain, shuffled)


def test_reference_descriptions_state_every_fact_and_a_models_are_judged_on_the_same_phantoms():
    examples = description_set("test", 3, image_size=32)
    config = SamplerConfig(8, 4, 8)
    known = quality.chosen([quality.BASE, quality.OURS])
    judged = quality.model_quality(known, Answerer(model(), processor()), examples, config, [2, 4])
    assert judged[(judged["strategy"] == quality.TEXT) & (judged["metric"] == "f1")]["score"].mean() > 95
    assert set(judged["unit"]) == {example.id for example in examples}
    assert len(judged) == (1 + 2 * 2) * 3 * judged["metric"].nunique()


def test_the_front_holds_what_nothing_cheaper_beats():
    points = pd.DataFrame({"forwards": [4, 4, 8, 8, 16], "value": [1.0, 2.0, 1.5, 3.0, 3.0]})
    assert quality.front(points, "forwards", "value").tolist() == [False, True, False, True, False]


def test_the_front_of_repetition_is_its_lower_edge_and_the_figures_draw(items):
    points = quality_points({"oracle": (quality.summarize_quality(items, resamples=20), "log_likelihood")})
    least = points[points["metric"] == "adjacent_duplicates"].groupby("forwards")["value"].transform("min")
    repeats = points[points["metric"] == "adjacent_duplicates"]
    assert (repeats[repeats["front"]]["value"] == least[repeats["front"]]).all()
    assert "oracle, log_likelihood: " in on_front(points, ["log_likelihood"])
    studies.pareto_figure(points, "test").canvas.draw()
    row = {"kind": "prefix", "identity": 1.0, "first_divergence": 4.0, "kl": 0.0}
    frame = pd.DataFrame([row | {"interval": 1}, row | {"interval": None}]).astype({"interval": "Int64"})
    labels = [text.get_text() for text in studies.cache_figure(frame, "test").axes[0].get_xticklabels()]
    assert labels == ["1", "block\nstart"]


def test_the_speed_table_tells_what_was_timed_and_what_is_not_known():
    cut = Measurement("official", 1.0, 8.0, 8, measured_forwards=2, agreement=1.0)
    found = [cut, Measurement("dual", 1.0, 8.0, 8, refreshes=2)]
    result = BenchResult("here", 1, PRESETS["cpu"], 0, 1.0, 0.5, found)
    table = speed_table(result)
    assert table["timed"].tolist() == [2, 8] and table["full forwards"].tolist() == [8, 2]
    assert table["same commits (%)"].isna().tolist() == [False, True]


def test_a_notebook_for_the_tests_measures_less():
    smoke, tiny = (get_profile(name).fast for name in ("smoke", "tiny"))
    assert smoke.texts < tiny.texts and smoke.descriptions < tiny.descriptions
