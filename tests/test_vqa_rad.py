"""VQA-RAD at small: what its blind controls reach, which rows a protocol lets a training see, and images looked at once.

The real data are in MEDV_SHARED (default: ../shared beside the repository); without them their tests are skipped.
"""

import importlib.util
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import examples, model, processor, special

from medv.companion.audit.controls import blinded, nearest_answers
from medv.companion.studies import training_stages as stages
from medv.companion.studies.trials import as_rows
from medv.companion.studies.vqa_study import CONDITIONS, vqa_study
from medv.data.example import Example, Turn
from medv.data.texts import caption_examples, dialogue_examples
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.evaluation.pairing import Reference
from medv.evaluation.vqa import evaluate_vqa
from medv.model.looks import Looks
from medv.model.modeling import MedVModel
from medv.profiles import StageRecipe, get_profile
from medv.training.collate import Collator, Encoder
from medv.training.examples import SEEN, UNSEEN, TrainingData, in_lower_case, question_split, stage_examples, validation_split
from medv.training.launch import RunOptions
from medv.training.lora import freeze_except
from medv.training.stages import train_stage

DATA = Path(os.environ.get("MEDV_SHARED", Path(__file__).parents[1] / "../shared")) / "data/vqa_rad"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data are not in {DATA}")
SMALL = get_profile("small")
RAD = TrainingData("vqa_rad", DATA)
RECIPE = StageRecipe(("projector", "language_layers"), 0, 1, 2, 1e-3, max_length=100, padding="none", warmup=0.0)


def question(text: str, answer: str, kind: str = "OPEN") -> Example:
    return Example(text, None, (Turn("user", text), Turn("assistant", answer)), kind)


def images(rows) -> set[str]:
    return {row.meta["image"] for row in rows}


# What needs no image.


@pytest.mark.slow
@real
def test_the_nearest_question_reaches_what_was_measured_on_real_data():
    train, asked = question_split(RAD)
    (test,) = asked.values()
    scores = evaluate_vqa([Reference.of(e) for e in test], nearest_answers(train, test))
    found = (scores.closed_accuracy, scores.closed_strict_accuracy, scores.open_set_recall)
    assert tuple(round(value, 1) for value in found) == (60.3, 59.6, 20.7)


def test_the_nearest_question_is_of_the_same_type_and_the_first_of_equals():
    train = [
        question("is the heart large", "yes", "CLOSED"),
        question("which organ is large", "liver"),
        question("which organ is large?", "spleen"),
        question("what is shown here", "chest"),
    ]
    asked = [question("Which organ is it?", ""), question("Is it large?", "", "CLOSED"), question("zebra", "")]
    assert nearest_answers(train, asked) == ["liver", "yes", "liver"]
    with pytest.raises(ValueError, match="no training example has the answer type 'CLOSED'"):
        nearest_answers(train[1:], asked)


# Which rows a training may see.


@pytest.mark.slow
@real
def test_validation_shares_no_image_with_the_training_and_no_row_with_the_test():
    test = images(question_split(RAD)[1]["vqa_rad test"])
    train, held = question_split(replace(RAD, protocol="validation"))
    seen, unseen = (held[f"vqa_rad validation, {name}"] for name in (SEEN, UNSEEN))
    assert not images(unseen) & images([*train, *seen])
    everything = question_split(RAD)[0]
    assert sorted(e.id for e in [*train, *seen, *unseen]) == sorted(e.id for e in everything)
    told = {(e.meta["image"], e.meta["question_type"], e.answer.lower()) for e in train}
    assert not [e for e in seen if (e.meta["image"], e.meta["question_type"], e.answer.lower()) in told]
    assert len(seen) > 150 and len(unseen) > 150 and len(images(unseen) & test) > 10


@pytest.mark.slow
@real
def test_the_image_disjoint_training_knows_no_test_image_and_asks_every_test_question():
    official, asked = question_split(RAD)
    train, disjoint = question_split(replace(RAD, protocol="image_disjoint"))
    (test,), (same) = asked.values(), disjoint[f"vqa_rad test, {UNSEEN}"]
    assert not images(train) & images(test) and [e.id for e in same] == [e.id for e in test]
    assert (len(train), len(official), len(images(official) & images(test))) == (734, 1797, 202)


def test_a_held_out_question_does_not_depend_on_the_others():
    rows = [replace(question(f"q{i}", f"a{i}"), meta={"image": f"i{i % 20}"}) for i in range(200)]
    train, held = validation_split(rows)
    again, held_again = validation_split(rows[::-1][:150])
    assert {e.id for e in again} <= {e.id for e in train}
    assert all({e.id for e in held_again[name]} <= {e.id for e in held[name]} for name in held)


def test_an_unknown_protocol_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown protocol 'all': use one of official, image_disjoint, validation"):
        question_split(TrainingData("vqa_rad", tmp_path, "all"))
    with pytest.raises(ValueError, match="protocol validation is for real data"):
        stage_examples("vqa", get_profile("smoke"), TrainingData(protocol="validation"))


@pytest.mark.slow
@real
def test_captions_and_dialogues_say_what_the_training_questions_say_and_nothing_else():
    profile = get_profile("smoke")
    train, _ = question_split(RAD)
    said = {(e.meta["image"], e.question, e.answer) for e in train}
    dialogues = dialogue_examples(train, copies=2)
    assert len(dialogues) == 2 * 313 and images(dialogues) == images(train)
    for example in dialogues:
        pairs = zip(example.turns[::2], example.turns[1::2], strict=True)
        assert all((example.meta["image"], asked.text, told.text) in said for asked, told in pairs)
    assert dialogues[0].turns != dialogues[1].turns, "another order"
    first = caption_examples(train)[0]
    assert first.answer.startswith("An image of the head. Modality: MRI Diffusion Weighted. Question: ")
    learned, _ = stage_examples("align", profile, RAD)
    assert len(learned) == 2 * 313 + profile.stages["align"].samples, "and phantoms"


def test_answers_in_lower_case_leave_the_questions_as_they_are():
    (made,) = in_lower_case([question("Is it an MRI?", "Yes")])
    assert (made.question, made.answer) == ("Is it an MRI?", "yes")


# Images looked at once.


def test_answers_are_the_same_from_states_that_were_kept(monkeypatch):
    network, asked, config = model(), examples(6), SamplerConfig(6, 6, 3)
    plain = [answer.text for answer in Answerer(network, processor()).answer(asked, config, quiet=True)]
    looks, seen = Looks(processor()), []
    look = MedVModel.look
    monkeypatch.setattr(MedVModel, "look", lambda self, pixels: seen.append(len(pixels)) or look(self, pixels))
    for _ in range(2):
        looks.once(network.model, asked)
        kept = [a.text for a in Answerer(network, processor()).answer(asked, config, looks=looks, quiet=True)]
        assert kept == plain and sum(seen) == 6
    blind = [a.text for a in Answerer(network, processor()).answer(blinded(asked), config, quiet=True)]
    assert blind != plain


def test_a_study_has_the_nearest_question_among_its_conditions():
    asked = [replace(e, answer_type="OPEN") for e in examples(6)]
    items = vqa_study(Answerer(model(), processor()), asked, asked, SamplerConfig(4, 4, 2), quiet=True)
    told = items[items["condition"] == "nearest question"]
    assert len(told) == 6 and told["open_recall"].mean() > items[items["condition"] == "model"]["open_recall"].mean()


# What a recipe of small adds.


@pytest.mark.slow
def test_frozen_embeddings_do_not_move_and_the_layers_do(tmp_path):
    before = {name: value.clone() for name, value in model().state_dict().items()}
    after = train_stage(model(), processor(), RECIPE, examples(4), tmp_path, RunOptions(quiet=True)).state_dict()
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert not [name for name in moved if "embed_tokens" in name or "lm_head" in name or "vision_tower" in name]
    assert any("layers.0" in name for name in moved) and any("projector" in name for name in moved)


@pytest.mark.slow
def test_the_projector_learns_as_much_faster_as_the_recipe_says(tmp_path):
    moved = {}
    for rate in (1.0, 5.0):
        recipe = replace(
            RECIPE, epochs=0.5, learning_rate=1e-5, projector_rate=rate
        )  # one step, and Adam's has the rate's size
        after = train_stage(
            model(), processor(), recipe, examples(4), tmp_path / str(rate), RunOptions(quiet=True)
        ).state_dict()
        for name in ("model.projector.linear_1.weight", "model.language_model.layers.0.mlp.up_proj.weight"):
            moved[name, rate] = float((after[name] - model().state_dict()[name]).abs().max())
    projector, layer = ([moved[name, rate] for rate in (1.0, 5.0)] for name in dict.fromkeys(name for name, _ in moved))
    assert projector[1] / projector[0] == pytest.approx(5, rel=0.05) and layer[1] / layer[0] == pytest.approx(1, rel=0.05)


def test_dropped_channels_are_the_samples_own_and_only_while_training():
    encode, shown = Encoder(processor(), loss_tokens="response", max_length=100), examples(3)
    encode.looks.once(model().model, shown)
    items = [encode(e) | {"noise": (0, 4, i), "stratum": (0, 1)} for i, e in enumerate(shown)]
    thin = Collator(special(), padding="none", feature_dropout=0.5)
    whole, states = Collator(special(), padding="none")(items)["vision_states"], thin(items)["vision_states"]
    gone = (states == 0).all(dim=1)  # [3, D]
    assert 0.2 < gone.float().mean() < 0.8 and not gone[0].equal(gone[1])
    torch.testing.assert_close(states, torch.where(gone[:, None], 0, 2 * whole))
    assert thin(items[1:])["vision_states"].equal(states[1:]), "whatever the companions"
    held = [item | {"noise": (0, -1, 0)} for item in items]
    assert thin(held)["vision_states"].equal(whole)
    halves = [item | {"vision_states": item["vision_states"].half()} for item in items]
    assert thin(halves)["vision_states"].dtype == torch.float16, "of the kind, and on the device, that the states have"
    with pytest.raises(ValueError, match="feature_dropout needs the tower's states"):
        thin([Encoder(processor(), loss_tokens="response", max_length=100)(shown[0]) | {"noise": (0, 0, 0), "stratum": (0, 1)}])


def test_a_part_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match="this model has no part vision_end: only an EfficientNet-Lite0"):
        freeze_except(model(), ("projector", "vision_end"))


# The driver for one GPU.


@pytest.fixture(scope="module")
def driver(root):
    spec = importlib.util.spec_from_file_location("small_gpu", root / "benchmarks/small_gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["small_gpu"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["small_gpu"]


def test_what_is_searched_begins_with_the_profiles_own_recipe(driver):
    base = driver.RECIPES["base"]
    assert all(driver.recipe_of(stage, base) == SMALL.stages[stage] for stage in ("instruct", "vqa"))
    other = driver.recipe_of("instruct", driver.RECIPES["40 epochs"])
    assert other == SMALL.stages["instruct"], "epochs are the third stage's own"
    lora = driver.recipe_of("vqa", driver.RECIPES["LoRA 32"])
    own = SMALL.stages["vqa"]
    assert lora.learning_rate * lora.projector_rate == pytest.approx(own.learning_rate * own.projector_rate)


def test_the_final_shows_each_arm_over_three_seeds_and_never_one_arm_twice(driver):
    for name in ("base", "LoRA 32"):
        trials = driver.final_trials(driver.RECIPES[name])
        assert len(trials) == len({json.dumps(asdict(trial), default=str) for trial in trials.values()}) == 15
        assert {trial.protocol for trial in trials.values()} == {"official", "image_disjoint"}
        arms = {}
        for trial, settings in trials.items():
            for condition in ("model", "shuffled images"):
                shown = driver.named({"trial": trial, "condition": condition}, settings)
                arms.setdefault((shown, settings.protocol), set()).add((trial.partition("-")[0], settings.seed))
        assert all(len({kind for kind, _ in found}) == 1 and len(found) == 3 for found in arms.values())


@pytest.mark.slow
def test_recorded_results_read_like_those_of_the_notebook(driver, tmp_path):
    asked = [replace(e, answer_type="OPEN") for e in examples(6)]
    items = vqa_study(Answerer(model(), processor()), asked, asked, SamplerConfig(4, 4, 2), quiet=True).assign(test="t")
    trials = {f"real-{seed}": driver.Trial(seed=seed) for seed in (0, 1)}
    results = {
        n: {"items": as_rows(items.assign(seed=t.seed)), "seconds": {"all": 3.0, "asking": 1.0}, "losses": {}}
        for n, t in trials.items()
    }
    arguments = SimpleNamespace(
        phase="final", out=tmp_path, jobs=1, adapted=None, recipe=["two cores"], steps=0, few_controls=False
    )
    driver.gather(arguments, results, 3.0)
    found, facts = stages.recorded(tmp_path / "final.json")
    summary = stages.scores(found)
    assert set(summary["condition"]) == {stages.AFTER, *CONDITIONS[1:]} and set(summary["seeds"]) == {2}
    said = "epochs 2, batch_size 8, learning_rate 0.0002, pool 3, first False, forwards 4"
    assert stages.training_time(facts) == f"training took 2 s a seed, by the profile's recipe with {said}"
