"""Labels say what a result was made of, at every profile: drawn images are phantoms, the package's models are named."""

import json

import pandas as pd
import pytest

from medv.artifacts import Manifest
from medv.checkpoints.bundled import bundled
from medv.companion.figures import plots as figures
from medv.companion.reproduction.run import label, open_run
from medv.data.example import Example, Turn
from medv.phantoms.sets import description_set, vqa_set
from medv.profiles import PROFILES, get_profile

PAPER = get_profile("paper")


@pytest.fixture
def real(tmp_path):
    return [Example("1", tmp_path / "1.png", (Turn("user", "What is shown?"), Turn("assistant", "A lung.")), "OPEN")]


def folder(tmp_path, hidden_size, layers):
    text = {"hidden_size": hidden_size, "num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "medv", "text_config": text}))
    return tmp_path


@pytest.mark.parametrize("profile", PROFILES)
def test_phantoms_are_phantoms_whatever_the_profile_and_the_data_set_are_called(profile, tmp_path):
    for examples in ((), vqa_set("test", 2), description_set("test", 2)):
        made = label(get_profile(profile), examples, folder(tmp_path, 4096, 32), "vqa_rad questions")
        assert made["data"] == "synthetic phantoms" and not made["comparable"]
        assert made["gaps"] == (["synthetic phantoms stand in for real images"] if profile == "paper" else [])


def test_a_result_of_phantoms_at_paper_is_neither_real_nor_comparable_nor_without_a_gap(tmp_path):
    run = open_run("stage3", profile="paper", out=tmp_path)
    run.figure(figures.new_figure()[0], "fig03", pd.DataFrame({"a": [1]}))
    about = Manifest.read(tmp_path / "figures" / "fig03.json").about
    assert about["data"].startswith("synthetic phantoms, profile paper: not comparable") and not about["comparable"]
    assert about["gaps"] == ["synthetic phantoms stand in for real images"]


def test_the_bundled_model_is_named_and_stands_in_where_another_was_wanted(real):
    made = label(PAPER, real, bundled("tiny_model"), "vqa_rad questions")
    assert made["data"] == "real vqa_rad questions, bundled tiny model" and not made["comparable"]
    assert made["gaps"] == ["the bundled tiny model stands in for a model of this profile"]
    assert label(get_profile("tiny"), (), bundled("tiny_model"))["gaps"] == []


def test_only_real_images_and_a_model_of_the_papers_size_compare_with_the_paper(real, tmp_path):
    assert label(PAPER, real, folder(tmp_path, 4096, 32), "x") == {"data": "real x", "comparable": True, "gaps": []}
    assert not label(PAPER, real, folder(tmp_path, 64, 2))["comparable"] and not label(PAPER, real)["comparable"]
