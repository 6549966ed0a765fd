"""Training on several real processes: the same weights whatever the cut, and runs that break stop clearly and go on exactly."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launched import RECIPE, THREE_STEPS, Launched, corrupt, launch, long_texts, three_steps, train
from safetensors.torch import load_file
from tiny import model, processor

from medv.checkpoints.assembly import assemble
from medv.checkpoints.bundled import bundled, load_model
from medv.profiles import STAGES, get_profile
from medv.training.costs import checkpoint_bytes
from medv.training.launch import RunOptions, deepspeed_config, join
from medv.training.stages import ZERO_STAGES, run_stage
from medv.training.trainer import COMPLETE, last_checkpoint

pytestmark = pytest.mark.slow

TOPOLOGIES = {
    "two processes": {},
    "two processes with accumulation": {"accumulation": 2},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    return all(first[name].equal(second[name]) for name in first)


def checkpoint_size(folder: Path) -> int:
    files = Path(last_checkpoint(folder / "checkpoints")).rglob("*")
    return sum(file.stat().st_size for file in files if file.name.endswith((".safetensors", "optimizer.pt", "_states.pt")))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Three steps of every recipe on one process."""
    out = tmp_path_factory.mktemp("alone")
    three_steps(out)
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Five steps on two processes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    launch("five_steps", out)
    return out


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_three_steps_give_the_same_weights_however_they_are_shared(alone, tmp_path, topology):
    launch("three_steps", tmp_path / "out", **TOPOLOGIES[topology])
    start = model().state_dict()
    for name in THREE_STEPS:
        one, other = weights(alone / name), weights(tmp_path / "out" / name)
        assert one.keys() == other.keys()
        assert any(not one[key].equal(start[key]) for key in one), "it learned nothing"
        gap = max(float((one[key] - other[key]).abs().max()) for key in one)
        assert gap <= 1e-6, f"{name}: {gap}"
        facts = read(tmp_path / "out" / name / "training.json")
        trainable = facts["trainable_parameters"]
        assert trainable == read(alone / name / "training.json")["trainable_parameters"]
        zero, total = ZERO_STAGES[TOPOLOGIES[topology].get("deepspeed")], sum(value.numel() for value in start.values())
        total += trainable - start["lm_head.weight"].numel() if name == "lora" else -start["lm_head.weight"].numel()
        planned = checkpoint_bytes(total, trainable, zero=zero, adapters=name == "lora")
        extra = checkpoint_size(tmp_path / "out" / name) - planned
        assert 0 <= extra < 150_000, f"{name}: {extra} bytes beside the tensors that the plan counts"


def test_long_texts_under_zero3_give_the_weights_of_one_process_also_when_stopped_on_the_way(tmp_path):
    long_texts(tmp_path / "alone")
    launch("long_texts", tmp_path / "shared", deepspeed="zero3", stop_after=2)
    launch("long_texts", tmp_path / "shared", deepspeed="zero3")
    start = model().state_dict()
    for stage in STAGES:
        one, other = (weights(tmp_path / name / stage) for name in ("alone", "shared"))
        assert any(not one[key].equal(start[key]) for key in one), "it learned nothing"
        gap = max(float((one[key] - other[key]).abs().max()) for key in one)
        assert gap <= 1e-6, f"{stage}: {gap}"


def test_the_command_leaves_a_projector_that_loads_on_what_it_was_trained_on_and_speaks_once(tmp_path):
    said = launch("command_line", tmp_path / "zero3", deepspeed="zero3")
    assert '"trainable_parameters"' in said[0] and "loss" not in said[1] and "{" not in said[1]
    facts = json.loads(said[0].splitlines()[-1])
    alone = run_stage("align", get_profile("smoke"), tmp_path / "alone", RunOptions(quiet=True))
    assert facts["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    out = tmp_path / "zero3"
    assert not list(out.glob("model*.safetensors")) and sum(f.stat().st_size for f in out.glob("*.safetensors")) < 2**17
    first, second = (load_model(tmp_path / name)[0].state_dict() for name in ("alone", "zero3"))
    assert max(float((first[key] - second[key]).abs().max()) for key in first) <= 1e-5
    bundled_towers = assemble(bundled("language_tower"), bundled("vision_tower"), seed=0, image_pool=2).state_dict()
    learned = {key for key in first if not first[key].equal(bundled_towers[key])}
    assert learned == {key for key in first if key.startswith("model.projector.")}


def test_a_projector_moves_with_its_base_and_says_what_it_misses(tmp_path):
    base, folder = tmp_path / "there" / "base", tmp_path / "there" / "stage1"
    model(seed=1).save_pretrained(base)
    processor().save_pretrained(base)
    trained = train(folder, replace(RECIPE, trains=("projector",)), base={"model": str(base)})
    assert not (folder / "model.safetensors").exists()
    (tmp_path / "there").rename(tmp_path / "here")
    loaded = load_model(tmp_path / "here" / "stage1")[0].state_dict()
    start = model(seed=1).state_dict()
    for key, value in trained.state_dict().items():
        assert loaded[key].equal(value if key.startswith("model.projector.") else start[key])
    (tmp_path / "here" / "base").rename(tmp_path / "here" / "gone")
    with pytest.raises(FileNotFoundError, match=r"holds a projector trained on .*base, where there is no model"):
        load_model(tmp_path / "here" / "stage1")


@pytest.mark.parametrize("deepspeed", [None, "zero3"])
def test_a_killed_process_stops_the_run_and_the_same_command_ends_it_bit_for_bit(whole, tmp_path, deepspeed):
    if deepspeed:
        whole = tmp_path / "whole"
        launch("five_steps", whole, deepspeed=deepspeed)
    out = tmp_path / "killed"
    broken = Launched("struck", out, deepspeed=deepspeed)
    assert broken.wait() == [1, -signal.SIGKILL]
    sentence = broken.said[0].strip().splitlines()[-1]
    assert sentence.startswith("medv: process 0 of 2: another process of the run was lost")
    assert "the same command goes on from" in sentence
    assert not (out / "training.json").exists() and last_checkpoint(out / "checkpoints")
    launch("five_steps", out, deepspeed=deepspeed)
    assert same(whole, out)


def test_a_loss_that_is_no_number_stops_all_processes_with_one_sentence(tmp_path):
    run = Launched("gone_wrong", tmp_path / "out")
    assert run.wait() == [1, 1]
    said = [text.strip() for text in run.said]
    assert "medv: the loss is nan at step 4" in said[0] and "example-" in said[0] and "checkpoint-3" in said[0]
    assert "medv:" not in said[1]
    kept = weights(Path(last_checkpoint(tmp_path / "out" / "checkpoints")))
    assert all(value.isfinite().all() for value in kept.values())


def test_a_corrupt_image_stops_the_run_with_its_name_or_is_left_out_and_counted(tmp_path):
    run = Launched("corrupt", tmp_path / "out", images=tmp_path)
    assert run.wait() == [1, 1]
    said = "".join(run.said)
    assert said.count("medv:") == 1 and "example broken" in said and "broken.png" in said and "--skip-corrupt" in said
    launch("corrupt", tmp_path / "out", images=tmp_path, skip_corrupt=True)
    assert read(tmp_path / "out" / "training.json")["skipped"] == ["broken"]
    corrupt(tmp_path / "alone", tmp_path, skip_corrupt=True)
    one, two = weights(tmp_path / "alone"), weights(tmp_path / "out")
    assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-6


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(whole, tmp_path):
    out = tmp_path / "out"
    launch("five_steps", out, stop_after=2)
    before = weights(Path(last_checkpoint(out / "checkpoints")))
    run = Launched("no_room", out)
    assert run.wait()[0] == 1
    sentence = run.said[0].strip().splitlines()[-1]
    assert "the disk is full" in sentence and "checkpoint-2" in sentence
    kept = weights(Path(last_checkpoint(out / "checkpoints")))
    assert all(kept[name].equal(before[name]) for name in before)
    launch("five_steps", out)
    assert same(whole, out)


# One process, refusals.


def test_a_checkpoint_without_its_mark_does_not_count(tmp_path):
    for step, files in ((1, [COMPLETE]), (2, ["trainer_state.json", "model.safetensors"])):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-1"


def test_parts_that_do_not_fit_the_processes_are_refused(tmp_path):
    train(tmp_path, stop_after=2)
    mark = Path(last_checkpoint(tmp_path / "checkpoints")) / COMPLETE
    mark.write_text(json.dumps(read(mark) | {"deepspeed": "zero3", "processes": 2}))
    with pytest.raises(ValueError, match=r"was written by 2 processes with zero3, not 1 without DeepSpeed"):
        train(tmp_path)


def test_an_unknown_configuration_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown DeepSpeed configuration 'zero1': use one of zero2, zero3"):
        join("zero1")
    assert read(deepspeed_config("zero3"))["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
