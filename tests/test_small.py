"""The profile for one GPU: it begins from fetched towers, says what it needs and how long it takes, and its notebooks run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import run
from miniature import write_wheels
from safetensors.torch import load_file, save_file
from tiny import SHAPE

from medv import profiles
from medv.checkpoints.bundled import load_model, untrained_projector
from medv.companion.reproduction.budget import Work, measure, work_of
from medv.companion.reproduction.registry import all_nodes, nodes_for
from medv.companion.reproduction.run import open_run
from medv.companion.studies import initialization
from medv.companion.towers.wheels import make_towers
from medv.phantoms.sets import instruct_set
from medv.profiles import STAGES, SamplerSpec, get_profile
from medv.training.stages import towers

SMALL = get_profile("small")
SPEC = SamplerSpec(8, 8, 2)
FEW = {"align_steps": 1, "instruct_steps": 1, "descriptions": 2, "questions": 6, "batch_size": 2}
SCALED = replace(
    SMALL,
    model=replace(SMALL.model, image_size=64),
    stages={name: replace(recipe, samples=8, epochs=1, batch_size=4) for name, recipe in SMALL.stages.items()},
    describe=SPEC,
    answer=SPEC,
    evaluation_questions=8,
    evaluation_descriptions=4,
    lora=replace(SMALL.lora, sizes=(4,), steps=(1,), questions=4, padded_steps=1),
    initialization=replace(SMALL.initialization, **FEW, describe=SPEC, answer=SPEC),
)


@pytest.fixture(scope="module")
def fetched(tmp_path_factory) -> Path:
    """The folder of a run that holds miniature towers, for pictures of 64 pixels."""
    out = tmp_path_factory.mktemp("small")
    pins = write_wheels(out / "wheels")
    make_towers(out / "towers", wheels=out / "wheels", pinned=pins)
    for name, size in (("config.json", 64), ("preprocessor_config.json", {"height": 64, "width": 64})):
        file = out / "towers" / "vision_tower" / name
        settings = json.loads(file.read_text())
        settings["image_size" if name == "config.json" else "size"] = size
        file.write_text(json.dumps(settings))
    return out


@pytest.fixture
def scaled(monkeypatch):
    """The profile `small` with miniature numbers."""
    monkeypatch.setitem(profiles.PROFILES, "small", SCALED)


def run_cells(number: str, root: Path, out: Path) -> dict:
    """Run the code of a notebook at profile small in this process; returns its names."""
    (book,) = (root / "notebooks").glob(f"{number}_*.ipynb")
    names: dict = {"__name__": "__main__"}
    for cell in json.loads(book.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), book.name, "exec"), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                names |= {"profile": "small", "out": str(out)}
    return names


def test_the_model_that_stage_1_starts_from_is_made_anew_of_other_towers_and_of_no_others(fetched, scaled, tmp_path):
    shutil.copytree(fetched / "towers", tmp_path / "towers")
    run = open_run("stage1", profile="small", out=tmp_path)
    first = {file.name: file.stat().st_mtime_ns for file in run.start(None).iterdir()}
    assert {file.name: file.stat().st_mtime_ns for file in run.start(None).iterdir()} == first
    weights = tmp_path / "towers" / "language_tower" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: value + 1 for name, value in tensors.items()}, weights, metadata={"format": "pt"})
    network = load_model(run.start(None))[0]
    name = "model.norm.weight"
    torch.testing.assert_close(network.model.language_model.norm.weight.detach(), tensors[name] + 1)


@pytest.mark.slow
def test_its_notebooks_run_on_fetched_towers(root, fetched, scaled):
    run_cells("10", root, fetched)
    start = fetched / "models" / "start-seed0"
    assert untrained_projector(start) and not untrained_projector(fetched / "models" / "stage1")
    assert json.loads((fetched / "models/stage1/base.json").read_text())["model"].endswith("start-seed0")
    network = load_model(fetched / "models" / "stage1")[0]
    assert network.config.vision_config.model_type == "efficientnet" and network.config.feature_norm == "layer"
    names = run_cells("30", root, fetched)
    assert {arm.name for arm in names["arms"]} == {"LLaDA-MedV", "random"} and names["plan"].seeds == names["run"].profile.seeds
    assert "not measured" in initialization.conclusion(names["table"])
    manifest = json.loads((fetched / "figures" / "table4.json").read_text())
    assert "without LLaDA-MedV V1 and LLaDA-MedV V2" in manifest["about"]["gaps"][0]


def test_without_a_gpu_one_seed_is_enough(scaled, tmp_path):
    own = open_run("stage3", profile="small", out=tmp_path).profile
    assert len(own.seeds) == (3 if torch.cuda.is_available() else 1)
    assert own.lora.seeds == own.initialization.seeds == own.seeds
    assert set(own.lora.rates) == {0, 8, 32}, "full, and ranks 8 and 32"
    assert open_run("stage3", profile="tiny", out=tmp_path).profile == get_profile("tiny")


def test_the_explorer_asks_stage_2_where_no_model_is_bundled():
    for profile, needs in ((SMALL, ("models/stage2",)), (get_profile("tiny"), ())):
        assert next(node.needs for node in nodes_for(profile) if node.name == "explorer") == needs
    assert {node.name for node in nodes_for(SMALL)} == {node.name for node in all_nodes()}


def test_towers_that_are_missing_are_named_with_their_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"bring them with `medv towers small --out .*towers`"):
        towers(SMALL, tmp_path / "towers")
    with pytest.raises(FileNotFoundError, match=r"`medv towers small"):
        open_run("stage1", profile="small", out=tmp_path).start(None)
    with pytest.raises(ValueError, match=r"profile paper has no towers of its own: give .* with --init"):
        towers(get_profile("paper"))
    told = run("train", "pretrain", "--profile", "small", "--out", str(tmp_path / "made"))
    assert told.exit_code == 2 and "towers trained elsewhere" in told.stderr


def test_its_texts_fit():
    longest = max(sum(len(t.text.split()) for t in example.turns) for example in instruct_set("train", 50))
    assert 3 * longest < SMALL.stages["instruct"].max_length <= SMALL.model.max_positions
    assert SMALL.stages["align"].sources


# How long it takes.


def test_time_is_counted_work_times_measured_seconds():
    assert Work(2, 3, 4).seconds(Work(10, 100, 1000)) == 20 + 300 + 4000
    more = replace(SMALL, evaluation_descriptions=2 * SMALL.evaluation_descriptions)
    works = {node.name: work_of(node.name, SMALL) for node in all_nodes()}
    assert work_of("generation_settings", more).asked == 2 * works["generation_settings"].asked
    assert works["quickstart"] == Work() and all(works[stage].learned > 0 for stage in ("stage1", "stage2", "stage3", "lora"))
    assert works["stage3"].learned == 3 * work_of("stage3", replace(SMALL, seeds=(0,))).learned
    recipe = SMALL.stages["instruct"]
    assert works["stage2"].learned == recipe.samples * recipe.epochs
    unit = measure(replace(SCALED, model=replace(SHAPE, vocab_size=300)))
    assert min(unit.learned, unit.asked, unit.drawn) > 0


@pytest.mark.slow
def test_a_dry_run_and_doctor_say_what_it_needs_and_how_long_it_takes(monkeypatch):
    monkeypatch.setattr("medv.companion.reproduction.budget.measure", lambda profile: Work(1.0, 0.1, 0.01))
    told = run("reproduce", "--profile", "small", "--dry-run")
    assert told.exit_code == 0 and "runs/small/towers" in told.stdout and "VQA-RAD" in told.stdout
    hours = SMALL.stages["instruct"].samples * SMALL.stages["instruct"].epochs / 3600
    line = next(line for line in told.stdout.splitlines() if line.startswith("stage2 "))
    assert hours <= float(line.split()[1]) <= 1.5 * hours + 1 and line.endswith("h")
    assert "the same command goes on after a stop" in told.stdout and set(STAGES) == set(SMALL.stages)
    told = run("doctor", "--json")
    assert "medv towers small" in json.loads(told.stdout)["profile small"]
