"""Runs of the command line that meet what is there already: the same goes on, or is finished; anything else is refused, and
stays as it was.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from command import run
from damaged import tree
from PIL import Image

from medv.checkpoints.bundled import load_model
from medv.companion.reproduction.run import open_run
from medv.data.example import Example, Turn
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.evaluation.benchmark import answer_file
from medv.profiles import ModelShape, StageRecipe, get_profile
from medv.training.launch import RunOptions, TrainingStopped, clear_failures
from medv.training.lora import LoraRecipe
from medv.training.stages import train_stage

RECIPE = StageRecipe(("projector",), samples=0, epochs=0.8, batch_size=2, learning_rate=1e-3, max_length=100, padding="none")
HOLDER = """
import sys, time
from pathlib import Path
from medv.ownership import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
SIZES = ("--gen-length", "4", "--block-length", "4", "--steps", "4")


def refused(folder: Path, said: str, *arguments) -> None:
    """Exit code 2, one sentence with `said` in it, and nothing changed under `folder`."""
    before = tree(folder)
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert said in done.stderr and done.stderr.count("medv:") == 1 and "Traceback" not in done.stderr
    assert tree(folder) == before


def save_model(folder: Path, seed: int = 0) -> Path:
    tiny.model(seed=seed).save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


# Training.


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    out = tmp_path_factory.mktemp("aligned") / "s1"
    done = run("train", "align", "--profile", "smoke", "--out", out)
    assert done.exit_code == 0, done.output
    return out


@pytest.mark.slow
def test_a_finished_training_is_finished_however_its_batches_are_cut(aligned):
    before = tree(aligned)
    done = run("train", "align", "--profile", "smoke", "--out", aligned, "--accumulation", "2")
    assert done.exit_code == 0 and "was finished already" in done.stderr
    assert tree(aligned) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("instruct", "--profile", "smoke"), "stage align, now instruct"),
        (("align", "--profile", "smoke", "--seed", "9"), "seed 0, now 9"),
        (("instruct", "--profile", "smoke", "--lora"), "lora changed"),
        (("align", "--profile", "smoke", "--lora"), "LoRA adapts the language tower"),
        (("align", "--profile", "tiny"), "profile smoke, now tiny"),
        (("align", "--profile", "smoke", "--init", "/nonexistent"), "/nonexistent"),
        (("align", "--profile", "smoke", "--data", "vqa_rad", "--data-dir", "/nonexistent"), "/nonexistent"),
        (("align", "--profile", "smoke", "--data-dir", "/nonexistent"), "is for a real data set"),
        (("pretrain", "--profile", "smoke"), "was not made by this version's medv train pretrain"),
        (("pretrain", "--profile", "paper"), "begins from towers trained elsewhere"),
    ],
)
def test_another_training_into_a_finished_folder_is_refused(aligned, arguments, said):
    refused(aligned.parent, said, "train", *arguments, "--out", aligned)


def test_pretraining_refuses_the_options_of_a_stage(tmp_path):
    done = run("train", "pretrain", "--profile", "smoke", "--lora", "--out", tmp_path / "towers")
    assert done.exit_code == 2 and "No such option" in done.stderr and not tree(tmp_path)


def test_another_start_is_another_training(aligned, tmp_path):
    out = ("--profile", "smoke", "--out", aligned)
    refused(aligned, "init.weights changed", "train", "align", "--init", save_model(tmp_path / "m"), *out)


def test_a_finished_training_of_an_older_version_is_refused_with_the_mend(tmp_path):
    (tmp_path / "training.json").write_text("{}")
    refused(tmp_path, "choose a new or empty folder", "train", "align", "--profile", "smoke", "--out", tmp_path)
    (tmp_path / "run.json").write_text('{"recipe": {}, "seed": 0, "lora": null, "examples": 24}')
    refused(tmp_path, "choose another output, or delete it", "train", "align", "--profile", "smoke", "--out", tmp_path)


def test_models_and_files_of_others_are_not_trained_over(tmp_path):
    model = save_model(tmp_path / "m")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "notes.txt").write_text("my notes")
    command = ("train", "vqa", "--profile", "smoke", "--init", model)
    for out in (model, model / "new", tmp_path / "link", tmp_path / "m" / ".." / "m"):
        refused(tmp_path, "choose another place", *command, "--out", out)
    refused(tmp_path, "is not a folder", *command, "--out", tmp_path / "notes.txt")
    refused(tmp_path, "holds other files", "train", "vqa", "--profile", "smoke", "--out", model)


def test_a_second_training_in_the_same_folder_is_refused_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        refused(tmp_path, "is working on", "train", "align", "--profile", "smoke", "--out", tmp_path)
    finally:
        process.kill()
        process.wait()


def train(out: Path, network=None, examples=None, **options):
    network = network or tiny.model()
    return train_stage(network, tiny.processor(), RECIPE, examples or tiny.examples(10), out, RunOptions(quiet=True, **options))


@pytest.mark.slow
def test_an_interrupted_training_goes_on_only_from_its_own_start_and_data(tmp_path):
    out, examples = tmp_path / "out", tiny.examples(10)
    train(out, stop_after=2)
    before = tree(out)
    answers = [replace(ex, turns=(ex.turns[0], Turn("assistant", "something else"))) for ex in examples]
    pictures = [replace(ex, image=lambda: tiny.picture(7)) for ex in examples]
    for options, said in (
        ({"network": tiny.model(seed=1)}, "init.weights changed"),
        ({"examples": answers}, "data.rows changed"),
        ({"examples": examples[::-1]}, "data.rows changed"),
        ({"examples": pictures}, "data.images changed"),
        ({"seed": 1}, "seed 0, now 1"),
        ({"lora": LoraRecipe(4, 8)}, "leave --lora out"),
    ):
        with pytest.raises(ValueError, match=said):
            train(out, **options)
        assert tree(out) == before
    train(out, accumulation=2)
    assert (out / "training.json").exists()


@pytest.mark.slow
def test_a_picture_that_changed_under_its_name_and_time_is_other_data(tmp_path):
    path, out = tmp_path / "a.bmp.png", tmp_path / "out"
    turns = (Turn("user", "What?"), Turn("assistant", "a lung"))
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path, compress_level=0)
    about = path.stat()
    train(out, examples=[Example("a", path, turns)] * 4, stop_after=1)
    Image.new("RGB", (8, 8), (3, 2, 1)).save(path, compress_level=0)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert path.stat().st_size == about.st_size
    with pytest.raises(ValueError, match=r"data\.images changed"):
        train(out, examples=[Example("a", path, turns)] * 4)


@pytest.mark.slow
def test_a_finished_stage_gives_its_model_back(tmp_path):
    trained = train(tmp_path).state_dict()
    again = train(tmp_path).state_dict()
    assert trained.keys() == again.keys() and all(trained[name].equal(again[name]) for name in trained)


def test_a_training_set_without_examples_is_refused(tmp_path):
    rows = [{"qid": 1, "image_name": "a.png", "question": "?", "answer": "a", "answer_type": "OPEN", "phrase_type": "frame"}]
    (tmp_path / "trainset.json").write_text(json.dumps(rows))
    command = ("train", "vqa", "--profile", "smoke", "--data", "vqa_rad", "--data-dir", tmp_path)
    refused(tmp_path, "there are no training examples", *command, "--out", tmp_path.parent / f"{tmp_path.name}-out")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_more_stops_the_training_in_words(code):
    with pytest.raises(TrainingStopped, match="the same command goes on"), clear_failures(lambda: "the same command goes on"):
        raise OSError(code, os.strerror(code), "weights")


# Answering.


@pytest.fixture
def benchmark(tmp_path):
    folder = tmp_path / "b"
    folder.mkdir()
    rows = []
    for number, example in enumerate(tiny.examples(3)):
        example.image().save(folder / f"{number}.png", compress_level=0)
        rows.append(json.dumps({"question_id": number, "image": f"{number}.png", "text": example.question}))
    (folder / "q.jsonl").write_text("\n".join(rows) + "\n")
    save_model(folder / "m")
    return folder


def generate(folder: Path, out: Path, *more):
    return ("generate", "--questions", folder / "q.jsonl", "--images", folder, "--model", folder / "m", "--out", out) + (
        SIZES + more
    )


@pytest.mark.slow
def test_answers_go_to_no_file_that_is_not_theirs(benchmark, tmp_path):
    notes = tmp_path / "n.txt"
    notes.write_text("my notes")
    (tmp_path / "row").write_text('{"question_id": "0", "text": "made by another tool"}')
    (tmp_path / "old").write_text('{"question_id": "0", "text": "a", "settings": {}, "run": "0123"}\n')
    (tmp_path / "hard").hardlink_to(benchmark / "m" / "model.safetensors")
    (tmp_path / "soft").symlink_to(benchmark / "q.jsonl")
    (tmp_path / "folder").mkdir()
    names = [notes, *(tmp_path / name for name in ("row", "old", "hard", "soft", "folder")), notes / "below"]
    inputs = ["q.jsonl", "0.png", "m", "m/config.json", "m/model.safetensors"]
    for out in [*names, *(benchmark / name for name in inputs)]:
        refused(tmp_path, "", *generate(benchmark, out))
    os.mkfifo(tmp_path / "pipe")
    assert run(*generate(benchmark, tmp_path / "pipe")).exit_code == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: save_model(b / "m", seed=1), "model.weights changed"),
        (lambda b: (b / "m" / "config.json").write_text(_edited(b / "m" / "config.json", "rope_theta", 5e3)), "model.config"),
        (
            lambda b: (b / "m" / "processor_config.json").write_text(_edited(b / "m" / "processor_config.json", "system", "x")),
            "model.processor changed",
        ),
        (lambda b: tiny.picture(9).save(b / "1.png", compress_level=0), "images changed"),
        (lambda b: (b / "q.jsonl").write_text((b / "q.jsonl").read_text().replace("?", " now?")), "questions changed"),
    ],
)
def test_answers_go_on_only_with_the_same_model_questions_and_images(benchmark, tmp_path, change, said):
    out = tmp_path / "a.jsonl"
    assert run(*generate(benchmark, out)).exit_code == 0
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:1]))
    refused(out.parent, "seed 0, now 1", *generate(benchmark, out, "--seed", "1"))
    change(benchmark)
    refused(out.parent, said, *generate(benchmark, out))


def _edited(path: Path, name: str, value) -> str:
    """The JSON text of a file with one value changed, wherever in it the name stands."""

    def edit(part):
        if isinstance(part, dict):
            return {key: value if key == name else edit(inner) for key, inner in part.items()}
        return part

    return json.dumps(edit(json.loads(path.read_text())))


def test_a_model_that_moved_is_the_same_model(benchmark, tmp_path):
    out = tmp_path / "a.jsonl"
    assert run(*generate(benchmark, out)).exit_code == 0
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    shutil.move(benchmark, tmp_path / "elsewhere")
    assert run(*generate(tmp_path / "elsewhere", out)).exit_code == 0
    texts = [[json.loads(line)["text"] for line in data.splitlines()] for data in (whole, out.read_bytes())]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_what_lies_under_a_projector_is_part_of_the_model(tmp_path):
    base, stage = save_model(tmp_path / "base"), tmp_path / "stage"
    given = {"options": RunOptions(quiet=True), "base": {"model": str(base)}}
    train_stage(load_model(base)[0], tiny.processor(), RECIPE, tiny.examples(4), stage, **given)
    config, out = SamplerConfig(4, 4, 4), tmp_path / "a.jsonl"
    answer_file(tiny.examples(2), Answerer.load(stage), config, out, quiet=True)
    shutil.rmtree(base)
    save_model(base, seed=1)
    with pytest.raises(ValueError, match=r"model\.weights changed"):
        answer_file(tiny.examples(2), Answerer.load(stage), config, out, quiet=True)


def test_two_at_once_do_not_write_one_file(benchmark, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "a.jsonl"], stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        refused(tmp_path, "is working on", *generate(benchmark, tmp_path / "a.jsonl"))
    finally:
        process.kill()
        process.wait()
    assert run(*generate(benchmark, tmp_path / "a.jsonl")).exit_code == 0


# Numbers.

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "change",
    [
        *({"epochs": value} for value in (0, -1, NAN, INF, 1e30, "2", True)),
        *({"warmup": value} for value in (5, 1, -0.1, NAN)),
        *({"learning_rate": value} for value in (0, -1e-3, NAN, INF, "1e-3")),
        *({"batch_size": value} for value in (0, -2, 1.5, True)),
        *({"samples": value} for value in (-1, 2.5)),
        *({"max_length": value} for value in (0, 10.5)),
        *({"weight_decay": value} for value in (-1, NAN)),
    ],
    ids=str,
)
def test_a_recipe_has_no_number_without_a_meaning(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(RECIPE, **change)


@pytest.mark.parametrize(
    "change",
    [
        *({"temperature": value} for value in (NAN, INF, 1e-320, -1, "0.5", 1e300)),
        *({"cfg_scale": value} for value in (NAN, INF, -1)),
        *({"seed": value} for value in (-1, 1.5, "abc", 2**40)),
        *({"gen_length": value} for value in (0, 8.0, 10_000_000_019, True)),
        *({"steps": value} for value in (0, 1_000_000_000)),
        {"min_length": -1},
    ],
    ids=str,
)
def test_a_sampler_has_no_number_without_a_meaning(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        SamplerConfig(**({"gen_length": 8, "block_length": 8, "steps": 8} | change))


@pytest.mark.parametrize(
    "make",
    [
        lambda: replace(get_profile("smoke"), seeds=(-1,)),
        lambda: replace(get_profile("smoke"), seeds=("abc",)),
        lambda: replace(get_profile("smoke"), evaluation_questions=0),
        lambda: replace(get_profile("smoke"), pretrain={"tower_steps": 0}),
        lambda: replace(get_profile("smoke").model, layers=0),
        lambda: replace(get_profile("smoke").model, rope_theta=NAN),
        lambda: replace(get_profile("smoke").answer, steps=0),
        lambda: LoraRecipe(rank=0),
        lambda: LoraRecipe(dropout=1.0),
        lambda: ModelShape(**{**vars(get_profile("smoke").model), "heads": 1.5}),
    ],
)
def test_nothing_else_has_a_number_without_a_meaning(make):
    with pytest.raises(ValueError, match="it must be"):
        make()


@pytest.mark.parametrize(
    "parameters",
    [
        {"seed": "abc"},
        {"seed": 1.5},
        {"seed": -1},
        {"seed": True},
        {"out": 5},
        {"profile": 5},
        {"parameters": {"index": "x"}},
        {"parameters": {"data_dir": 5}},
        {"parameters": {"draws": 0}},
    ],
    ids=str,
)
def test_a_notebook_refuses_parameters_of_another_kind(tmp_path, parameters):
    with pytest.raises(ValueError, match="it must be"):
        open_run("quickstart", **({"out": tmp_path / "x", "profile": "smoke"} | parameters))
    assert not (tmp_path / "x").exists()


def test_numbers_of_numpy_and_torch_are_numbers():
    assert SamplerConfig(8, 8, 8, temperature=torch.tensor(0.5).item(), seed=3).seed == 3
