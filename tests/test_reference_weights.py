"""Conversion against the reference's own checkpoints: names, layouts, and every bit of the way there and back."""

import json

import pytest
import torch
from reference import FOLDER, converted_model, needs_reference, released_folder, vision_folder
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, SiglipVisionModel

from medv.checkpoints.convert import convert
from medv.checkpoints.released import llada8b_to_lladav, lladav_to_llada8b, lladav_to_medv, medv_to_lladav
from medv.model.modeling import MedVForMaskedDiffusion

pytestmark = needs_reference


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_the_key_map_is_the_reference_s():
    names = json.loads((FOLDER / "rename_map.json").read_text())
    for old, new in names.items():
        assert llada8b_to_lladav(old.replace("{i}", "3")) == new.replace("{i}", "3")
        assert lladav_to_llada8b(new.replace("{i}", "3")) == old.replace("{i}", "3")


def test_every_name_of_lladav_has_one_of_medv_and_back():
    names = list(json.loads((FOLDER / "weights_lladav_keys.json").read_text()))
    new = [lladav_to_medv(name) for name in names]
    assert None not in new and len(set(new)) == len(names)
    assert [medv_to_lladav(name) for name in new] == names


def test_llada8b_becomes_a_language_tower_and_comes_back_bit_for_bit(tmp_path):
    source = released_folder(tmp_path / "released", "weights_llada8b.safetensors")
    assert convert(source, tmp_path / "tower", quiet=True) == "language tower"
    whole = load_file(FOLDER / "weights_lladav.safetensors")
    tower = LlamaForCausalLM.from_pretrained(tmp_path / "tower", dtype="auto").state_dict()
    assert same(tower, {name: whole[name] for name in tower})
    assert convert(tmp_path / "tower", tmp_path / "back", to="llada8b", quiet=True) == "llada8b"
    assert same(load_file(tmp_path / "back/model.safetensors"), load_file(source / "model.safetensors"))


def test_lladav_becomes_a_model_and_comes_back_bit_for_bit(tmp_path):
    folder = converted_model(tmp_path)
    model, facts = MedVForMaskedDiffusion.from_pretrained(folder, output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"] and not facts["mismatched_keys"]
    whole = load_file(FOLDER / "weights_lladav.safetensors")
    assert same({medv_to_lladav(k): v for k, v in model.state_dict().items()}, whole)
    assert convert(folder, tmp_path / "back", to="lladav", quiet=True) == "lladav"
    assert same(load_file(tmp_path / "back/model.safetensors"), whole)
    assert convert(tmp_path / "back", tmp_path / "again", vision=tmp_path / "siglip", quiet=True) == "model"
    assert (tmp_path / "again/config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_the_language_part_of_a_model_leaves_as_llada8b(tmp_path):
    assert convert(converted_model(tmp_path), tmp_path / "back", to="llada8b", quiet=True) == "llada8b"
    assert same(load_file(tmp_path / "back/model.safetensors"), load_file(FOLDER / "weights_llada8b.safetensors"))


def test_a_projector_leaves_and_returns_bit_for_bit(tmp_path):
    folder = converted_model(tmp_path)
    assert convert(folder, tmp_path / "stage1", to="projector", quiet=True) == "projector"
    file = tmp_path / "stage1/mm_projector.bin"
    whole = load_file(FOLDER / "weights_lladav.safetensors")
    assert same(torch.load(file, weights_only=True), {k: v for k, v in whole.items() if "mm_projector" in k})
    assert convert(file, tmp_path / "projector", quiet=True) == "projector"
    own = MedVForMaskedDiffusion.from_pretrained(folder).model.projector.state_dict()
    assert same(load_file(tmp_path / "projector/projector.safetensors"), own)


def test_a_siglip_release_gives_the_tower_that_the_model_has(tmp_path):
    source = vision_folder(tmp_path / "siglip")
    assert convert(source, tmp_path / "tower", quiet=True) == "vision tower"
    tower = SiglipVisionModel.from_pretrained(tmp_path / "tower", vision_use_head=False)
    stored = load_file(source / "model.safetensors")
    assert tower.config.num_hidden_layers == json.loads((source / "config.json").read_text())["num_hidden_layers"] - 1
    own = {f"vision_model.{name}": value for name, value in tower.state_dict().items()}
    assert same(own, {name: stored[name] for name in own})


def test_a_checkpoint_without_its_tower_is_filled_from_siglip(tmp_path):
    source = released_folder(tmp_path / "bare", "weights_lladav.safetensors")
    bare = {k: v for k, v in load_file(source / "model.safetensors").items() if "vision_tower" not in k}
    save_file(bare, source / "model.safetensors")
    with pytest.raises(ValueError, match="no vision tower"):
        convert(source, tmp_path / "medv", quiet=True)
    convert(source, tmp_path / "medv", vision=vision_folder(tmp_path / "siglip"), quiet=True)
    assert MedVForMaskedDiffusion.from_pretrained(tmp_path / "medv").model.vision_tower is not None
