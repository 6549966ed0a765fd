"""The tutorials: what they say is in order, and what they call tells a model that looks from one that does not."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import model, processor, shape

from medv.companion.figures import lessons, words
from medv.companion.studies import sizes
from medv.companion.studies import training_stages as stages
from medv.companion.studies.summaries import summarize_scores
from medv.companion.studies.vqa_study import sampler_config
from medv.diffusion.config import SamplerConfig
from medv.phantoms.pictures import phantom_scene
from medv.phantoms.sets import description_set, vqa_set
from medv.profiles import SamplerSpec, get_profile
from medv.training.examples import PHANTOMS

NOTEBOOKS = sorted(path.name[:2] for path in (Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def profile():
    """The tests' profile with the shape of the test model."""
    smoke = get_profile("smoke")
    tiny_stages = {name: replace(recipe, samples=16) for name, recipe in smoke.stages.items()}
    return replace(smoke, model=shape(), stages=tiny_stages, seeds=(0, 1), answer=SamplerSpec(8, 8, 8))


def test_true_descriptions_score_far_above_the_same_texts_about_other_images():
    examples = description_set("test", 30)
    judged = stages.judge_texts("truth", [example.answer for example in examples], examples)
    summary = summarize_scores(judged).set_index(["system", "metric"])["value"]
    assert summary["truth", "f1"] > 95
    assert summary["truth, wrong image", "f1"] < 60
    assert "a gain" in stages.difference(judged, "truth", "truth, wrong image")


@pytest.mark.slow
def test_a_seed_that_is_finished_is_not_trained_again(tmp_path, profile):
    start, folder = tmp_path / "start", tmp_path / "stage3"
    model().save_pretrained(start)
    processor().save_pretrained(start)
    sets = [stages.QuestionSet.read(profile, PHANTOMS)]
    first = stages.train_seeds(sets, folder, start)
    assert list(first["seed"]) == [0, 1] and "took" in stages.training_time(first)
    weights = {seed: (folder / f"seed{seed}" / "model.safetensors") for seed in (0, 1)}
    assert weights[0].read_bytes() != weights[1].read_bytes()
    assert not list(folder.rglob("checkpoints"))
    times = {seed: path.stat().st_mtime_ns for seed, path in weights.items()}
    again = stages.train_seeds(sets, folder, start)
    assert {seed: path.stat().st_mtime_ns for seed, path in weights.items()} == times
    assert "unknown" in stages.training_time(again)
    assert (folder / "model.safetensors").read_bytes() == weights[0].read_bytes()


def items(right: dict[str, float]) -> pd.DataFrame:
    """A made-up study: each condition right with some probability, over two seeds and 40 closed and 40 open questions."""
    rng, rows = np.random.default_rng(0), []
    for condition, share in right.items():
        for seed in (0, 1):
            for number in range(80):
                hit, closed = 100.0 * (rng.random() < share), number < 40
                row = {"test": "set", "condition": condition, "seed": seed, "id": f"q{number}", "kind": "side"}
                row |= {"answer_type": "CLOSED" if closed else "OPEN", "question": "?", "reference": "r", "answer": "a"}
                for metric in ("closed_accuracy", "closed_strict_accuracy"):
                    row[metric] = hit if closed else np.nan
                for metric in ("open_recall", "open_set_recall", "open_precision", "open_f1"):
                    row[metric] = np.nan if closed else hit
                rows.append(row | {"seconds": 0.1})
    return pd.DataFrame(rows)


@pytest.mark.slow
def test_the_margin_is_measured_from_the_best_control_and_never_from_the_model_before():
    study = items({stages.BEFORE: 0.99, "shuffled images": 0.3, "question only": 0.5, stages.AFTER: 0.9})
    summary = stages.scores(study)
    assert next(iter(summary["condition"])) == stages.AFTER
    margins = stages.margins(summary)
    assert set(margins["best control"]) == {"question only"}
    assert (margins["margin"] > 20).all()
    table = stages.score_table(summary)
    assert table["seeds"].tolist() == [2] * 4 and table["n closed"].tolist() == [40] * 4
    assert table.set_index("system")["s per question"].isna().to_dict()["question only"]
    chosen = lessons.chosen_answers(study, "set", count=10)
    assert chosen["right"].sum() == 10 - (~chosen["right"]).sum() and len(chosen) == 10
    assert stages.by_kind(study).shape == (1, 4)


def test_long_answers_get_a_longer_canvas_in_training_and_in_answering(profile):
    short = vqa_set("train", 8)
    roomy = replace(profile, answer=SamplerSpec(64, 64, 64))
    assert stages.fit_answers(roomy, processor(), short) == roomy
    long = stages.fit_answers(profile, processor(), description_set("train", 8))
    assert long.answer.gen_length > 8 and long.answer.gen_length % 8 == 0
    assert long.stages["vqa"].padding == f"fixed:{long.answer.gen_length}"


def test_real_data_without_a_folder_are_refused_in_words(profile):
    with pytest.raises(ValueError, match="set data_dir"):
        stages.question_sets(profile, "vqa_rad", None)


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_settings_that_the_notebooks_suggest_fit_the_canvas(root, name):
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((root / "notebooks").glob("*.ipynb")))
    suggested = re.findall(r"`dataclasses\.(replace\(spec, [^`]+\))`", text)
    assert len(suggested) >= 3
    for call in suggested:
        sampler_config(eval(call, {"replace": replace, "spec": get_profile(name).describe}))


def test_the_look_up_of_closed_questions_stands_at_chance():
    table = lessons.question_balance(vqa_set("train", 560), vqa_set("test", 280)).set_index(["form", "kind"])
    assert table.loc[("closed", "all"), "answer is yes (%)"] == 50
    assert abs(table.loc[("closed", "all"), "question-only look-up (%)"] - 50) < 6


def test_table_8_without_files_claims_no_count_and_names_the_misprint():
    table = lessons.table8({}, {"test": vqa_set("test", 28)})
    real = table[table["data"] != "phantoms"]
    assert len(real) == 8 and real["images (ours)"].isna().all()
    assert real["remark"].str.startswith("not counted in this run").all()
    wrong = real[real["remark"].str.contains("832")]
    assert wrong[["data", "split"]].to_numpy().tolist() == [["pathvqa", "val"]]


def test_the_states_of_a_canvas_end_with_the_answer_and_write_each_token_once():
    network, reader = model(), processor()
    scene = phantom_scene("test", 0)
    example = lessons.questions_about(scene, image_size=32)[0]
    inputs = reader(images=example.image(), text=example.question)
    trace = network.generate(**inputs, config=SamplerConfig(16, 8, 16, stop_tokens=())).trace
    states = words.canvas_states(trace, reader, 16, (4, 8, 16))
    assert [sum(masked) for _, _, masked, _ in states] == [12, 8, 0]
    written = np.array([fresh for *_, fresh in states])
    assert (written.sum(axis=0) == 1).all()
    fig = words.canvas_figure(example.image(), "a $ in a question", states)
    fig.canvas.draw()


def test_masks_grow_with_time_and_the_question_stays():
    rows, frame = lessons.corruption_rows(processor(), "What is shown?", "a small mass", (0.1, 0.5, 1.0), seed=1)
    hidden = np.array([masked for _, _, masked in rows])
    assert (hidden[:-1] <= hidden[1:]).all() and frame[frame["part"] == "prompt"]["masked"].sum() == 0
    assert frame[(frame["t"] == 1) & (frame["part"] == "response")]["masked"].all()


def test_sizes_are_those_of_the_released_towers_and_memory_is_plain_arithmetic():
    paper = get_profile("paper")
    counts = sizes.parameter_counts({"paper": paper.model}).set_index("part")["paper"]
    assert counts["language tower"] == 8_015_581_184
    cost = sizes.stage_memory(paper).set_index("stage")
    trained = counts["projector"] + counts["language tower"]
    assert cost.loc["align", "trainable"] == counts["projector"]
    assert cost.loc["instruct", "sum (GB)"] == pytest.approx((2 * counts["all"] + 14 * trained) / 1e9)
    assert list(sizes.recipe_table(paper)["setting"])[:2] == ["vision_tower", "language_tower"]


def test_reach_is_full_for_this_model_and_a_triangle_for_a_causal_one():
    network, ids = model(), torch.arange(20, 27)
    assert sizes.reach(network, ids).all()
    network.model.language_model.config.is_causal = True
    assert np.array_equal(sizes.reach(network, ids), np.tril(np.ones((7, 7), dtype=bool)))


def test_the_noise_of_a_loss_repeats_and_leaves_the_model_as_it_was():
    network, examples = model(), vqa_set("validation", 4, image_size=32)
    own = network.config.loss_normalization
    first = lessons.loss_noise(network, processor(), examples, draws=2, seed=5)
    pd.testing.assert_frame_equal(first, lessons.loss_noise(network, processor(), examples, draws=2, seed=5))
    assert network.config.loss_normalization == own
    assert set(lessons.loss_spread(first)["normalization"]) == set(first["normalization"])
