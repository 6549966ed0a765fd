"""The dial: frozen, printable, and true to the paper's sizes."""

import ast
import dataclasses
import json
import re

import pytest
import torch
from command import run
from tiny import model, picture, processor, special
from transformers import LlamaForCausalLM

from medv.checkpoints.assembly import shape_config
from medv.companion.studies.vqa_study import sampler_config
from medv.diffusion.config import SamplerConfig
from medv.diffusion.loss import NORMALIZATIONS
from medv.model.modeling import MedVForMaskedDiffusion
from medv.paper import table
from medv.profiles import PROFILES, STAGES, get_profile
from medv.training.collate import ENCODINGS, Collator
from medv.training.lora import PARTS
from medv.training.stream import TIMES

TABLE6_COLUMNS = [
    ("align", "llava_med_align", "alignment"),
    ("instruct", "llava_med_instruct", "md_sft"),
    *(("vqa", name, f"sd_sft_{name}") for name in ("vqa_rad", "slake", "pathvqa")),
]
EPOCH = ("--epochs", "1")
each_profile = pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)


@each_profile
def test_a_profile_is_frozen(profile):
    parts = [profile, profile.model, profile.describe, *profile.stages.values()]
    for part in parts:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, "changed")


@each_profile
def test_a_profile_is_json_and_a_copy(profile):
    copy = profile.to_dict()
    assert json.loads(json.dumps(copy))["name"] == profile.name
    copy["stages"]["align"]["samples"] = -1
    assert profile.stages["align"].samples >= 0


@each_profile
def test_a_profile_names_only_choices_that_exist(profile):
    assert tuple(profile.stages) == STAGES
    for recipe in profile.stages.values():
        assert recipe.loss_tokens in ENCODINGS and recipe.normalization in NORMALIZATIONS
        assert recipe.times in TIMES and set(recipe.trains) <= set(PARTS)
        Collator(special(), padding=recipe.padding)
    for spec in (profile.describe, profile.answer):
        assert isinstance(sampler_config(spec), SamplerConfig) and spec.batch_size >= 1
    assert profile.stages["align"].trains == ("projector",)


def test_no_module_and_no_notebook_asks_for_a_profile_by_name(root):
    """A comparison with a profile's name, or a table by their names, is a second dial."""
    cells = [cell for path in (root / "notebooks").glob("*.ipynb") for cell in json.loads(path.read_text())["cells"]]
    sources = {path: path.read_text(encoding="utf-8") for path in (root / "medv").rglob("*.py") if path.name != "profiles.py"}
    sources |= {number: "".join(cell["source"]) for number, cell in enumerate(cells) if cell["cell_type"] == "code"}
    for place, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Compare):
                assert not re.search(r"profile(_name)?\.name\b", ast.unparse(node)), f"{place}: {ast.unparse(node)}"
            elif isinstance(node, ast.Dict):
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                assert len(keys & set(PROFILES)) < 2, f"{place}: {ast.unparse(node)}"
            elif isinstance(node, ast.Subscript):
                assert "profile.name" not in ast.unparse(node.slice), f"{place}: {ast.unparse(node)}"


@each_profile
def test_heads_and_patches_divide_what_they_cut(profile):
    shape = profile.model
    assert shape.hidden_size % shape.heads == 0 and (
        not shape.vision_heads or shape.vision_hidden_size % shape.vision_heads == 0
    )
    side = shape.image_size // shape.patch_size
    assert side % shape.image_pool == 0 and shape.image_tokens == (side // shape.image_pool) ** 2


def test_a_profile_is_found_by_name_and_an_unknown_name_lists_the_others():
    assert all(get_profile(name) is profile for name, profile in PROFILES.items())
    with pytest.raises(ValueError, match=r"unknown profile 'big': use one of tiny, small, paper, smoke"):
        get_profile("big")


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_papers_language_tower_has_the_parameters_of_llada_8b():
    config = shape_config(get_profile("paper").model, special())
    with torch.device("meta"):
        tower = LlamaForCausalLM(config.text_config)
        whole = MedVForMaskedDiffusion(config)
    assert parameters(tower) == 8_015_581_184
    assert config.image_tokens == 729
    assert parameters(whole.model.language_model) + parameters(whole.lm_head) == 8_015_581_184


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 0.5e6, 3e6), ("small", 130e6, 150e6)])
def test_the_sizes_are_what_the_profiles_are_for(name, low, high):
    with torch.device("meta"):
        network = MedVForMaskedDiffusion(shape_config(get_profile(name).model, special()))
    assert low <= parameters(network) <= high


@pytest.mark.parametrize(("stage", "data", "column"), TABLE6_COLUMNS)
def test_every_data_set_of_table_6_has_its_own_recipe(stage, data, column):
    printed = table("table6").set_index("setting")[column]
    recipe = get_profile("paper").recipe(stage, data)
    assert recipe.samples == int(printed["training_samples"].replace("K", "000"))
    assert (recipe.epochs, recipe.batch_size) == (int(printed["epochs"]), int(printed["global_batch_size"]))
    assert get_profile("paper").with_recipe(stage, epochs=0.5).recipe(stage, data).epochs == 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("data", "options", "steps"), [("slake", (), 10), ("pathvqa", (), 7), ("slake", EPOCH, 1)])
def test_the_command_trains_on_a_data_set_by_its_own_recipe(tmp_path, data, options, steps):
    model().save_pretrained(tmp_path / "start")
    processor().save_pretrained(tmp_path / "start")
    (tmp_path / "images/train").mkdir(parents=True)
    picture(0).save(tmp_path / "images/train/a.png")
    row = {"q_lang": "en", "question": "Is it?", "answer": "yes", "answer_type": "CLOSED"}
    row |= {"image": "train/a.png", "img_name": "train/a.png"}
    file = tmp_path / ("train.json" if data == "slake" else "train.jsonl")
    rows = [row | {"qid": number, "id": number} for number in range(8)]
    file.write_text(json.dumps(rows) if data == "slake" else "\n".join(map(json.dumps, rows)))
    command = ["train", "vqa", "--profile", "paper", "--data", data, "--data-dir", str(tmp_path), "--json", *options]
    done = run(*command, "--init", str(tmp_path / "start"), "--device", "cpu", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == steps
