"""The profile for one GPU: its stages run from towers that it makes itself, and it says what it needs."""

import json
from dataclasses import replace

import pytest
from tiny import processor
from typer.testing import CliRunner

from medv.cli import app
from medv.data.phantom_sets import instruct_set
from medv.profiles import STAGES, get_profile
from medv.training import command

SMALL = get_profile("small")
SCALED = replace(
    SMALL,
    model=replace(SMALL.model, hidden_size=64, intermediate_size=96, layers=2, heads=2, vision_layers=1, image_size=64),
    stages={name: replace(recipe, samples=8, epochs=1, batch_size=4) for name, recipe in SMALL.stages.items()},
    pretrain=dict.fromkeys(SMALL.pretrain, 1) | {"texts": 20, "tower_images": 64},
)


def test_its_stages_run_one_after_another_from_towers_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "default_out", lambda name: tmp_path / name)
    init = None
    for stage in STAGES:
        facts = command.run_stage(stage, SCALED, tmp_path / stage, init=init, quiet=True)
        assert facts["steps"] == 2 and facts["loss"] > 0
        init = tmp_path / stage
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "small" / "towers").rglob("*.safetensors")}
    assert len(made) == 2, "a language and a vision tower"
    command.towers(SCALED)
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert json.loads((init / "speed.json").read_text())["rows"]


def test_it_needs_nothing_but_steps_for_its_towers():
    assert set(SMALL.pretrain) == set(get_profile("tiny").pretrain) and SMALL.stages["align"].sources
    with pytest.raises(ValueError, match=r"profile paper has no towers of its own: give .* with --init"):
        command.towers(get_profile("paper"))
    longest = max(len(processor().tokenizer(t.text)["input_ids"]) for e in instruct_set("train", 20) for t in e.turns)
    assert longest < SMALL.stages["instruct"].max_length <= SMALL.model.max_positions


def test_doctor_and_a_dry_run_say_what_it_needs():
    for arguments in (["doctor", "--json"], ["reproduce", "--profile", "small", "--dry-run"]):
        said = CliRunner().invoke(app, arguments)
        assert said.exit_code == 0, said.output
        assert "runs/small/towers" in said.stdout and "VQA-RAD" in said.stdout
