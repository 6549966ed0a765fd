"""Converting checkpoints: bit-exact there and back, one sentence for what is wrong, nothing left of what failed."""

import json
import pickle
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from command import run
from damaged import edit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, EfficientNetConfig

from medv.checkpoints.assembly import assemble
from medv.checkpoints.bundled import load_model
from medv.checkpoints.convert import convert
from medv.checkpoints.loading import load_tokenizer
from medv.checkpoints.shards import INDEX, PICKLED_INDEX
from medv.model.configuration import MedVConfig
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.twin import causal_twin, language_tower

MANY = {"shard_bytes": 20_000, "quiet": True}  # cuts even the tests' model into shards
VIEWS = {"image_aspect": "anyres", "image_grid": [[32, 64], [64, 32]], "patch_merge": "spatial_unpad"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny.model(image_max_tiles=2, **VIEWS)
    model.save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vision_dir(model_dir, tmp_path_factory):
    """A SigLIP release as it is published: one layer more, a head and a text tower."""
    folder = tmp_path_factory.mktemp("siglip")
    own = MedVForMaskedDiffusion.from_pretrained(model_dir)
    kept = own.config.vision_config.num_hidden_layers
    tower = {f"vision_model.{k}": v.clone() for k, v in own.model.vision_tower.state_dict().items()}
    last = f"vision_model.encoder.layers.{kept - 1}."
    extra = {k.replace(last, f"vision_model.encoder.layers.{kept}."): v + 1 for k, v in tower.items() if last in k}
    others = {"vision_model.head.probe": torch.ones(1), "text_model.final.bias": torch.ones(2), "logit_scale": torch.ones(1)}
    save_file(tower | extra | others, folder / "model.safetensors")
    vision = own.config.vision_config.to_dict() | {"num_hidden_layers": kept + 1}
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))
    return folder


@pytest.fixture
def released(model_dir, tmp_path):
    """The model in LLaDA-V's layout, in several shards."""
    convert(model_dir, tmp_path / "lladav", to="lladav", **MANY)
    assert len(list((tmp_path / "lladav").glob("*.safetensors"))) > 2
    return tmp_path / "lladav"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_lladav_and_back_is_bit_exact_in_half_precision_too(model_dir, vision_dir, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        source = tmp_path / f"source-{dtype}"
        MedVForMaskedDiffusion.from_pretrained(model_dir, dtype=dtype).save_pretrained(source)
        convert(source, tmp_path / f"released-{dtype}", to="lladav", **MANY)
        convert(tmp_path / f"released-{dtype}", tmp_path / f"again-{dtype}", vision=vision_dir, **MANY)
        assert same(weights(source), weights(tmp_path / f"again-{dtype}"))


def test_a_language_tower_goes_to_llada8b_and_back(model_dir, tmp_path):
    model = MedVForMaskedDiffusion.from_pretrained(model_dir)
    convert(model_dir, tmp_path / "llada", to="llada8b", **MANY)
    assert "d_model" in json.loads((tmp_path / "llada/config.json").read_text())
    assert convert(tmp_path / "llada", tmp_path / "tower", **MANY) == "language tower"
    wanted = {k: v for k, v in language_tower(model).state_dict().items() if k in weights(tmp_path / "tower")}
    assert same(weights(tmp_path / "tower"), wanted)


def test_the_parts_of_a_release_assemble_to_the_model_they_came_from(model_dir, vision_dir, tmp_path):
    convert(model_dir, tmp_path / "llada", to="llada8b", **MANY)
    convert(tmp_path / "llada", tmp_path / "language", **MANY)
    convert(vision_dir, tmp_path / "vision", **MANY)
    convert(model_dir, tmp_path / "stage1", to="projector", **MANY)
    convert(tmp_path / "stage1/mm_projector.bin", tmp_path / "projector", **MANY)
    tiny.tokenizer().save_pretrained(tmp_path / "language")
    built = assemble(
        tmp_path / "language", tmp_path / "vision", seed=5, projector=tmp_path / "projector", **VIEWS, image_max_tiles=2
    )
    wanted = MedVForMaskedDiffusion.from_pretrained(model_dir).state_dict()
    found = built.state_dict()
    assert same({k: v for k, v in found.items() if "newline" not in k}, {k: v for k, v in wanted.items() if "newline" not in k})


def test_a_converted_model_loads_by_the_auto_classes_without_remote_code(released, vision_dir, tmp_path):
    tiny.tokenizer().save_pretrained(released)
    convert(released, tmp_path / "medv", vision=vision_dir, **MANY)
    model = AutoModel.from_pretrained(tmp_path / "medv")
    assert isinstance(model, MedVForMaskedDiffusion) and model.config.image_grid == VIEWS["image_grid"]
    processor = AutoProcessor.from_pretrained(tmp_path / "medv")
    inputs = processor(images=tiny.picture(1), text="What is shown?", return_tensors="pt")
    assert model(**inputs).logits.isfinite().all()
    placed = AutoModel.from_pretrained(tmp_path / "medv", device_map="auto")
    assert torch.equal(placed(**inputs).logits, model(**inputs).logits)
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj"))
    assert torch.equal(adapted(**inputs).logits, placed(**inputs).logits)


def damage(folder: Path, kind: str) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / INDEX).read_text())
    if kind == "truncated":
        shards[1].write_bytes(shards[1].read_bytes()[:-10])
    elif kind == "missing shard":
        shards[1].unlink()
    elif kind == "wrong shape":
        held = load_file(shards[-1])
        name = min(held)
        save_file(held | {name: torch.zeros(3, 5)}, shards[-1])
    elif kind == "foreign tensor":
        save_file(load_file(shards[-1]) | {"model.layers.0.self_attn.rotary.bias": torch.zeros(1)}, shards[-1])
    elif kind == "lost tensor":
        held = load_file(shards[-1])
        name = min(held)
        del held[name], index["weight_map"][name]
        save_file(held, shards[-1])
        (folder / INDEX).write_text(json.dumps(index))
    elif kind == "index outside":
        name = min(index["weight_map"])
        (folder / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], name: "../x.safetensors"}}))
    elif kind == "no configuration":
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("truncated", "model-00002-of-.*not a whole safetensors file"),
        ("missing shard", "lacks model-00002-of-"),
        ("wrong shape", r"1 of the wrong shape: .*\(is \[3, 5\], should be"),
        ("foreign tensor", "1 unexpected: .*rotary"),
        ("lost tensor", "1 missing: "),
        ("index outside", "outside its own folder"),
        ("no configuration", "config.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence_and_leaves_no_target(released, vision_dir, tmp_path, kind, says):
    damage(released, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        convert(released, tmp_path / "out" / "medv", vision=vision_dir, quiet=True)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_aspect_ratio": 5}, "cannot be used"),
        ({"image_grid_pinpoints": [1, 2]}, "cannot be used"),
        ({"image_grid_pinpoints": "[["}, "image_grid_pinpoints line 1: not JSON"),
        ({"image_grid_pinpoints": '[[1, "a"]]'}, "cannot be used"),
        ({"mm_patch_merge_type": 7}, "cannot be used"),
        ({"hidden_size": "abc"}, "cannot be used"),
        ({"hidden_size": -4}, "cannot be used"),
        ({"num_attention_heads": 0}, "cannot be used"),
        ({"rope_parameters": "x", "rope_theta": None}, "cannot be used"),
        ({"rope_theta": 0}, "cannot be used"),
        ({"bos_token_id": [1]}, "cannot be used"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1: it must be at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0: it must be at least 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True: it must be a whole number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05: it must be above 0"),
        ({"head_dim": 8}, "head_dim is 8, but hidden_size 32 is cut into 2 heads"),
        ({"text_config": 4}, "cannot be used"),
        ({"num_hidden_layers": 100_000_000}, "says num_hidden_layers = 100000000, but there are"),
    ],
)
def test_a_configuration_of_nonsense_is_one_sentence_and_soon(released, vision_dir, tmp_path, changes, says):
    edit(released / "config.json", **changes)
    with pytest.raises(ValueError, match=says):
        convert(released, tmp_path / "out", vision=vision_dir, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_tensor_in_two_pickled_files_is_refused(tmp_path):
    (tmp_path / "pickled").mkdir()
    for number in (1, 2):
        torch.save({"lm_head.weight": torch.full((2,), float(number))}, tmp_path / f"pickled/pytorch_model-{number}.bin")
    with pytest.raises(ValueError, match=r"lm_head.weight is in two files"):
        convert(tmp_path / "pickled", tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("pattern", ["pytorch_model-{:05}-of-00003.bin", "model-{:05}-of-00003.safetensors"])
def test_shards_that_are_not_all_there_are_named_and_nothing_is_written(tmp_path, pattern, indexed):
    source = tmp_path / "source"
    source.mkdir()
    for number in (1, 2, 3):
        save = torch.save if pattern.endswith(".bin") else save_file
        save({f"vision_model.{number}.weight": torch.ones(2)}, source / pattern.format(number))
    (source / "config.json").write_text("{}")
    if indexed:
        places = {f"vision_model.{number}.weight": pattern.format(number) for number in (1, 2, 3)}
        index = PICKLED_INDEX if pattern.endswith(".bin") else INDEX
        (source / index).write_text(json.dumps({"weight_map": places}))
    for number in (1, 3):
        (source / pattern.format(number)).unlink()
    names = re.escape(f"lacks {pattern.format(1)}, {pattern.format(3)}, which")
    with pytest.raises(FileNotFoundError, match=names):
        convert(source, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_pickled_shard_without_a_tensor_of_its_index_is_refused(tmp_path):
    (tmp_path / "source").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "source/pytorch_model-00001-of-00001.bin")
    places = dict.fromkeys("ab", "pytorch_model-00001-of-00001.bin")
    (tmp_path / "source" / PICKLED_INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match="lacks b, which the index"):
        convert(tmp_path / "source", tmp_path / "out", quiet=True)


def test_unpickled_weights_keep_their_tokenizer_and_their_values_whatever_their_order_in_memory(tmp_path):
    kept = ("merges.txt", "vocab.txt", "vocab.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja")
    (tmp_path / "source").mkdir()
    weights = {"a.weight": torch.arange(6.0).view(2, 3).T, "b.weight": torch.ones(4)[:2]}
    torch.save(weights, tmp_path / "source/pytorch_model.bin")
    for name in (*kept, "training_args.bin", PICKLED_INDEX.replace("pytorch_model", "old")):
        (tmp_path / "source" / name).write_text("{}")
    assert convert(tmp_path / "source", tmp_path / "out", quiet=True) == "safetensors"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*kept, "model.safetensors"}
    assert same(load_file(tmp_path / "out/model.safetensors"), weights)


def test_a_language_tower_has_the_tokenizer_of_its_source_in_whatever_files_it_was(model_dir, tmp_path):
    source, held = tmp_path / "llada", json.loads((model_dir / "tokenizer.json").read_text())["model"]
    convert(model_dir, source, to="llada8b", quiet=True)
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "vocab.json").write_text(json.dumps(held["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in held["merges"]]
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    convert(source, tmp_path / "tower", quiet=True)
    before, after = AutoTokenizer.from_pretrained(source), load_tokenizer(tmp_path / "tower")
    for text in (*tiny.QUESTIONS, "a mass <|eot_id|>"):
        assert before.encode(text) == after.encode(text)


def test_a_layout_is_refused_where_the_names_of_the_tensors_are_kept(vision_dir, tmp_path):
    (tmp_path / "source").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "source/pytorch_model.bin")
    for source, kind in ((vision_dir, "SigLIP"), (tmp_path / "source", "pickled"), (tmp_path / "source/pytorch_model.bin", "")):
        for to in ("medv", "lladav", "llada8b"):
            with pytest.raises(ValueError, match=rf"--to {to} would have no effect: .* is .*{kind}"):
                convert(source, tmp_path / "out", to=to, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_vision_tower_keeps_how_its_images_are_prepared(vision_dir, tmp_path):
    shutil.copytree(vision_dir, tmp_path / "siglip")
    settings = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.27, 0.26, 0.28]}
    (tmp_path / "siglip/preprocessor_config.json").write_text(json.dumps(settings))
    convert(tmp_path / "siglip", tmp_path / "vision", quiet=True)
    tower = tmp_path / "language"
    language_tower(tiny.model()).save_pretrained(tower)
    tiny.tokenizer().save_pretrained(tower)
    assert assemble(tower, tmp_path / "vision", seed=0).config.image_mean == settings["image_mean"]
    for name, wrong in {"image_mean": None, "image_std": [0.0, 0.5, 0.5]}.items():
        (tmp_path / "vision/preprocessor_config.json").write_text(json.dumps(settings | {name: wrong}))
        with pytest.raises(ValueError, match=f"says {name} = .* three colours"):
            assemble(tower, tmp_path / "vision", seed=0)
    for name, wrong in {"do_normalize": False, "rescale_factor": 1.0, "include_top": True, "rescale_offset": True}.items():
        (tmp_path / "vision/preprocessor_config.json").write_text(json.dumps(settings | {name: wrong}))
        with pytest.raises(ValueError, match=f"says {name} = {wrong}, which medv does not compute"):
            assemble(tower, tmp_path / "vision", seed=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.5},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"alibi": True},
        {"clip_qkv": 8.0},
        {"layer_norm_type": "low_precision"},
    ],
    ids=str,
)
def test_a_release_that_computes_otherwise_is_refused(model_dir, tmp_path, changes):
    for to in ("llada8b", "lladav"):
        convert(model_dir, tmp_path / to, to=to, quiet=True)
        edit(tmp_path / to / "config.json", **changes)
        with pytest.raises(ValueError, match=r"asks for .*, which medv does not compute"):
            convert(tmp_path / to, tmp_path / "out", to="lladav" if to == "llada8b" else "llada8b", quiet=True)


@pytest.mark.parametrize("place", ["released.image_settings", "convert.mismatches", "convert._renamed"])
@pytest.mark.parametrize("kind", [KeyError, RuntimeError, ZeroDivisionError])
def test_a_fault_of_our_own_is_not_taken_for_a_bad_configuration(released, vision_dir, tmp_path, monkeypatch, place, kind):
    def faulty(*_):
        raise kind("ours")

    monkeypatch.setattr(f"medv.checkpoints.{place}", faulty)
    with pytest.raises(kind, match="ours"):
        convert(released, tmp_path / "out", vision=vision_dir, quiet=True)


@pytest.mark.parametrize(("top", "text"), [(True, False), (False, True)])
def test_a_tie_that_one_half_of_a_configuration_says_holds_for_what_is_written(model_dir, tmp_path, top, text):
    shutil.copytree(model_dir, tmp_path / "source")
    settings = json.loads((model_dir / "config.json").read_text())
    inner = settings["text_config"] | {"tie_word_embeddings": text}
    edit(tmp_path / "source/config.json", tie_word_embeddings=top, text_config=inner)
    for to, name in (("lladav", "tie_word_embeddings"), ("llada8b", "weight_tying")):
        convert(tmp_path / "source", tmp_path / to, to=to, quiet=True)
        assert json.loads((tmp_path / to / "config.json").read_text())[name] is True


def test_what_the_layouts_of_the_reference_cannot_hold_does_not_become_one(tmp_path):
    causal_twin(tiny.model()).save_pretrained(tmp_path / "twin")
    vision = EfficientNetConfig(image_size=64, hidden_dim=16, depth_coefficient=0.1, width_coefficient=0.1)
    other = MedVConfig(vision_config=vision, text_config=tiny.model().config.text_config)
    MedVForMaskedDiffusion(other).save_pretrained(tmp_path / "other")
    for source, says in (("twin", "type 'llada_medv_twin'"), ("other", "tower is of the type efficientnet")):
        with pytest.raises(ValueError, match=says):
            convert(tmp_path / source, tmp_path / "out", to="lladav", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "lost"),
    [
        ("lladav", "embed_tokens"),
        ("lladav", "layers.1.mlp.up_proj"),
        ("lladav", "projector.linear_2.bias"),
        ("llada8b", "embed_tokens"),
        ("llada8b", "layers.1.mlp.up_proj"),
    ],
)
def test_an_incomplete_model_does_not_leave(model_dir, tmp_path, to, lost):
    shutil.copytree(model_dir, tmp_path / "source")
    held = weights(model_dir)
    save_file({k: v for k, v in held.items() if lost not in k}, tmp_path / "source/model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: |no token table"):
        convert(tmp_path / "source", tmp_path / "out", to=to, quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lost", ["wte", "ff_norm"])
def test_an_incomplete_llada8b_is_one_sentence(model_dir, tmp_path, lost):
    convert(model_dir, tmp_path / "llada", to="llada8b", quiet=True)
    held = weights(tmp_path / "llada")
    save_file({k: v for k, v in held.items() if lost not in k}, tmp_path / "llada/model.safetensors")
    for to in ("medv", "lladav"):
        with pytest.raises(ValueError, match=r" missing: |no token table"):
            convert(tmp_path / "llada", tmp_path / "out", to=to, quiet=True)


def test_sizes_survive_the_way_from_llada8b_to_lladav(model_dir, tmp_path):
    convert(model_dir, tmp_path / "llada", to="llada8b", quiet=True)
    convert(tmp_path / "llada", tmp_path / "released", to="lladav", quiet=True)
    written = json.loads((tmp_path / "released/config.json").read_text())
    own = MedVForMaskedDiffusion.from_pretrained(model_dir).config.text_config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    assert {name: written[name] for name in names} == {name: getattr(own, name) for name in names}
    assert written["rope_theta"] == own.rope_parameters["rope_theta"]
    assert "mm_hidden_size" not in written


def test_pooled_images_come_back_pooled(vision_dir, tmp_path):
    tiny.model(image_pool=2).save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "released", to="lladav", quiet=True)
    convert(tmp_path / "released", tmp_path / "again", vision=vision_dir, quiet=True)
    assert MedVForMaskedDiffusion.from_pretrained(tmp_path / "again").config.image_pool == 2


def test_a_checkpoint_is_not_converted_to_what_it_is(model_dir, released, tmp_path):
    for source, to in ((model_dir, "medv"), (released, "lladav")):
        with pytest.raises(ValueError, match="already"):
            convert(source, tmp_path / "out", to=to, quiet=True)


def test_code_that_a_release_brings_stays_behind(released, vision_dir, tmp_path):
    tiny.tokenizer().save_pretrained(released)
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((released / name).read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
        (released / name).write_text(json.dumps(settings))
    convert(released, tmp_path / "medv", vision=vision_dir, quiet=True)
    assert "auto_map" not in "".join(file.read_text() for file in (tmp_path / "medv").glob("*.json"))
    assert isinstance(load_model(tmp_path / "medv")[0], MedVForMaskedDiffusion)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("went-off"),))


def test_a_pickle_bomb_does_not_go_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mm_projector.bin").write_bytes(pickle.dumps({"model.mm_projector.0.weight": Bomb()}))
    torch.save({"model.mm_projector.0.weight": Bomb()}, tmp_path / "zipped.bin")
    for name in ("mm_projector.bin", "zipped.bin"):
        result = run("convert", name, "out")
        assert result.exit_code == 2 and "not a plain file of tensors" in " ".join(result.output.split())
    assert not (tmp_path / "went-off").exists() and not (tmp_path / "out").exists()


def test_a_target_that_exists_is_never_overwritten(model_dir, tmp_path):
    (tmp_path / "kept").write_text("mine")
    result = run("convert", str(model_dir), str(tmp_path))
    assert result.exit_code == 2 and (tmp_path / "kept").read_text() == "mine"


def test_a_vision_tower_of_unknown_heads_asks_for_its_folder(released, tmp_path):
    with pytest.raises(ValueError, match="--vision"):
        convert(released, tmp_path / "medv", quiet=True)


def test_towers_are_put_together_by_assemble_and_never_dropped_in_silence(model_dir, vision_dir, tmp_path):
    language, target = tmp_path / "llada", tmp_path / "medv"
    convert(model_dir, language, to="llada8b", **MANY)
    for source, options in ((language, {}), (vision_dir, {}), (model_dir, {"to": "lladav"})):
        with pytest.raises(ValueError, match=r"--vision .* put them together with `medv assemble"):
            convert(source, target, vision=vision_dir, quiet=True, **options)
    assert not target.exists()
    convert(language, tmp_path / "language", **MANY)
    command = ["train", "align", "--profile", "smoke", "--init", str(tmp_path / "language"), "--out", str(target)]
    done = run(*command)
    assert done.exit_code == 2 and "type 'llama'" in done.output and "`medv assemble`" in done.output
    assert "Traceback" not in done.output


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(root, monkeypatch, capsys):
    """400 MB convert, in a process of their own, within 100 MB above what the interpreter and its imports take."""
    script = root / "benchmarks" / "convert_memory.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--megabytes", "400"])
    runpy.run_path(str(script), run_name="__main__")
    result = json.loads(capsys.readouterr().out)
    assert result["checkpoint_bytes"] > 400e6 and result["peak_growth_bytes"] < 100e6
