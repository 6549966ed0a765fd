"""Training on the real Trainer, a few steps at a time: the cut of a batch and an interruption change nothing, and each stage
trains only what it should.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import examples, model, picture, processor, special
from transformers import AutoModel

from medv.artifacts import fingerprint
from medv.checkpoints.bundled import load_model
from medv.data.example import Example, Turn
from medv.data.images import ImageError
from medv.model.modeling import MedVForMaskedDiffusion, MedVModel
from medv.model.twin import causal_twin
from medv.profiles import StageRecipe
from medv.training.collate import Collator, Encoder
from medv.training.costs import peak_flops, training_flops
from medv.training.launch import RunOptions
from medv.training.lora import LoraRecipe, attach_lora, freeze_except
from medv.training.stages import plan_run, train_stage
from medv.training.stream import TrainingStream, ValidationStream, training_steps
from medv.training.trainer import Meter

BOTH = ("projector", "language_model")
RECIPE = StageRecipe(BOTH, samples=0, epochs=2, batch_size=2, learning_rate=1e-3, max_length=100, padding="none")
ALIGN = replace(RECIPE, trains=("projector",), epochs=0.4)
SHORT = replace(RECIPE, epochs=0.8)
Weights = dict[str, torch.Tensor]


def train(out: Path, recipe: StageRecipe = RECIPE, *, validation=(), **options) -> MedVForMaskedDiffusion:
    """Train a fresh copy of the model on ten examples: ten steps of two by default."""
    return train_stage(
        model(), processor(), recipe, examples(10), out, RunOptions(quiet=True, **options), validation=validation
    )


def weights(network: MedVForMaskedDiffusion) -> Weights:
    return {name: value.clone() for name, value in network.state_dict().items()}


def changed(before: Weights, after: Weights) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not before[name].equal(after[name])}


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Weights]:
    """A run of ten steps with validation: its folder and its weights."""
    out = tmp_path_factory.mktemp("whole")
    return out, weights(train(out, validation=examples(3)))


@pytest.fixture(scope="module")
def unsaved(tmp_path_factory) -> tuple[Path, Weights]:
    """The same run without checkpoints."""
    out = tmp_path_factory.mktemp("unsaved")
    return out, weights(train(out, validation=examples(3), checkpoints=False))


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> MedVForMaskedDiffusion:
    """The model after four steps."""
    return train(tmp_path_factory.mktemp("short"), SHORT, checkpoints=False)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> tuple[Path, MedVForMaskedDiffusion]:
    """A LoRA run of four steps: its folder and the merged model."""
    out = tmp_path_factory.mktemp("lora")
    return out, train(out, SHORT, lora=LoraRecipe(rank=4, alpha=8))


# The same training, however it is cut.


@pytest.mark.slow
def test_two_runs_with_the_same_seed_are_identical_and_another_seed_differs(short, tmp_path):
    again, other = (weights(train(tmp_path / str(seed), SHORT, seed=seed, checkpoints=False)) for seed in (0, 1))
    assert not changed(weights(short), again) and changed(again, other)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["none", "fixed:12"])
@pytest.mark.parametrize("times", ["iid", "stratified"])
def test_accumulating_two_halves_equals_one_batch(tmp_path, padding, times):
    recipe = replace(SHORT, padding=padding, times=times)
    one, two = (train(tmp_path / str(n), recipe, accumulation=n, checkpoints=False) for n in (1, 2))
    assert changed(weights(one), weights(model()))
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    losses = [[row["loss"] for row in read(tmp_path / n / "history.json") if "loss" in row] for n in "12"]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_ten_steps_equal_five_an_interruption_and_five_more(whole, tmp_path):
    _, reference = whole
    train(tmp_path, stop_after=5)
    assert not (tmp_path / "training.json").exists() and not (tmp_path / "config.json").exists()
    resumed = weights(train(tmp_path))
    assert read(tmp_path / "training.json")["steps"] == 10
    assert not changed(reference, resumed), "bit for bit"


@pytest.mark.slow
def test_a_run_stopped_between_two_logs_logs_the_losses_of_one_that_was_not(tmp_path):
    recipe = replace(RECIPE, epochs=16)  # 80 steps: a row of the log every two steps
    train(tmp_path / "whole", recipe, checkpoints=False)
    train(tmp_path / "stopped", recipe, stop_after=5)
    train(tmp_path / "stopped", recipe)
    histories = [read(tmp_path / name / "history.json") for name in ("whole", "stopped")]
    assert histories[0] == histories[1] and [row["step"] for row in histories[0][:3]] == [2, 4, 6]


@pytest.mark.slow
def test_an_interrupted_adapter_goes_on_exactly_too(adapted, tmp_path):
    _, merged = adapted
    lora = LoraRecipe(rank=4, alpha=8)
    train(tmp_path, SHORT, lora=lora, stop_after=2)
    assert not changed(weights(merged), weights(train(tmp_path, SHORT, lora=lora)))


@pytest.mark.slow
def test_an_adapter_begins_the_same_whatever_was_drawn_before(adapted, tmp_path):
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    first, other = (attach_lora(model(), LoraRecipe(rank=4), seed=seed) for seed in (0, 1))
    assert torch.get_rng_state().equal(before)
    assert changed(weights(first), weights(other))
    again = train(tmp_path, SHORT, lora=LoraRecipe(rank=4, alpha=8), checkpoints=False)
    assert not changed(weights(adapted[1]), weights(again))


@pytest.mark.slow
def test_a_run_killed_while_it_saved_goes_on_from_the_checkpoint_before(whole, tmp_path):
    train(tmp_path, stop_after=5)
    half = tmp_path / "checkpoints" / "checkpoint-6"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half of the weights")
    assert not changed(whole[1], weights(train(tmp_path)))


# Options that change what a run costs and not what it learns.


@pytest.mark.slow
@pytest.mark.parametrize("option", [{"checkpointing": True}, {"cached_vision": True}, {"precision": "float32"}], ids=str)
def test_an_option_of_cost_gives_the_same_weights(short, tmp_path, option):
    saving = train(tmp_path, replace(SHORT, **option), checkpoints=False)
    for (name, a), b in zip(short.state_dict().items(), saving.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5, msg=name)
    assert changed(weights(short), weights(model()))


@pytest.mark.slow
def test_cached_vision_runs_the_tower_once_for_each_image(tmp_path, monkeypatch):
    seen = []
    look = MedVModel.look
    monkeypatch.setattr(MedVModel, "look", lambda self, pixels: seen.append(len(pixels)) or look(self, pixels))
    train(tmp_path, replace(RECIPE, cached_vision=True), checkpoints=False)
    assert sum(seen) == 10, "ten images, two epochs"
    encode = Encoder(processor(), loss_tokens="official", max_length=100)
    with pytest.raises(ValueError, match=r"vision states of 10 images take about .*cached_vision=False"):
        encode.looks.once(model().model, examples(10), limit=100)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"deepspeed": "zero3"}, "give --deepspeed zero2, or none"),
        ({"workers": 2}, "nor cache features: leave --workers out"),
        ({"workers": 2, "skip_corrupt": True}, "neither count skipped images .*: leave --workers out"),
    ],
    ids=str,
)
def test_an_option_that_does_not_go_with_the_recipe_is_refused_before_anything_is_written(tmp_path, options, says):
    caching = "skip_corrupt" not in options
    with pytest.raises(ValueError, match=says):
        train(tmp_path / "out", replace(RECIPE, cached_vision=caching), **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cached", [True, False])
def test_a_corrupt_image_is_skipped_and_named_with_a_cached_tower_too(tmp_path, cached):
    shown = []
    for number, example in enumerate(examples(6)):
        example.image().save(tmp_path / f"{number}.png")
        shown.append(replace(example, image=tmp_path / f"{number}.png"))
    worst = max(shown, key=lambda example: sum(len(turn.text) for turn in example.turns))
    worst.image.write_bytes(b"no picture")
    recipe, asked = replace(RECIPE, epochs=1, cached_vision=cached), RunOptions(quiet=True, skip_corrupt=True)
    assert plan_run(model(), processor(), recipe, shown, asked).fits
    train_stage(model(), processor(), recipe, shown, tmp_path / "out", asked)
    assert read(tmp_path / "out/training.json")["skipped"] == [worst.id]
    sentence = f"example {worst.id}: .*{worst.image.name} is not a readable .*--skip-corrupt"
    with pytest.raises(ImageError, match=sentence):
        train_stage(model(), processor(), recipe, shown, tmp_path / "other", RunOptions(quiet=True))
    with pytest.raises(ImageError, match=sentence):
        plan_run(model(), processor(), recipe, shown)


@pytest.mark.parametrize("normalization", ["sample", "masked"])
def test_the_twin_learns_the_same_however_its_batch_is_cut(tmp_path, normalization):
    recipe = replace(RECIPE, batch_size=4, epochs=1, normalization=normalization, loss_tokens="official")
    one, cut = (
        weights(
            train_stage(
                causal_twin(model()),
                processor(),
                recipe,
                examples(8),
                tmp_path / str(n),
                RunOptions(quiet=True, accumulation=n),
            )
        )
        for n in (1, 4)
    )
    for name, value in one.items():
        torch.testing.assert_close(value, cut[name], rtol=0, atol=2e-5)


def test_frozen_towers_keep_no_graph():
    network = model()
    freeze_except(network, ("projector",))
    pixels = processor().pixels([picture(0)])
    assert not network.model.look(pixels).requires_grad and network.model.get_image_features(pixels).requires_grad
    batch = Collator(special(), padding="none")(
        [Encoder(processor(), loss_tokens="official", max_length=100)(examples(1)[0]) | {"noise": (0, 0, 0), "stratum": (0, 1)}]
    )
    network(**batch | {"t": torch.ones(1)}).loss.backward()
    assert {n for n, p in network.named_parameters() if p.grad is not None} == {
        n for n, _ in network.named_parameters() if n.startswith("model.projector.")
    }


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown precision 'int4': use one of auto, float32"):
        train(tmp_path, replace(RECIPE, precision="int4"))


# What a run says of its speed.


@pytest.mark.slow
def test_a_run_leaves_its_speed_apart_from_what_is_compared(whole, unsaved, tmp_path):
    out, other = whole[0], unsaved[0]
    speed = read(out / "speed.json")
    assert [row["step"] for row in speed["rows"]] == list(range(1, 11))
    row = speed["rows"][4]
    assert row["tokens_per_second"] > row["samples_per_second"] > 0 and row["peak_bytes"] > 0 and row["mfu"] is None
    assert 0 <= row["data_wait_seconds"] < row["seconds"] and 0 <= speed["total"]["padding_share"] < 0.5
    assert not [key for entry in read(out / "history.json") for key in entry if "second" in key or "runtime" in key]
    assert fingerprint(other / "history.json") == fingerprint(out / "history.json")
    for folder in (out, other):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("checkpoints"))
    one, two = (fingerprint(tmp_path / folder.name) for folder in (out, other))
    assert one == two and read(other / "speed.json") != speed


def test_the_operations_of_a_step_are_those_of_its_matrices():
    config = model().config
    text, sizes = config.text_config, {"rows": 3, "length": 50, "masked": 20}
    layers = sum(p.numel() for n, p in model().named_parameters() if ".language_model.layers." in n and p.dim() == 2)
    forward = 2 * layers * 150 + 2 * 20 * text.hidden_size * text.vocab_size
    attention = 4 * 150 * 50 * text.hidden_size * text.num_hidden_layers
    assert training_flops(config, **sizes) == 3 * forward + 3 * attention
    assert training_flops(config, **sizes, language_learns=False) == 2 * forward + 3 * attention
    assert training_flops(config, **sizes, views=3) > training_flops(config, **sizes)
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("a toaster") is None


def test_the_meter_counts_tokens_and_the_padding_behind_answers():
    encode = Encoder(processor(), loss_tokens="official", max_length=100)
    items = [encode(example) | {"noise": (0, 0, i), "stratum": (0, 1)} for i, example in enumerate(examples(4))]
    batch = Collator(special(), padding="none")(items)
    meter = Meter(model().config, special().end_of_text, language_learns=True)
    meter.count(batch, masked=3, waited=0.5)
    ended = sum(item["input_ids"][-1] == special().end_of_text for item in items)
    pads = batch["input_ids"].numel() - sum(len(item["input_ids"]) for item in items)
    assert pads > 0 and abs(int(meter.padding) - pads) <= 4 - ended
    meter.close_row(step=1, processes=2)
    (row,) = meter.rows
    assert row["tokens_per_second"] == pytest.approx(2 * batch["input_ids"].numel() / row["seconds"])
    assert row["data_wait_seconds"] == 0.5 and meter.tokens == 0


# What each stage trains, and what it leaves behind.


@pytest.mark.slow
def test_align_trains_the_projector_alone(tmp_path):
    names = changed(weights(model()), weights(train(tmp_path, ALIGN)))
    assert names == {name for name in model().state_dict() if name.startswith("model.projector.")}


def test_instruct_trains_projector_and_language_tower_and_never_the_vision_tower(whole):
    names = changed(weights(model()), whole[1])
    learned = ("model.projector.", "model.language_model.", "lm_head.")
    assert names == {name for name in model().state_dict() if name.startswith(learned)}


def test_the_vision_tower_cannot_be_asked_to_learn():
    with pytest.raises(ValueError, match=r"unknown part vision_tower: a stage trains projector or language_model"):
        freeze_except(model(), ("projector", "vision_tower"))
    network = model()
    assert freeze_except(network, BOTH) == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in network.model.vision_tower.parameters())


def test_a_run_leaves_a_model_that_loads_and_its_loss_curves(whole):
    out, trained = whole
    network, loaded_processor = load_model(out)
    assert not changed(trained, weights(network)) and loaded_processor.special == special()
    history = read(out / "history.json")
    steps = [[row["step"] for row in history if key in row] for key in ("loss", "eval_loss")]
    assert steps[0] == list(range(1, 11)) and steps[1] and steps[1][-1] == 10
    assert all(row[key] > 0 for row in history for key in ("loss", "eval_loss") if key in row)
    facts = read(out / "training.json")
    assert (facts["steps"], facts["seed"], facts["lora"]) == (10, 0, None)
    assert StageRecipe(**facts["recipe"] | {"trains": tuple(facts["recipe"]["trains"])}) == RECIPE
    assert facts["trainable_parameters"] == freeze_except(model(), BOTH)


@pytest.mark.slow
def test_without_checkpoints_the_result_is_the_same_and_nothing_else_is_saved(whole, unsaved):
    out, again = unsaved
    assert not changed(whole[1], again) and not list(out.glob("checkpoints/checkpoint-*"))


@pytest.mark.slow
def test_training_lowers_the_loss(tmp_path):
    recipe = replace(RECIPE, epochs=8, learning_rate=3e-3, normalization="masked", loss_tokens="response")
    train(tmp_path, recipe, validation=examples(4), checkpoints=False)
    losses = [row["eval_loss"] for row in read(tmp_path / "history.json") if "eval_loss" in row]
    assert losses[-1] < 0.7 * losses[0]


def test_lora_saves_its_adapter_and_a_plain_merged_model(adapted):
    out, merged = adapted
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    loaded = AutoModel.from_pretrained(out)
    assert type(loaded) is type(merged) is MedVForMaskedDiffusion
    assert not changed(weights(merged), weights(loaded))
    names = changed(weights(model()), weights(merged))
    assert {n for n in names if "projector" in n} == {n for n in weights(model()) if n.startswith("model.projector.")}
    assert all("_proj.weight" in n and ".language_model.layers." in n for n in names if "projector" not in n)
    assert len(names) == 4 + 2 * 7


def test_lora_reports_what_it_trained(adapted):
    facts = read(adapted[0] / "training.json")
    projector = sum(p.numel() for p in model().model.projector.parameters())
    widths = 4 * (32 + 32) + 3 * (32 + 64)  # q, k, v, o are 32 x 32; gate, up, down join 32 and 64
    assert facts["lora"] == {"rank": 4, "alpha": 8, "dropout": 0.0}
    assert facts["trainable_parameters"] == projector + 2 * 4 * widths


# Refusals.


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path):
    for accumulation in (3, 4):
        with pytest.raises(ValueError, match=f"batch of 2 cannot be cut into 1 processes x {accumulation}"):
            train(tmp_path, accumulation=accumulation)


def test_an_example_that_is_too_long_is_named_with_its_length(tmp_path):
    long = Example("case-77", None, (Turn("user", "Why?"), Turn("assistant", "x" * 200)))
    with pytest.raises(ValueError, match=r"example case-77 has \d+ tokens, more than the maximum of 100"):
        train_stage(model(), processor(), RECIPE, [long] * 2, tmp_path, RunOptions(quiet=True))


@pytest.mark.slow
def test_an_example_whose_image_is_missing_is_named(tmp_path):
    lost = Example("case-78", tmp_path / "lost.png", (Turn("user", "Why?"), Turn("assistant", "x")))
    with pytest.raises((ValueError, OSError), match=r"lost\.png"):
        train_stage(model(), processor(), RECIPE, [lost] * 2, tmp_path, RunOptions(quiet=True))


# The stream: the order of examples and the seeds of their noise.


def name_of(example: Example) -> dict:
    return {"id": example.id}


def stream(**options) -> TrainingStream:
    return TrainingStream(examples(6), name_of, **{"seed": 0, "batch_size": 4, "steps": 6} | options)


def test_every_epoch_holds_every_example_once_in_its_own_order():
    ids = [item["id"] for item in (stream()[i] for i in range(24))]
    epochs = [ids[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(epoch) == [f"example-{i}" for i in range(6)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_noise_names_seed_step_and_example():
    items = [stream(seed=5)[i] for i in range(24)]
    for position, item in enumerate(items):
        seed, step, index = item["noise"]
        assert (seed, step, f"example-{index}") == (5, position // 4, item["id"])
    assert all(item["stratum"] == (0, 1) for item in items)


def test_strata_cover_each_global_batch():
    items = [stream(times="stratified")[i] for i in range(24)]
    assert [item["stratum"] for item in items] == [(i % 4, 4) for i in range(24)]


def test_batches_of_like_length_hold_every_example_once_and_less_padding():
    lengths = np.random.default_rng(0).integers(1, 200, size=90)
    many = [question_of_length(i, int(n)) for i, n in enumerate(lengths)]
    padding = {}
    for order in ("shuffled", "by_length"):
        ids = [item["id"] for item in iter_stream(TrainingStream(many, name_of, seed=0, batch_size=8, steps=45, order=order))]
        assert all(sorted(ids[i : i + 90], key=int) == [str(n) for n in range(90)] for i in range(0, 360, 90))
        sizes = lengths[[int(i) for i in ids]].reshape(-1, 8)
        padding[order] = (sizes.max(axis=1, keepdims=True) - sizes).mean()
    assert padding["by_length"] < 0.3 * padding["shuffled"]
    with pytest.raises(ValueError, match="unknown order 'random': use one of shuffled, by_length"):
        stream(order="random")


def iter_stream(items: TrainingStream) -> list[dict]:
    return [items[i] for i in range(len(items))]


def question_of_length(number: int, length: int) -> Example:
    return Example(str(number), None, (Turn("user", "x" * length), Turn("assistant", "y")))


def test_a_stream_has_an_end_and_refuses_nothing_to_read():
    assert len(list(stream())) == len(stream()) == 24
    with pytest.raises(ValueError, match="unknown times 'cosine': use one of iid, stratified"):
        stream(times="cosine")
    with pytest.raises(ValueError, match="no training examples"):
        TrainingStream([], name_of, seed=0, batch_size=1, steps=1)


def test_validation_sees_every_example_at_every_time_with_the_same_noise():
    encode = Encoder(processor(), loss_tokens="response", max_length=100)
    fixed = ValidationStream(examples(3), encode, grid=4)
    batch = Collator(special(), padding="none")([fixed[i] for i in range(len(fixed))])
    assert (batch["t"] * 4).floor().tolist() == [0, 1, 2, 3] * 3
    again = Collator(special(), padding="none")([fixed[i] for i in range(len(fixed))])
    assert all(batch[key].equal(again[key]) for key in batch)
    assert len({fixed[i]["noise"] for i in range(len(fixed))}) == len(fixed)


@pytest.mark.parametrize(
    ("count", "epochs", "batch", "steps"), [(10, 2, 2, 10), (10, 1, 4, 3), (1797, 2, 8, 450), (3, 0.1, 8, 1)]
)
def test_steps_of_a_recipe(count, epochs, batch, steps):
    assert training_steps(replace(RECIPE, epochs=epochs, batch_size=batch), count) == steps


# Encoding.


def question_about(identity: str, image: Path | Callable | None) -> Example:
    return Example(identity, image, (Turn("user", "What is shown?"), Turn("assistant", "chest")))


def test_examples_with_the_same_name_keep_their_own_images():
    encode = Encoder(processor(), loss_tokens="response", max_length=100)
    first, second = (encode(question_about("1", lambda i=i: picture(i)))["pixel_values"] for i in (0, 5))
    assert first.equal(processor().pixels([picture(0)])[0]) and second.equal(processor().pixels([picture(5)])[0])


def test_a_batch_may_mix_examples_with_and_without_images(tmp_path):
    encode = Encoder(processor(), loss_tokens="response", max_length=100)
    mixed = [question_about("text", None), examples(1)[0], question_about("text-2", None)]
    items = [encode(example) | {"noise": (0, 0, i), "stratum": (0, 1)} for i, example in enumerate(mixed)]
    batch = Collator(special(), padding="none")(items)
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert model()(**batch).loss.isfinite()
    text_only = Collator(special(), padding="none")(items[:1])
    assert "pixel_values" not in text_only and model()(**text_only).loss.isfinite()
