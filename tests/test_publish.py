"""A model handed on: its card, the hub-ready folder, and a process that knows nothing but the plain install."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml
from command import run
from conftest import ROOT
from huggingface_hub import ModelCard
from tiny import examples, model, picture, processor

import medv
from medv.artifacts import Manifest, fingerprint
from medv.checkpoints import card
from medv.checkpoints.bundled import bundled, load_model, save_assembled
from medv.checkpoints.card import escape, finish_folder, is_own, kind_of, signed
from medv.companion.reproduction.publish import OWN, measurements, publish
from medv.companion.reproduction.run import _is_given, open_run
from medv.companion.studies.training_stages import AFTER
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.profiles import StageRecipe
from medv.training.launch import RunOptions
from medv.training.lora import LoraRecipe
from medv.training.stages import train_stage

RECIPE = StageRecipe(
    ("projector", "language_model"), samples=0, epochs=0.4, batch_size=2, learning_rate=1e-3, max_length=100, padding="none"
)
ALIGN = replace(RECIPE, trains=("projector",))
QUIET = RunOptions(quiet=True, checkpoints=False)
QUESTION = "Which side is it on?"
CONFIG = {"gen_length": 12, "block_length": 12, "steps": 6, "seed": 3}
FRESH = """
import importlib.util, sys

sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))  # None: as if it were not installed
for name in sys.argv[1].split(","):
    assert importlib.util.find_spec(name) is None, name
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with the model of stage 2, the figure of its notebook, a table that used it, and one that did not."""
    out = tmp_path_factory.mktemp("machine") / "run"
    second = open_run("stage2", profile="smoke", out=out)
    with second.making("models/stage2") as folder:
        train_stage(
            model(), processor(), RECIPE, examples(10), folder, QUIET, validation=examples(3), about={"stage": "instruct"}
        )
    rows = [("stage 2", "f1", 50.0, 40.0, 60.0, 7), ("stage 2, wrong image", "f1", 20.0, 10.0, 30.0, 7)]
    frame = pd.DataFrame(rows, columns=["system", "metric", "value", "low", "high", "n"])
    second.figure(plt.figure(figsize=(1, 1)), "stage2", frame, caption="losses | <b>facts</b>")
    length = open_run("length_control", profile="smoke", out=out)
    length.artifact("models/stage2")
    length.table(pd.DataFrame({"model": ["diffusion"]}), "table3")
    open_run("data", profile="smoke", out=out).table(pd.DataFrame({"set": ["phantoms"]}), "table8")
    for kind in ("json", "png", "svg", "csv"):
        (out / "figures" / f"notes.{kind}").write_text("[]")
    return out


@pytest.fixture(scope="module")
def published(made):
    """The folder that `medv publish` makes of it."""
    to = made.parent / "hub" / "tiny-stage2"
    done = run("publish", made / "models/stage2", "--to", to, "--license", "apache-2.0")
    assert done.exit_code == 0, done.output
    assert f"hf upload USER/tiny-stage2 {to}" in done.stderr.replace("\n", "")
    return to


def plain_install_lacks() -> set[str]:
    """The modules of the extras in pyproject.toml and of what only training needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {re.match(r"[\w.-]+", item)[0].lower() for group in project["optional-dependencies"].values() for item in group}
    extras = (extras | {"peft", "accelerate"}) - {"medv", "pyyaml"}  # the hub's client brings yaml
    names = importlib.metadata.packages_distributions().items()
    return {module for module, owners in names if {owner.lower() for owner in owners} & extras and module.isidentifier()}


@pytest.mark.slow
def test_a_published_model_answers_as_before_where_no_training_package_can_be_imported(made, published):
    before, _ = Answerer.load(made / "models/stage2", device="cpu").ask(picture(3), QUESTION, SamplerConfig(**CONFIG))
    picture(3).save(made.parent / "image.png")
    load = re.findall(r"```python\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)[0]
    assert len(re.findall(r"^\w+ = .*from_pretrained", load, re.MULTILINE)) == 2
    ask = f"""
from PIL import Image
from medv import SamplerConfig
inputs = processor(images=Image.open({str(made.parent / "image.png")!r}), text={QUESTION!r}, return_tensors="pt")
output = model.generate(**inputs, config=SamplerConfig(**{CONFIG}))
print(processor.decode_response(output.sequences[0], output.lengths[0]))
"""
    lacks = plain_install_lacks()
    assert {"deepspeed", "peft", "accelerate", "papermill", "datasets", "jupyterlab", "matplotlib"} <= lacks
    command = [sys.executable, "-c", FRESH + load + ask, ",".join(sorted(lacks))]
    done = subprocess.run(command, cwd=published, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip("\n") == before.text.strip("\n") and before.text


def test_the_folder_holds_a_whole_model_its_own_figures_and_no_path_of_the_machine(made, published):
    names = {file.relative_to(published).as_posix() for file in published.rglob("*") if file.is_file()}
    figures = {f"figures/{name}.{kind}" for name in ("stage2", "table3") for kind in ("png", "svg", "csv", "json")}
    weights = {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == figures | weights | {"README.md", "manifest.json", "run.json", "training.json", "history.json"}
    for name in names:
        data = (published / name).read_bytes()
        assert str(made.parent).encode() not in data and str(ROOT).encode() not in data, name
        if not name.endswith((".png", ".svg", ".safetensors")):
            assert not re.search(rb"""["' ]/[\w.-]+/[\w.-]""", data), name
    assert all(
        (published / name).stat().st_mode & 0o777 == (published / "config.json").stat().st_mode & 0o777 for name in names
    )
    manifest = Manifest.read(published)
    assert manifest.inputs == {"model": fingerprint(made / "models/stage2")}
    assert manifest.about["model"]["about"]["node"] == "stage2" and manifest.about["figures"] == ["stage2", "table3"]


def test_the_card_has_the_hubs_metadata_and_only_numbers_that_were_measured(made, published):
    text = (published / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("transformers", "apache-2.0", "image-text-to-text")
    assert {"medv", "masked-diffusion", "synthetic-data"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_value, result.dataset_name) == (
        50.0,
        "synthetic phantoms",
    ) and "40.0 to 60.0, n = 7" in result.metric_name
    assert r"| **stage 2** | synthetic phantoms | findings, f1 (%) | 50.0 \[40.0, 60.0\] | 7 |" in text
    assert "| stage 2, wrong image | synthetic phantoms |" in text
    assert "| 2, instruction tuning | 10 examples, drawn (phantoms) | 2 | 2 | 0.001 | sample, t iid |" in text
    assert "Not for clinical use" in text and r"losses \| &lt;b&gt;facts&lt;/b&gt;" in text and "hf upload" in text
    unmeasured = (made / "models/stage2/README.md").read_text()
    assert "not measured" in unmeasured and ModelCard(unmeasured).data.eval_results is None
    for found in (text, unmeasured):
        assert not re.search(r"\d{4}-\d\d-\d\d|machine", found), "no time, no place"


def test_scores_of_another_shape_are_refused_and_what_has_no_interval_is_no_measured_number(tmp_path):
    made = Manifest("stage2", about={"node": "stage2"})
    row = {"system": "stage 2", "metric": "f1", "value": 50.0, "low": 40.0, "high": 60.0, "n": 7}
    for rows, count in (([row], 1), ([row, row | {"low": None}, row | {"value": float("inf")}], 1)):
        pd.DataFrame(rows).to_csv(tmp_path / "stage2.csv", index=False)
        assert len(measurements(made, {"stage2": (tmp_path, made)})) == count
    for wrong in ({"value": "high"}, {"n": None}):
        pd.DataFrame([row | wrong]).to_csv(tmp_path / "stage2.csv", index=False)
        with pytest.raises(ValueError, match=r"stage2\.csv is no table of scores"):
            measurements(made, {"stage2": (tmp_path, made)})
    (tmp_path / "stage2.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match="no table of scores"):
        measurements(made, {"stage2": (tmp_path, made)})
    assert measurements(Manifest("x", about={"node": ["stage2"]}), {}) == []


def test_a_model_with_notes_of_others_is_published_or_refused_in_a_sentence(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bundled("tiny_model"), folder)
    (folder / "LICENSES").mkdir()
    Manifest("x", {"name": "../x"}, about={"contents": fingerprint(folder)}).write(folder)
    assert publish(folder, tmp_path / "hub")["card"] == "written"
    (folder / "training.json").write_text('{"recipe": null, "before": 3}')
    with pytest.raises(ValueError, match="not as medv writes it"):
        publish(folder, tmp_path / "other")


def test_the_names_of_the_scored_models_are_those_of_the_studies():
    assert OWN["stage3"] == ("vqa_controls", AFTER)
    source = (ROOT / "medv/companion/studies/training_stages.py").read_text()
    notebooks = "".join(path.read_text() for path in (ROOT / "notebooks").glob("1[01]_*.ipynb"))
    assert all(name in source + notebooks for _, name in OWN.values())


def test_a_model_is_brought_up_to_date_and_anything_else_in_its_place_is_refused(made, published, tmp_path):
    for name in ("old.png", "mine.png"):
        (published / "figures" / name).write_bytes(b"")
    manifest = json.loads((published / "manifest.json").read_text())
    manifest["about"]["figures"].append("old")  # as an earlier publication had it
    (published / "manifest.json").write_text(json.dumps(manifest))
    (published / "figures" / "mine").mkdir()
    (published / ".1a2b3c4d.partial.README.md").write_text("left by a killed publication")
    first = {file: file.read_bytes() for file in published.rglob("*") if file.is_file() and file.name != "manifest.json"}
    again = run("publish", made / "models/stage2", "--to", published, "--license", "apache-2.0", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["card"] == "written"
    assert {file: file.read_bytes() for file in first if file.exists()} == {
        f: d for f, d in first.items() if f.name != "old.png" and ".partial." not in f.name
    }
    (published / "figures" / "mine").rmdir()
    (published / "figures" / "mine.png").unlink()
    model(1).save_pretrained(tmp_path / "other")
    processor().save_pretrained(tmp_path / "other")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    refusals = {
        (tmp_path / "other", published): "made from something else (model",
        (tmp_path / "other", tmp_path / "mine"): "holds other files (thesis.tex)",
        (tmp_path / "other", tmp_path / "other" / "hub"): "lie in each other",
        (tmp_path / "mine", tmp_path / "new"): "holds no model: give the folder of a model",
        (tmp_path / "none", tmp_path / "new"): "is no folder",
        (bundled("language_tower"), tmp_path / "new"): "holds a language tower: give",
    }
    for (folder, to), said in refusals.items():
        done = run("publish", folder, "--to", to)
        assert done.exit_code == 2 and said in done.stderr and "--out" not in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists() and list((tmp_path / "mine").iterdir()) == [tmp_path / "mine" / "thesis.tex"]


def test_a_published_model_in_a_run_counts_as_put_there_by_hand(published):
    assert _is_given(published)


@pytest.mark.slow
def test_stage_one_and_adapters_become_whole_models(made, tmp_path):
    base = made / "models/stage2"
    start, tower = load_model(base)
    train_stage(start, tower, ALIGN, examples(10), tmp_path / "s1", QUIET, base={"model": str(base)})
    assert kind_of(tmp_path / "s1") == "projector" and not (tmp_path / "s1/model.safetensors").exists()
    start, tower = load_model(base)
    train_stage(start, tower, RECIPE, examples(10), tmp_path / "lora", replace(QUIET, lora=LoraRecipe(rank=2, alpha=4)))
    assert kind_of(tmp_path / "lora/adapter") == "adapter"
    adapter = (tmp_path / "lora/adapter/README.md").read_text()
    assert is_own(adapter) and ModelCard(adapter).data.library_name == "peft" and "LoRA of rank 2" in adapter
    for number, folder in enumerate((tmp_path / "s1", tmp_path / "lora/adapter")):
        done = run("publish", folder, "--to", tmp_path / f"whole{number}")
        assert done.exit_code == 0, done.output
        alone, expected = load_model(tmp_path / f"whole{number}")[0], load_model(folder)[0]
        assert all(value.equal(alone.state_dict()[name]) for name, value in expected.state_dict().items())
        text = (tmp_path / f"whole{number}/README.md").read_text()
        assert kind_of(tmp_path / f"whole{number}") == "model" and "MedVForMaskedDiffusion.from_pretrained" in text
        assert ModelCard(text).data.license == "other" and "Find out before you hand the" in text


def test_a_card_that_somebody_wrote_or_changed_is_never_overwritten(tmp_path):
    model().save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    before = fingerprint(tmp_path)
    finish_folder(tmp_path)
    text = (tmp_path / "README.md").read_text()
    finish_folder(tmp_path)
    assert (tmp_path / "README.md").read_text() == text and is_own(text) and fingerprint(tmp_path) == before
    (tmp_path / "README.md").write_text(text.replace("Never use", "Do not use"))
    finish_folder(tmp_path)
    assert "Do not use" in (tmp_path / "README.md").read_text()
    done = run("publish", tmp_path, "--to", tmp_path.parent / "hub2", "--json")
    assert json.loads(done.stdout)["card"].startswith("kept")
    assert "Do not use" in (tmp_path.parent / "hub2/README.md").read_text()


def test_every_kind_of_saved_folder_has_a_card_and_weights_that_others_may_read(tmp_path):
    save_assembled(bundled("language_tower"), bundled("vision_tower"), tmp_path / "start", seed=0, image_pool=2)
    text = (tmp_path / "start/README.md").read_text()
    assert "medv's bundled language tower" in text and ModelCard(text).data.license == "apache-2.0"
    assert run("convert", bundled("language_tower"), tmp_path / "llada8b", "--to", "llada8b").exit_code == 0
    assert not (tmp_path / "llada8b/README.md").exists(), "the layout of the reference has a card of its own"
    assert run("convert", tmp_path / "llada8b", tmp_path / "tower").exit_code == 0
    assert ModelCard((tmp_path / "tower/README.md").read_text()).data.pipeline_tag == "text-generation"
    for file in tmp_path.rglob("*.safetensors"):
        assert file.stat().st_mode & 0o777 == (file.parent / "config.json").stat().st_mode & 0o777


@pytest.mark.parametrize(
    "text", ["a|b", "<script>", "*x*", "[l](http://x)", "`c`", "two\nlines", "\x1b[2J", "__b__", "a\\b", "$x$"]
)
def test_text_from_files_is_shown_and_not_obeyed(text):
    shown = escape(text)
    assert "\n" not in shown and "\x1b" not in shown and "<" not in shown
    assert not re.search(r"(?<!\\)[|*\[\]`$]", shown) and not re.search(r"(?<!\\)(?<![A-Za-z0-9\\])_", shown)
    assert escape(card.Plain(text)) == text and escape("masked_sample, n = 3") == "masked_sample, n = 3"
    assert is_own(signed(text)) and not is_own(text)


def test_the_version_is_in_one_place_and_the_citation_and_the_changelog_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "medv.__version__"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    log = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", log, re.MULTILINE)
    assert (citation["version"], str(citation["date-released"])) == newest.groups() and newest[1] == medv.__version__
