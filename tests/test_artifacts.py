"""Files are whole or absent, fingerprints follow contents, manifests come back as written; a run keeps to its node."""

import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medv import artifacts
from medv.artifacts import Manifest, append_jsonl, atomic_directory, atomic_file, fingerprint, read_jsonl
from medv.companion.figures import plots as figures
from medv.companion.figures import tables
from medv.companion.figures.words import masked_strip
from medv.companion.reproduction.registry import Node
from medv.companion.reproduction.run import Run, open_run
from medv.companion.studies.training_stages import losses_of
from medv.profiles import get_profile


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = artifacts.write_text(tmp_path / "a.txt", "old\r\n")
    with pytest.raises(RuntimeError), atomic_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_bytes() == b"old\r\n" and list(tmp_path.iterdir()) == [path]


def test_a_kill_between_the_two_renames_of_a_folder_does_not_lose_what_was_there(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "w").write_text("old")
    child = """
import os, signal, sys
from medv.artifacts import atomic_directory
with atomic_directory(sys.argv[1]) as folder:
    (folder / "w").write_text("new")
    last = lambda event, args: event == "os.rename" and str(args[1]) == sys.argv[1] and os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(last)
"""
    killed = subprocess.run([sys.executable, "-c", child, str(tmp_path / "a")])
    assert killed.returncode == -9 and not (tmp_path / "a").exists()
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "a"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "w").read_text() == "old"


def test_json_holds_numpy_values_paths_and_sets(tmp_path):
    value = {"a": np.float32(0.5), "b": np.arange(2), "c": tmp_path, "d": {"z", "y"}, "é": "é"}
    read = json.loads(artifacts.write_json(tmp_path / "a.json", value).read_text(encoding="utf-8"))
    assert read == {"a": 0.5, "b": [0, 1], "c": tmp_path.as_posix(), "d": ["y", "z"], "é": "é"}
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        artifacts.write_json(tmp_path / "b.json", object())
    assert not (tmp_path / "b.json").exists()


def test_a_directory_appears_only_when_its_builder_succeeds(tmp_path):
    target = tmp_path / "model"
    for content in ("one", "two"):
        with atomic_directory(target) as folder:
            (folder / "weights").write_text(content)
            assert not target.exists() or (target / "weights").read_text() != content
    with pytest.raises(RuntimeError), atomic_directory(target) as folder:
        (folder / "weights").write_text("three")
        raise RuntimeError
    assert (target / "weights").read_text() == "two" and list(tmp_path.iterdir()) == [target]


KILLED = """
import os, sys
from medv.artifacts import atomic_directory
with atomic_directory(sys.argv[1], keep=sys.argv[2] or None) as folder:
    (folder / "checkpoint").write_text("half")
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("killed", "next_", "found"), [("", None, False), ("k1", "k1", True), ("k1", "k2", False)])
def test_a_killed_builder_leaves_no_target_and_is_continued_only_by_the_same_work(tmp_path, killed, next_, found):
    target = tmp_path / "model"
    subprocess.run([sys.executable, "-c", KILLED, str(target), killed], check=False)
    assert not target.exists()
    with atomic_directory(target, keep=next_) as folder:
        assert (folder / "checkpoint").exists() is found
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("torn", [b'{"n": 3, "te', b'{"n": 3}'])
def test_a_torn_last_line_is_dropped_and_cut_off_by_the_next(tmp_path, torn):
    path = tmp_path / "answers.jsonl"
    assert read_jsonl(path) == []
    for n in (1, 2):
        append_jsonl(path, {"n": n, "text": "ä\nb"})
    with path.open("ab") as stream:
        stream.write(torn)
    assert [row["n"] for row in read_jsonl(path)] == [1, 2]
    append_jsonl(path, {"n": 4})
    assert [row["n"] for row in read_jsonl(path)] == [1, 2, 4]
    path.write_bytes(b'{"n": 1}\nnonsense\n{"n": 2}\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_jsonl(path)


def test_fingerprints_follow_contents_and_names_but_not_places_or_manifests(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "w").write_text("x")
    a, b = tmp_path / "a", tmp_path / "b"
    assert fingerprint(a) == fingerprint(b)
    Manifest("b").write(b)
    assert fingerprint(a) == fingerprint(b)
    (b / "deep" / "w").rename(b / "deep" / "v")
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint({"x": 1, "y": [2]}) == fingerprint({"y": [2], "x": 1}) != fingerprint({"x": 1, "y": [3]})
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    with pytest.raises(FileNotFoundError):
        fingerprint(tmp_path / "absent")
    assert artifacts.code_fingerprint() != artifacts.code_fingerprint(("cli.py",))


def test_a_manifest_comes_back_and_says_what_made_it(tmp_path):
    written = Manifest("x", profile=get_profile("tiny").to_dict(), seed=3, inputs={"models/a": "f"}, about={"n": 1})
    read = Manifest.read(written.write(tmp_path))
    assert read.profile["name"] == "tiny" and read.versions["torch"] and read.code == artifacts.code_fingerprint()
    assert json.dumps(dataclasses.asdict(read)) == json.dumps(dataclasses.asdict(written))
    with pytest.raises(ValueError, match="not a medv manifest"):
        Manifest.read(artifacts.write_json(tmp_path / "y.json", {"nonsense": 1}))
    for wrong in ({"about": []}, {"profile": None}, {"seed": "../x"}, {"seed": -1}, {"inputs": "a"}):
        with pytest.raises(ValueError, match=f"not a medv manifest: its {next(iter(wrong))}"):
            Manifest.read(artifacts.write_json(tmp_path / "y.json", {"name": "x"} | wrong))


@pytest.fixture
def run(tmp_path):
    node = Node("toy", "toy.ipynb", "A toy", needs=("models/a",), makes=("models/b",), results=("fig03", "table2"))
    return Run(node, get_profile("smoke"), 0, tmp_path)


def test_a_run_finds_or_explains_its_inputs_and_refuses_what_it_did_not_declare(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"models/a is not in .*: make it first"):
        run.artifact("models/a")
    stage2 = open_run("stage2", profile="smoke", out=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"10_stage1_alignment\.ipynb first, or `medv reproduce --only stage1`"):
        stage2.artifact("models/stage1")
    with pytest.raises(ValueError, match="does not declare 'models/z'"):
        run.artifact("models/z")
    with pytest.raises(ValueError, match="does not declare 'fig09'"):
        run.figure(figures.new_figure()[0], "fig09", pd.DataFrame())
    with pytest.raises(ValueError, match="nothing is called 'stage9'"):
        open_run("stage9")
    (tmp_path / "models" / "a").mkdir(parents=True)
    run.artifact("models/a")
    with run.making("models/b") as folder:
        (folder / "weights").write_text("w")
    assert list(Manifest.read(run.artifact("models/b")).inputs) == ["models/a"]


def test_a_figure_is_four_files_the_same_bytes_twice_with_an_honest_footer(run, tmp_path):
    frame = pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0], "split": "train"})
    stem = tmp_path / "figures" / "fig03"
    bytes_of = []
    for _ in range(2):
        run.figure(figures.curve(frame, "step", "loss", hue="split"), "fig03", frame, caption="Loss")
        bytes_of.append([stem.with_name(stem.name + suffix).read_bytes() for suffix in (".png", ".svg", ".csv")])
    assert bytes_of[0] == bytes_of[1]
    about = Manifest.read(stem.with_name("fig03.json")).about
    assert about["data"] == "synthetic phantoms, profile smoke: not comparable with the paper"
    assert about["counterpart"] == "Figure 3" and not about["comparable"]
    assert run.footer("VQA-RAD test set") == "VQA-RAD test set, profile smoke: not comparable with the paper"
    assert run.footer("computed from Eq. 3", comparable=True) == "computed from Eq. 3"
    phantoms = open_run("stage3", profile="paper", out=tmp_path).footer()
    assert phantoms == "synthetic phantoms, profile paper: not comparable with the paper"
    assert Image.open(io.BytesIO(bytes_of[0][0])).getpixel((0, 0))[:3] == (255, 255, 255)


def test_a_manifest_tells_nothing_of_the_machine_it_was_made_on(tmp_path):
    run = open_run("stage3", profile="smoke", out=tmp_path, parameters={"data_dir": str(tmp_path / "rad"), "data": "x"})
    run.figure(figures.new_figure()[0], "fig03", pd.DataFrame({"a": [1]}))
    written = (tmp_path / "figures" / "fig03.json").read_text()
    assert str(tmp_path) not in written and Manifest.read(tmp_path / "figures/fig03.json").parameters["data_dir"] == "rad"


def test_a_manifest_keeps_no_place_however_deep_it_stands(tmp_path):
    place = tmp_path / "judged.jsonl"
    deep = {"judgements": {"a": str(place), "b": [place, {"c": (str(place), "qa50")}]}, "steps": 3}
    read = Manifest.read(Manifest("x", parameters=deep, about={"from": [str(place)]}).write(tmp_path))
    assert str(tmp_path) not in (tmp_path / "manifest.json").read_text()
    assert read.parameters["judgements"] == {"a": place.name, "b": [place.name, {"c": [place.name, "qa50"]}]}
    assert read.parameters["steps"] == 3 and read.about == {"from": [place.name]}


def test_paper_numbers_keep_to_their_own_columns_and_cells_are_escaped(run, tmp_path):
    ours = pd.DataFrame({"model": ["medv <tiny>"], "score": [0.123456]})
    paper = pd.DataFrame({"model": ["LLaDA-MedV"], "score": [50.0]})
    both = tables.compare(ours, paper, on="model")
    assert list(both.columns) == ["model", "score (ours)", "score (paper)"]
    assert both["score (ours)"].isna().tolist() == [False, True] and both["score (paper)"].isna().tolist() == [True, False]
    page = tables.to_html(both)
    assert "medv &lt;tiny&gt;" in page and 'class="n paper"' in page and "<tiny>" not in page
    assert [tables.show(v) for v in (None, 0.0, 50.0, 0.001, 1.005, True, 7)] == ["–", "0", "50", "0.001", "1", "yes", "7"]
    with pytest.raises(ValueError, match="two rows"):
        tables.compare(pd.concat([ours, ours]), paper, on="model")
    run.table(both, "table2")
    assert pd.read_csv(tmp_path / "figures" / "table2.csv").shape == (2, 3)
    assert (tmp_path / "figures" / "table2.svg").exists()


BARS = pd.DataFrame({"metric": "a", "system": ["s", "t"], "value": [50.0, 60], "low": [None, 55.0], "high": [None, 65.0]})


def test_the_numbers_of_a_column_have_the_same_places_and_counts_have_none():
    frame = pd.DataFrame({"share": [66.0, 68.25, None], "n": [300.0, None, 4.0], "tiny": [0.5, 0.0001, 0.0]})
    assert tables.cells(frame) == [["66.00", "300", "0.5"], ["68.25", "–", "0.0001"], ["–", "4", "0.0"]]
    assert tables.cells(pd.DataFrame({"a": [1], "b": ["x"], "c": [True]})) == [["1", "x", "yes"]]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.accuracy_bars(BARS),
        lambda: figures.gallery([np.zeros((8, 8), np.uint8), Image.new("RGB", (8, 8))], ["one", "two " * 20], "Title"),
        lambda: masked_strip([("t = 0", ["a", "b"], [False, True])]),
        lambda: figures.curve(pd.DataFrame({"t": [0.1, 1], "w": [10, 1], "low": 0, "high": 11}), "t", "w", yscale="log"),
        lambda: figures.heatmap(pd.DataFrame([[1.0, None]], index=["r"], columns=["a", "b"]), label="%"),
    ],
    ids=["bars", "gallery", "strip", "curve", "heatmap"],
)
def test_every_plot_draws_and_saves(draw, tmp_path):
    png, svg = figures.save(draw(), tmp_path / "plot")
    assert png.stat().st_size > 1000 and svg.read_text().startswith("<?xml")


def test_a_dollar_in_a_name_is_no_formula_and_the_numbers_of_a_logarithmic_axis_are(tmp_path):
    frame = pd.DataFrame({"t": [0.1, 1], "w": [1000, 1], "run": r"$\frac{$"})
    drawn = figures.curve(frame, "t", "w", r"$\frac{$", hue="run", yscale="log")
    for _ in range(2):  # matplotlib writes the numbers when it draws
        figures.save(drawn, tmp_path / "plot")
    numbers = [text for text in drawn.axes[0].get_yticklabels() if "10^" in text.get_text()]
    assert numbers and all(text.get_parse_math() for text in numbers)


def test_a_wrong_frame_is_named(tmp_path):
    with pytest.raises(ValueError, match="lacks split: it has step, loss"):
        figures.curve(pd.DataFrame({"step": [], "loss": []}), "step", "loss", hue="split")
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        figures.gallery([1, 2], ["one"])
    history = [{"step": 1, "loss": 2}, {"step": 1, "eval_loss": 3, "eval_runtime": 1}, {"step": 2, "train_runtime": 1}]
    artifacts.write_json(tmp_path / "history.json", history)
    assert losses_of(tmp_path).to_dict("records") == [
        {"step": 1, "loss": 2.0, "split": "train"},
        {"step": 1, "loss": 3.0, "split": "validation"},
    ]
