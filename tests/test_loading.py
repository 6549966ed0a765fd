"""A folder is whole, finite and code-free when it is loaded, by every road; whatever is wrong with it is one quick sentence."""

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from command import SHORT, run, save_picture
from damaged import as_type, change, edit, half, resized, spoiled
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from medv.checkpoints.adapters import with_adapters
from medv.checkpoints.assembly import assemble
from medv.checkpoints.bundled import bundled, load_model, save_projector
from medv.checkpoints.loading import load_network, load_tokenizer
from medv.companion.studies.initialization import ARMS, initial
from medv.companion.towers.twin import obtain_twin
from medv.evaluation.baselines import CheckpointAnswerer, availability
from medv.profiles import get_profile
from medv.training.lora import LoraRecipe, attach_lora
from medv.training.stages import starting_point

CODE = "import pathlib; pathlib.Path('ran').touch()\nclass Own: pass\n"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(bundled("tiny_model"), tmp_path / "model"))


@pytest.fixture
def stage1(tmp_path, folder):
    """A projector on the model in `folder`."""
    model, processor = load_model(folder)
    save_projector(model, tmp_path / "stage1", {"model": str(folder)})
    processor.save_pretrained(tmp_path / "stage1")
    return tmp_path / "stage1"


@pytest.fixture
def adapter(tmp_path, folder):
    """Adapters on the model in `folder`."""
    attach_lora(load_model(folder)[0], LoraRecipe(4, 8)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def superfluous(tensors):
    return tensors | {"model.projector.linear_3.weight": torch.zeros(2)}


def refused(call, words, *, seconds=5.0):
    started = time.process_time()
    with pytest.raises((ValueError, OSError), match=words) as caught:
        call()
    assert time.process_time() - started < seconds
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    return str(caught.value)


WRONG_WEIGHTS = {
    "half of the tensors": (half, r"asks for \d+; \d+ missing"),
    "no vision tower": (without("vision_tower"), "missing"),
    "one bias less": (without("projector.linear_2.bias"), "1 missing: model.projector.linear_2.bias"),
    "NaN": (spoiled(float("nan")), "not finite .*projector.linear_1.weight"),
    "infinity": (spoiled(float("inf")), "not finite"),
    "minus infinity in the embedding": (spoiled(float("-inf"), "embed_tokens"), "not finite"),
    "int8": (as_type(torch.int8), "as I8"),
    "one int32": (lambda t: t | {"model.projector.linear_1.bias": t["model.projector.linear_1.bias"].int()}, "as I32"),
    "float8": (as_type(torch.float8_e4m3fn), "as F8"),
    "another shape": (resized, "1 mismatched"),
    "one more": (superfluous, "1 unexpected.*linear_3"),
    "one under two names": (lambda t: t | {n.removeprefix("model."): t[n] + 1 for n in list(t)[:1]}, "are one tensor"),
    "none at all": (lambda tensors: {}, "but there are 0 tensors"),
}


@pytest.mark.parametrize("kind", WRONG_WEIGHTS)
def test_weights_that_are_not_whole_floating_and_finite_are_refused(folder, kind):
    how, words = WRONG_WEIGHTS[kind]
    change(folder, how)
    assert str(folder) in refused(lambda: load_model(folder), words)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["half of the tensors", "NaN"])
def test_every_road_refuses_them(tmp_path, folder, stage1, adapter, kind):
    how, words = WRONG_WEIGHTS[kind]
    parts = {name: Path(shutil.copytree(bundled(name), tmp_path / name)) for name in ("language_tower", "vision_tower")}
    change(folder, how)
    for part, inside in (("language_tower", "mlp.up_proj"), ("vision_tower", "fc1.weight")):
        change(parts[part], how if kind != "NaN" else spoiled(float("nan"), inside))
    profile = get_profile("smoke")
    roads = [
        lambda: load_model(stage1),
        lambda: load_model(adapter),
        lambda: starting_point(profile, folder, seed=0),
        lambda: obtain_twin(profile, tmp_path / "out", source=folder),
        lambda: initial(ARMS[1], {"general": folder, "language": folder, "vision": folder}, profile, seed=0),
        lambda: assemble(parts["language_tower"], bundled("vision_tower"), seed=0),
        lambda: assemble(bundled("language_tower"), parts["vision_tower"], seed=0),
    ]
    for road in roads:
        refused(road, words if kind != "NaN" else "not finite")


@pytest.mark.slow
@pytest.mark.parametrize("how", [half, spoiled(float("nan"), "linear_1.weight"), as_type(torch.int8), superfluous])
def test_a_projector_or_adapters_that_are_not_whole_and_finite_are_refused(stage1, adapter, how):
    change(stage1, how, "projector.safetensors")
    change(adapter, how if how is not half else without("layers.1."), "adapter_model.safetensors")
    refused(lambda: load_model(stage1), "projector")
    refused(lambda: load_model(adapter), "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_each_floating_type_load_as_the_type_asked_for(folder, dtype):
    change(folder, as_type(dtype))
    for wanted in (torch.float32, torch.bfloat16):
        assert {value.dtype for value in load_model(folder, dtype=wanted)[0].parameters()} == {wanted}


def test_a_half_precision_tensor_whose_sum_overflows_is_finite_all_the_same(folder):
    change(folder, lambda t: {name: torch.full_like(value, 60_000).half() for name, value in t.items()})
    assert load_model(folder, dtype=torch.float16)[0].dtype == torch.float16


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1000])


def long_header(file):
    file.write_bytes((1 << 62).to_bytes(8, "little") + file.read_bytes()[8:])


@pytest.mark.parametrize("damage", [truncate, long_header, lambda f: f.write_bytes(b""), lambda f: f.write_bytes(b"x" * 99)])
def test_a_damaged_weight_file_is_one_sentence_at_the_command_line(tmp_path, folder, damage):
    damage(folder / "model.safetensors")
    save_picture(tmp_path / "a.png", "rgb")
    done = run("ask", tmp_path / "a.png", "What?", "--model", folder, *SHORT)
    assert done.exit_code == 2 and "not a whole safetensors file" in done.stderr and done.stderr.count("\n") == 1


WRONG_SETTINGS = {
    "text": ({"text_config__hidden_size": "abc"}, "cannot be loaded"),
    "no number": ({"vision_config__num_hidden_layers": None}, "."),
    "a list": ({"vision_config": [1]}, "."),
    "negative": ({"text_config__hidden_size": -128}, "."),
    "no heads": ({"text_config__num_attention_heads": 0}, "."),
    "100 million layers": ({"text_config__num_hidden_layers": 100_000_000}, "num_hidden_layers = 100000000"),
    "100 million vision layers": ({"vision_config__num_hidden_layers": 100_000_000}, "num_hidden_layers"),
    "a few layers more": ({"text_config__num_hidden_layers": 6}, "asks for"),
    "a layer less": ({"text_config__num_hidden_layers": 3}, "unexpected"),
    "width": ({"text_config__hidden_size": 1_000_000}, "asks for"),
    "vision width": ({"vision_config__hidden_size": 960_000}, "asks for"),
    "vocabulary": ({"text_config__vocab_size": 9_999_999}, "asks for"),
    "vocabulary over all": ({"text_config__vocab_size": 2**40}, "vocab_size"),
    "heads": ({"text_config__num_key_value_heads": 5_000_000}, "."),
    "positions": ({"text_config__max_position_embeddings": 10**12}, "max_position_embeddings"),
    "image size": ({"vision_config__image_size": 999_999}, "."),
    "patches": ({"vision_config__patch_size": 0}, "."),
    "pool": ({"image_pool": 0}, "."),
    "pool too": ({"image_pool": 999_999}, "."),
    "grid": ({"image_aspect": "anyres", "image_grid": [[63_999_936, 64]]}, "image_grid"),
    "grid of tiles": ({"image_aspect": "anyres", "image_grid": [[6_399_936, 6_399_936]]}, "tiles"),
    "grid of text": ({"image_aspect": "anyres", "image_grid": [["a", "b"]]}, "."),
    "grids": ({"image_aspect": "anyres", "image_grid": [[64, 64]] * 100_000}, "image_grid"),
    "tiles": ({"image_max_tiles": 999_999_999}, "image_max_tiles"),
    "a token beyond": ({"mask_token_id": 5_000}, "special tokens up to 5000"),
    "a negative token": ({"stop_token_ids": [-1]}, "."),
    "quantized": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantized"),
    "another file": ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
    "a kernel": ({"_attn_implementation": "someone/kernel"}, "someone/kernel"),
    "another model": ({"model_type": "llama"}, "'llama', not MedV's"),
    "no model": ({"model_type": None}, "not MedV's"),
    "epsilon": ({"text_config__rms_norm_eps": -1.0}, "rms_norm_eps = -1.0"),
    "base of the rope": ({"text_config__rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta = 0"),
    "rope": ({"text_config__rope_parameters": {"rope_type": "nothing"}}, "."),
    "activation": ({"projector_hidden_act": "nothing"}, "."),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRONG_SETTINGS)
def test_a_configuration_that_does_not_fit_is_refused_at_once(folder, kind):
    changes, words = WRONG_SETTINGS[kind]
    edit(folder / "config.json", **changes)
    assert str(folder) in refused(lambda: load_model(folder), words, seconds=3)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_processor__size": {"height": 999_999, "width": 999_999}},
        {"image_tokens": 10**9},
        {"image_tokens": "many"},
        {"image_aspect": "anyres", "image_grid": [[64 * 999_999, 64]]},
        {"image_processor__image_processor_type": "Nothing"},
    ],
)
def test_a_processor_that_does_not_fit_is_refused_at_once(folder, changes):
    edit(folder / "processor_config.json", **changes)
    refused(lambda: load_model(folder), str(folder), seconds=3)


@pytest.mark.parametrize("length", ["abc", [], {}])
def test_a_tokenizer_that_cannot_be_used_is_refused(folder, length):
    edit(folder / "tokenizer_config.json", model_max_length=length)
    refused(lambda: load_model(folder), "cannot be loaded")
    refused(lambda: load_tokenizer(folder), "cannot be loaded")


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"a": ' * 5000, "\udcff"])
def test_a_damaged_json_file_is_one_sentence(folder, file, text):
    (folder / file).write_bytes(text.encode(errors="surrogateescape"))
    refused(lambda: load_model(folder), ".")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja", "x.index.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_a_folder_with_a_file_that_never_ends_is_refused(folder, name, kind):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name) if kind == "a pipe" else (folder / name).symlink_to("/dev/zero")
    refused(lambda: load_model(folder), kind)


def sharded(folder, cut=2):
    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{cut:05d}.safetensors" for i in range(cut)]
    for i, name in enumerate(names):
        save_file(dict(tensors[i::cut]), folder / name, metadata={"format": "pt"})
    places = {name: names[i % cut] for i, (name, _) in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return names


def test_shards_load_as_one_file_does(folder):
    whole = load_model(folder)[0].state_dict()
    sharded(folder)
    assert all(value.equal(whole[name]) for name, value in load_model(folder)[0].state_dict().items())


@pytest.mark.parametrize("kind", ["missing", "outside", "absolute", "no names", "both", "pipe", "twice"])
def test_shards_that_are_missing_or_elsewhere_are_refused(tmp_path, folder, kind):
    first, second = sharded(folder)
    index = folder / "model.safetensors.index.json"
    if kind in ("missing", "pipe"):
        (folder / first).unlink()
        if kind == "pipe":
            os.mkfifo(folder / first)
    elif kind in ("outside", "absolute"):
        (folder / first).rename(tmp_path / first)
        there = f"../{first}" if kind == "outside" else str(tmp_path / first)
        index.write_text(index.read_text().replace(first, there))
    elif kind == "no names":
        edit(index, weight_map={"a": [1]})
    elif kind == "twice":
        both = load_file(folder / first) | load_file(folder / second)
        save_file(both, folder / second, metadata={"format": "pt"})
    else:
        shutil.copy(bundled("tiny_model") / "model.safetensors", folder)
    words = {"missing": "lacks", "no names": "weight_map", "both": "holds both", "pipe": "a pipe", "twice": "in two files"}
    refused(lambda: load_model(folder), words.get(kind, "outside its own folder"))


@pytest.mark.parametrize("file", ["model.safetensors", "projector.safetensors", "adapter_model.safetensors"])
def test_a_pickle_is_never_loaded_and_the_sentence_says_so(folder, stage1, adapter, file):
    place = {"model.safetensors": folder, "projector.safetensors": stage1, "adapter_model.safetensors": adapter}[file]
    weights = load_file(place / file)
    (place / file).unlink()
    name = "pytorch_model.bin" if file.startswith("model") else f"{Path(file).stem}.bin"
    torch.save(weights, place / name)
    refused(lambda: load_model(place), "pickle|no safetensors|projector.safetensors")


@pytest.mark.parametrize("files", [1, 2])
def test_a_pickled_model_loads_after_medv_convert_made_it_safetensors(tmp_path, folder, files):
    whole = load_model(folder)[0].state_dict()
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]  # tied, as a pickle holds them
    (folder / "model.safetensors").unlink()
    for i in range(files):
        torch.save(dict(list(weights.items())[i::files]), folder / f"pytorch_model-{i}.bin")
    refused(lambda: load_model(folder), "pytorch_model-0.bin, a pickle.*medv convert.*weights_only=True")
    assert run("convert", folder, tmp_path / "made").exit_code == 0
    assert all(value.equal(whole[name]) for name, value in load_model(tmp_path / "made")[0].state_dict().items())


def no_network(*_):
    raise AssertionError("a name was looked up")


@pytest.fixture
def offline(monkeypatch):
    """A machine whose every look-up of a name fails the test; the hub is not told to be offline."""
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        monkeypatch.setattr(sys.modules[module], "HF_HUB_OFFLINE", False, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)


def cache(root, name, config):
    """A checkpoint in the hub's cache."""
    folder = root / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0" * 40)
    (snapshot / "config.json").write_text(json.dumps(config))
    return snapshot


@pytest.mark.parametrize("name", ["nobody/nothing", "gpt2", "not an id", "a/b/c", "../x", "", None, "x" * 500])
def test_availability_looks_at_the_disk_alone(offline, name):
    assert availability(name).startswith("not available")


def test_what_the_hub_left_on_the_disk_is_found_and_asked_without_the_network(tmp_path, offline, monkeypatch):
    monkeypatch.setattr(sys.modules["huggingface_hub.constants"], "HF_HUB_CACHE", str(tmp_path))
    cache(tmp_path, "somebody/strange", {"model_type": "llava", "text_config": {"model_type": "nobody"}})
    coded = cache(tmp_path, "somebody/coded", {"model_type": "llava", "auto_map": {"AutoModel": "own.Own"}})
    (coded / "own.py").write_text(CODE)
    for name, words in (("somebody/strange", "cannot be loaded"), ("somebody/coded", "auto_map")):
        assert availability(name) == "on this machine"
        refused(lambda name=name: CheckpointAnswerer.load(name), words)
    refused(lambda: CheckpointAnswerer.load("nobody/nothing"), "is not on this machine")


@pytest.mark.parametrize("kind", ["llava_mistral", "llava_llada", "bert", None])
def test_a_checkpoint_of_a_type_that_transformers_cannot_ask_is_not_available(kind, tmp_path, offline, monkeypatch):
    monkeypatch.setattr(sys.modules["huggingface_hub.constants"], "HF_HUB_CACHE", str(tmp_path))
    cache(tmp_path, "microsoft/llava-med-v1.5-mistral-7b", {"model_type": kind})
    assert availability("microsoft/llava-med-v1.5-mistral-7b").endswith(f"of the type {kind!r}")


@pytest.fixture
def foreign(tmp_path):
    """A tiny LLaVA of transformers' own, without a processor."""
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    network = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text | {"num_attention_heads": 2}, vision_config=vision, image_token_id=3)
    )
    network.save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


def test_a_checkpoint_of_another_kind_is_whole_and_finite_too(foreign, offline):
    load = lambda: load_network(AutoModelForImageTextToText, foreign, dtype="auto")  # noqa: E731
    assert isinstance(load(), LlavaForConditionalGeneration)
    kept = (foreign / "model.safetensors").read_bytes()
    for how, words in ((half, "asks for"), (as_type(torch.int8), "as I8"), (spoiled(float("nan"), "mlp"), "not finite")):
        change(foreign, how)
        refused(load, words)
        (foreign / "model.safetensors").write_bytes(kept)
    edit(foreign / "config.json", text_config__num_hidden_layers=100_000_000)
    refused(load, "num_hidden_layers")


@pytest.mark.slow
def test_code_of_a_model_never_runs_whatever_is_typed(tmp_path, folder, monkeypatch):
    places = {
        "config.json": {"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"},
        "processor_config.json": {"auto_map": {"AutoProcessor": "own.Own"}},
        "preprocessor_config.json": {"auto_map": {"AutoImageProcessor": "own.Own"}},
    }
    save_picture(tmp_path / "a.png", "rgb")
    for name, changes in places.items():
        with_code = Path(shutil.copytree(folder, tmp_path / f"with-{name}"))
        (with_code / "own.py").write_text(CODE)
        if not (with_code / name).exists():
            (with_code / name).write_text("{}")
        edit(with_code / name, **changes)
        refused(lambda place=with_code: load_model(place), "auto_map")
    monkeypatch.chdir(tmp_path)
    done = run("ask", "a.png", "What?", "--model", with_code, *SHORT, typed="y\n" * 50)
    assert done.exit_code == 2 and "auto_map" in done.stderr and done.stdout == ""
    assert not list(tmp_path.rglob("ran"))


def test_code_of_what_lies_below_never_runs(tmp_path, folder, stage1, adapter):
    edit(folder / "config.json", auto_map={"AutoModel": "own.Own"})
    for place in (stage1, adapter):
        refused(lambda place=place: load_model(place), "auto_map")
    tower = Path(shutil.copytree(bundled("language_tower"), tmp_path / "tower"))
    edit(tower / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    refused(lambda: load_tokenizer(tower), "auto_map")
    refused(lambda: assemble(tower, bundled("vision_tower"), seed=0), "auto_map")


def test_a_result_behind_a_link_finds_its_base(tmp_path):
    """As on a cluster, where the output is a link to a faster disk."""
    (tmp_path / "fast/disk/result").mkdir(parents=True)
    (tmp_path / "result").symlink_to(tmp_path / "fast/disk/result")
    base = Path(shutil.copytree(bundled("tiny_model"), tmp_path / "base"))
    model, processor = load_model(base)
    save_projector(model, tmp_path / "result", {"model": str(base)})
    processor.save_pretrained(tmp_path / "result")
    attach_lora(model, LoraRecipe(rank=2)).save_pretrained(tmp_path / "result/adapter")
    for folder in (tmp_path / "result", tmp_path / "fast/disk/result/adapter"):
        assert load_model(folder)[0].get_input_embeddings().weight.equal(model.get_input_embeddings().weight)


@pytest.mark.parametrize("base", [".", "../stage1", "../other", "", 7, None, "../nowhere"])
def test_a_base_that_leads_nowhere_or_back_is_refused(tmp_path, stage1, base):
    shutil.copytree(stage1, tmp_path / "other")
    (tmp_path / "other/base.json").write_text('{"model": "../stage1"}')
    (stage1 / "base.json").write_text(json.dumps({"model": base}))
    refused(lambda: load_model(stage1), "leads back|names no base|there is no model")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model_name_or_path": "."}, "which is not there|leads back"),
        ({"base_model_name_or_path": 7}, "names the base 7"),
        ({"r": 1_000_000_000}, "asks for the ranks"),
        ({"r": "abc"}, "asks for the ranks"),
        ({"rank_pattern": {".*": 10**9}}, "asks for the ranks"),
        ({"peft_type": "PROMPT_TUNING"}, "knows LORA alone"),
        ({"megatron_config": {}, "megatron_core": "own"}, "megatron_core"),
        ({"target_modules": "nothing"}, "cannot be loaded"),
        ({"target_modules": "("}, "cannot be loaded"),
        ({"lora_alpha": "abc"}, "cannot be loaded"),
    ],
)
def test_adapters_of_another_kind_are_refused(adapter, changes, words):
    edit(adapter / "adapter_config.json", **changes)
    refused(lambda: load_model(adapter), words)


@pytest.mark.slow
def test_adapters_of_another_model_are_refused(tmp_path, adapter):
    general = load_model(bundled("general_model"))[0]
    assert with_adapters(general, adapter) is not None  # the same shape
    change(adapter, lambda t: {name: value[:, :7].contiguous() if value.dim() == 2 else value for name, value in t.items()},
           "adapter_model.safetensors")  # fmt: skip
    refused(lambda: load_model(adapter), "adapter")
