"""Less repetition and the worth of confidence: what the studies of notebooks 34 and 43 measure is what is there."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import model, processor

from medv.companion.studies import confidence as worth
from medv.companion.studies import generation
from medv.companion.studies import less_repetition as study
from medv.companion.studies.training_stages import QuestionSet
from medv.diffusion.config import SamplerConfig
from medv.diffusion.sampler import sample
from medv.evaluation.answering import Answerer
from medv.phantoms.sets import description_set, vqa_set
from medv.profiles import get_profile
from medv.training.examples import PHANTOMS, TrainingData

CONFIG = SamplerConfig(16, 16, 4, stop_tokens=())


@pytest.fixture(scope="module")
def answerer():
    return Answerer(model().eval(), processor())


def ids(answerer):
    return {"mask_token_id": answerer.model.config.mask_token_id, "fill_token_id": answerer.model.config.fill_token_id}


@pytest.mark.parametrize("make", [study.Calibrated, study.DependenceAware])
def test_without_strength_the_watched_schedules_are_algorithm_1(answerer, make):
    examples = description_set("validation", 3, image_size=answerer.model.config.vision_config.image_size)
    config = answerer.model.settings(CONFIG)
    expected = answerer.model.generate(**answerer.inputs(examples), config=config, reference=True).sequences
    answerer.model.set_attn_implementation("eager")
    watched = study.Watched(answerer, examples, attention=True)
    found = sample(watched, watched.inputs["input_ids"], replace(config, schedule=make(watched, 0.0)), **ids(answerer))
    answerer.model.set_attn_implementation("sdpa")
    assert torch.equal(found.sequences, expected)
    assert torch.allclose(watched.prior.exp().sum(dim=-1), torch.ones(3, 16), atol=1e-5)
    assert (watched.attention > 0).all() and (watched.attention.sum(dim=-1) < 1).all(), "the rest attends to the prompt"


def test_without_decay_the_soft_window_is_algorithm_1_and_a_steep_one_writes_from_left_to_right(answerer):
    examples = description_set("validation", 2, image_size=answerer.model.config.vision_config.image_size)
    inputs, settings = answerer.inputs(examples), answerer.model.settings(replace(CONFIG, steps=16))
    plain = answerer.model.generate(**inputs, config=settings).sequences
    flat = answerer.model.generate(**inputs, config=replace(settings, schedule=study.SoftWindow(0.0))).sequences
    assert torch.equal(flat, plain)
    steep = answerer.model.generate(**inputs, config=replace(settings, schedule=study.SoftWindow(1e6)))
    assert [event.position for event in steep.trace.of_row(0).commits] == list(range(16))


def test_a_target_is_met_missed_or_not_measured():
    rows = [("linear", 8, 90.0, 10.0, 4.0), (study.OURS, 8, 89.0, 5.0, 3.0)]
    points = pd.DataFrame(rows, columns=["way", "steps", "score", "repeated_share", "adjacent_duplicates"]).assign(n=30)
    points[["score_gap", "score_low", "score_high"]] = [-1.0, -1.9, 0.1]
    said = study.targets(points)
    assert "repeated words 10.00 -> 5.00 % (halved)" in said and "adjacent duplicates 4.00 -> 3.00 % (not halved)" in said
    assert ": kept within 2 points;" in said
    assert "not shown to be kept" in study.targets(points.assign(score_low=-2.1))
    assert ": not measured;" in study.targets(points.assign(score_gap=np.nan, score_low=np.nan, score_high=np.nan))


def test_the_answers_taken_over_are_those_that_would_have_been_asked(answerer, tmp_path):
    profile, size = get_profile("smoke"), answerer.model.config.vision_config.image_size
    asked = {0: description_set("test", 2, image_size=size)}
    plain = generation.plain_configs(generation.table5_settings(profile), profile.describe)
    configs = {name: config for name, config in study.main_configs(profile).items() if config in plain.values()}
    assert len(configs) > 1
    generation.ask_model(answerer, plain, asked, tmp_path / "32")
    study.keep_answers(tmp_path / "32", profile, configs, tmp_path / "kept")
    before = {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()}
    kept, anew = (generation.ask_model(answerer, configs, asked, tmp_path / folder) for folder in ("kept", "anew"))
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()}, "nothing is asked again"
    pd.testing.assert_frame_equal(kept.drop(columns="seconds"), anew.drop(columns="seconds"))


# --- Confidence ---


def slow_ece(confidence, right):
    gap = 0.0
    for number in range(worth.BINS):
        inside = [
            i
            for i, c in enumerate(confidence)
            if number <= c * worth.BINS < number + 1 or (c == 1 and number == worth.BINS - 1)
        ]
        if inside:
            said, good = (np.mean([values[i] for i in inside]) for values in (confidence, right))
            gap += len(inside) / len(confidence) * abs(said - good)
    return 100 * gap


def slow_auroc(confidence, right):
    pairs = [
        (c, d)
        for c, good in zip(confidence, right, strict=True)
        if good
        for d, b in zip(confidence, right, strict=True)
        if not b
    ]
    return 100 * np.mean([1.0 if c > d else 0.5 if c == d else 0.0 for c, d in pairs])


def test_ece_and_auroc_equal_their_definitions_and_weights_are_repeated_rows():
    rng = np.random.default_rng(0)
    confidence = np.append(rng.random(60).round(1), 1.0)
    right = rng.random(61) < confidence
    assert worth.ece(confidence, right) == pytest.approx(slow_ece(confidence, right))
    assert worth.auroc(confidence, right) == pytest.approx(slow_auroc(confidence, right))
    weights = rng.integers(0, 3, size=61)
    for measure in (worth.ece, worth.auroc):
        repeated = measure(np.repeat(confidence, weights), np.repeat(right, weights))
        assert measure(confidence, right, weights) == pytest.approx(repeated)
    assert np.isnan(worth.auroc(confidence, np.ones(61, bool))), "without a wrong answer there is no order to judge"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_fit_finds_the_temperature_that_made_the_confidences_wrong(temperature):
    rng = np.random.default_rng(1)
    true = rng.random(20_000)
    right = rng.random(20_000) < true
    said = worth.scaled(true, 1 / temperature)  # over-confident for T > 1
    found = worth.fit_temperature(said, right)
    assert found == pytest.approx(temperature, rel=0.05)
    assert worth.ece(worth.scaled(said, found), right) < 2
    assert temperature == 1 or worth.ece(said, right) > 5
    assert worth.auroc(worth.scaled(said, found), right) == pytest.approx(worth.auroc(said, right))


@pytest.mark.parametrize(("right", "end"), [(True, 0.1), (False, 100)])
def test_a_fit_that_ends_at_an_end_of_its_search_says_so(right, end):
    with pytest.warns(UserWarning, match=f"the fit to 5 answers ends at {end}, an end of the search"):
        assert worth.fit_temperature(np.full(5, 0.9), np.full(5, right)) == pytest.approx(end)


def test_confidences_that_are_right_have_the_ece_of_calibrated_ones_and_others_more():
    rng = np.random.default_rng(3)
    confidence = rng.random(3000) ** 0.2
    natural, most = worth.calibrated_ece(confidence)
    assert 0 < natural < most < 4
    assert worth.ece(confidence, rng.random(3000) < confidence) <= most
    assert worth.ece(confidence, rng.random(3000) < confidence**2) > most


def test_confidence_is_the_product_over_the_tokens_and_the_fit_never_sees_what_it_is_judged_on(answerer, tmp_path):
    tiny = get_profile("smoke")
    size = answerer.model.config.vision_config.image_size
    profile = replace(tiny, model=replace(tiny.model, image_size=size), evaluation_questions=6)
    answerer.model.save_pretrained(tmp_path / "model")
    answerer.processor.save_pretrained(tmp_path / "model")
    test = vqa_set("test", 6, image_size=size)
    seen = worth.observe(QuestionSet(PHANTOMS, profile, [], {"phantoms": test}), tmp_path / "model")
    answers = seen[(seen["unit"] == worth.ANSWERS) & (seen["steps"] == 8)]
    tokens = seen[(seen["unit"] == worth.TOKENS) & (seen["steps"] == 8)]
    product = tokens.groupby(["part", "id"])["confidence"].prod()
    pd.testing.assert_series_equal(answers.set_index(["part", "id"])["confidence"].sort_index(), product, check_names=False)
    parts = seen.groupby("part")["id"].agg(set)
    assert parts.index.tolist() == ["fit", "test"] and not parts["fit"] & parts["test"]
    real = QuestionSet(TrainingData("vqa_rad", tmp_path), profile, [], {"vqa_rad": test})
    halves = worth.observe(real, tmp_path / "model").groupby("part")["id"].agg(set)
    assert halves.index.tolist() == ["first half", "second half"] and not halves.iloc[0] & halves.iloc[1]
    calibrated = worth.calibrate(seen)
    assert set(calibrated["part"]) == {"test"} and calibrated["fitted"].between(0, 1).all()


def test_a_warning_touches_the_asked_share_of_right_answers_and_catches_the_unsure_errors():
    rng = np.random.default_rng(2)
    right = rng.random(4000) < 0.8
    confidence = np.where(right, rng.uniform(0.5, 1, 4000), rng.uniform(0, 0.5, 4000))
    part = np.where(np.arange(4000) % 2, "test", "fit")
    frame = pd.DataFrame({"confidence": confidence, "right": right, "part": part, "kind": "side"})
    frame = frame.assign(unit=worth.ANSWERS, steps=8, id=np.arange(4000).astype(str))
    found = worth.warnings(frame, 8).set_index("kind")
    assert found.loc["all", "right, warned (%)"] == pytest.approx(10, abs=3)
    assert found.loc["side", "wrong, warned (%)"] == 100
    none = worth.warnings(frame.assign(right=right & (part == "test")), 8)
    assert none[["wrong, warned (%)", "right, warned (%)"]].isna().all(axis=None), "no right answer sets no limit"
