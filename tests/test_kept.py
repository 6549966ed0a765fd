"""What is there is kept: a finished artifact of the same work is found, a model put there by hand is given."""

import shutil

import pandas as pd
import pytest

from medv.artifacts import Manifest
from medv.checkpoints.bundled import bundled
from medv.companion.figures import plots as figures
from medv.companion.reproduction.cache import FORCE_KEY, RESUME_KEY
from medv.companion.reproduction.run import open_run
from medv.companion.studies.training_stages import losses_of, training_time
from medv.profiles import get_profile


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    for name in (RESUME_KEY, FORCE_KEY):
        monkeypatch.delenv(name, raising=False)


def train(mark: str):
    def work(folder):
        (folder / "config.json").write_text("{}")
        (folder / "weights").write_text(mark)
        return mark

    return work


def weights(run) -> str:
    return (run.artifact("models/stage1") / "weights").read_text()


def test_a_model_put_there_by_hand_is_neither_trained_again_nor_deleted(tmp_path, monkeypatch, capsys):
    target = tmp_path / "models" / "stage1"
    target.mkdir(parents=True)
    train("trained elsewhere")(target)
    for key in (None, "k1", "k2"):
        if key:
            monkeypatch.setenv(RESUME_KEY, key)
        run = open_run("stage1", profile="smoke", out=tmp_path)
        assert run.obtain("models/stage1", train("anew")) == {"models/stage1": "given"}
        assert weights(run) == "trained elsewhere" and "is given" in capsys.readouterr().out
    with run.making("models/stage1") as folder:
        assert folder == target
    run.figure(figures.new_figure()[0], "stage1", pd.DataFrame({"a": [1]}))
    after = open_run("stage2", profile="smoke", out=tmp_path)
    after.artifact("models/stage1")
    after.figure(figures.new_figure()[0], "stage2", pd.DataFrame({"a": [1]}))
    for name in ("stage1", "stage2"):
        assert Manifest.read(tmp_path / "figures" / f"{name}.json").about["kept"] == {"models/stage1": "given"}
    monkeypatch.setenv(FORCE_KEY, "1")
    assert run.obtain("models/stage1", train("anew")) == "anew" and weights(run) == "anew"


def test_finished_work_is_found_by_the_same_work_and_made_again_by_other_work(tmp_path, monkeypatch):
    run = open_run("stage1", profile="smoke", out=tmp_path)
    assert run.obtain("models/stage1", train("by hand")) == "by hand"
    assert run.obtain("models/stage1", train("anew")) == {"models/stage1": "found"}
    monkeypatch.setenv(RESUME_KEY, "k1")
    assert run.obtain("models/stage1", train("anew")) == {"models/stage1": "found"}, "work done by hand counts"
    other = open_run("stage1", profile="smoke", seed=1, out=tmp_path)
    assert other.obtain("models/stage1", train("seed 1")) == "seed 1"
    monkeypatch.setenv(RESUME_KEY, "k2")
    assert other.obtain("models/stage1", train("k2")) == "k2", "the notebook or its library changed"
    assert other.obtain("models/stage1", train("anew")) == {"models/stage1": "found"}


@pytest.mark.slow
def test_a_training_is_not_repeated_for_a_change_of_what_comes_after_it(tmp_path, monkeypatch):
    def obtain(key: str, change: str):
        (tmp_path / "medv.toml").write_text(f"[profile]\n{change}")
        monkeypatch.setenv(RESUME_KEY, key)
        run = open_run("stage1", profile="smoke", out=tmp_path / "run", config=tmp_path / "medv.toml")
        made = run.obtain("models/stage1", lambda out: run.machine.train("align", run.profile, out, quiet=True), checked=True)
        return made, (tmp_path / "run/models/stage1/projector.safetensors").stat().st_mtime_ns

    first, made = obtain("k1", "evaluation_descriptions = 4")
    assert first["steps"] == 3
    assert obtain("k2", "evaluation_descriptions = 5") == ({"models/stage1": "found"}, made)
    again, other = obtain("k3", "stages = {align = {learning_rate = 1e-4}}")
    assert again["steps"] == 3 and other > made
    monkeypatch.setenv(FORCE_KEY, "1")
    assert obtain("k3", "stages = {align = {learning_rate = 1e-4}}")[1] > other


def test_weights_laid_over_a_finished_model_are_given_and_its_own_kind_of_work_does_not_undo_them(tmp_path):
    run = open_run("stage1", profile="smoke", out=tmp_path)
    run.obtain("models/stage1", train("ours"))
    (tmp_path / "models" / "stage1" / "weights").write_text("better ones")
    again = open_run("stage1", profile="smoke", seed=1, out=tmp_path)
    assert again.obtain("models/stage1", train("anew")) == {"models/stage1": "given"} and weights(run) == "better ones"


def test_finished_answers_are_gone_on_with_by_the_same_work_and_made_anew_by_another_notebook(tmp_path, monkeypatch):
    run = open_run("repetition", profile="smoke", out=tmp_path)

    def ask() -> bool:
        with run.making("answers/repetition") as folder:
            there = (folder / "answers.jsonl").exists()
            (folder / "answers.jsonl").touch()
        return there

    assert [ask(), ask()] == [False, True]
    monkeypatch.setenv(RESUME_KEY, "k1")
    assert ask(), "work done by hand counts"
    monkeypatch.setenv(FORCE_KEY, "1")
    assert not ask()
    monkeypatch.delenv(FORCE_KEY)
    monkeypatch.setenv(RESUME_KEY, "k2")
    assert [ask(), ask()] == [False, True]


def test_a_model_without_a_history_is_read_as_one_trained_elsewhere(tmp_path):
    folder = tmp_path / "given"
    shutil.copytree(bundled("tiny_model"), folder)
    assert losses_of(folder).empty and "unknown" in training_time({"models/stage3": "given"})
    fig, frame = figures_of(folder)
    assert any("trained elsewhere" in text.get_text() for text in fig.axes[0].texts) and len(frame) == 1


def figures_of(folder):
    from medv.companion.figures.studies import stage_figure

    findings = pd.DataFrame([{"system": "a", "metric": "f1", "value": 5.0, "low": 4.0, "high": 6.0}])
    return stage_figure(losses_of(folder), findings, get_profile("smoke").name)
