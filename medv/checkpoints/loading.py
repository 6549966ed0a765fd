"""Loading a network, tokenizer or processor from a folder that is not trusted; every loader of the library uses this module.

Nothing in the folder is executed and nothing is downloaded. Its contents are compared with its configuration before memory is
allocated, and a network that is returned is complete (no tensor missing, unexpected or of another shape) and finite. Only
safetensors are read. Every fault is one sentence with the folder and the mend.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import logging

from medv.checkpoints.shards import INDEX, SINGLE, StoredTensor, mismatches, pickles, read_object, shapes, stored_tensors
from medv.reading import check_regular

OFFLINE = {"local_files_only": True, "trust_remote_code": False}  # for every `from_pretrained` of transformers
FLOATS = ("F16", "BF16", "F32", "F64")
LARGEST_NUMBER = 10_000_000  # above every width, length or size in a configuration of today's models
LONGEST = 4096  # entries of a list in a configuration
LARGEST_TEXT = 256 << 20  # bytes of a configuration or a tokenizer
_SHOWN = 600  # characters of a list of tensors in an error
_REFUSED = {
    "auto_map": "names code of its own (auto_map), which medv never runs: convert it with `medv convert`, or take a "
    "checkpoint that transformers knows without code",
    "quantization_config": "is quantized, and medv computes with float16, bfloat16 and float32 weights alone: take the "
    "checkpoint it was made from",
    "transformers_weights": "names its weight file itself (transformers_weights), which medv does not follow: name the file "
    f"{SINGLE} and remove the line",
}


@contextmanager
def loading_errors(folder: Path) -> Iterator[None]:
    """Turn whatever a library raises while it reads `folder` into one ValueError with the folder and the mend.

    Warnings and tables that the libraries would print are suppressed.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # the libraries raise many kinds; of what they read here, all mean the same
        reason = shorten(str(error), 300) or "no reason given"
        raise ValueError(
            f"{folder} cannot be loaded ({type(error).__name__}: {reason}): "
            "its files are damaged or do not belong together; make or download it again"
        ) from error
    finally:
        logging.set_verbosity(level)


def check_folder(folder: Path) -> None:
    """Raises ValueError where a folder holds what must not be loaded: pipes, devices, foreign code, numbers beyond all models.

    Every JSON file beside the weights whose name has "config" in it is read, at any depth of its values.
    """
    for file in folder.iterdir():
        if not file.is_dir():
            check_regular(file)
            if file.suffix in (".json", ".jinja", ".txt", ".model") and file.stat().st_size > LARGEST_TEXT:
                raise ValueError(f"{file} has more than {LARGEST_TEXT} bytes: it does not belong to a model")
    for file in sorted(folder.glob("*config*.json")):
        for key, value in _pairs(read_object(file)):
            if key in _REFUSED and value:
                raise ValueError(f"{file} {_REFUSED[key]}")
            if key.endswith("attn_implementation") and "/" in str(value):
                raise ValueError(f"{file} asks for the downloaded code {value!r} ({key}): remove the line")
            if isinstance(value, list) and len(value) > LONGEST:
                raise ValueError(f"{file} has {len(value)} entries in {key}, over the limit of {LONGEST}")
            if file.name != "config.json" or not isinstance(value, int | float):
                continue
            if isinstance(value, int) and value > LARGEST_NUMBER and "theta" not in key:
                raise ValueError(f"{file} says {key} = {value}, over the limit of {LARGEST_NUMBER}: it is of no model")
            if (key.endswith("_eps") and value < 0) or (key.endswith("theta") and value <= 0):
                raise ValueError(f"{file} says {key} = {value}, which gives NaN: it must be positive")


def _pairs(value: Any, key: str | None = None) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested objects and lists; an item of a list has the key of the list."""
    if key is not None:
        yield key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _pairs(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _pairs(inner, key)


def load_network(
    kind: type[PreTrainedModel] | type[_BaseAutoModelClass],
    folder: Path,
    *,
    dtype: torch.dtype,
    without: tuple[str, ...] = (),
    **options,
) -> PreTrainedModel:
    """The network of a folder with config.json and safetensors, in evaluation mode and in `dtype` ("auto": as stored).

    kind: a class of transformers or of medv. without: prefixes of stored tensors that are left out. options: fields of the
    configuration to set. Raises FileNotFoundError where there is no such folder, ValueError for foreign code, pickled,
    quantized, missing, superfluous or non-finite weights.
    """
    check_folder(folder)
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        if pickled := pickles(folder):
            raise ValueError(
                f"{folder} holds its weights as {pickled[0].name}, a pickle, which could run code and is not loaded: "
                "`medv convert` reads such a folder with weights_only=True and writes safetensors"
            )
        raise FileNotFoundError(f"{folder} holds no {SINGLE}: give the folder of a whole model")
    tensors = stored_tensors(folder)
    check_depth(folder / "config.json", read_object(folder / "config.json"), tensors)
    with loading_errors(folder):
        stock = issubclass(kind, PreTrainedModel)
        config = (kind.config_class if stock else AutoConfig).from_pretrained(folder, **OFFLINE)
        for name, value in options.items():
            setattr(config, name, value)
        with torch.device("meta"):
            empty = kind(config) if stock else kind.from_config(config)
        empty.tie_weights()
    check_floats(folder, empty, tensors)
    seen: dict[str, str] = {}
    for name in tensors:  # transformers reads a name with and without the prefix of the network inside, the last one found
        bare = re.sub(rf"^(?:{re.escape(empty.base_model_prefix)}\.)+", "", name)
        if (other := seen.setdefault(bare, name)) != name:
            raise ValueError(f"{folder} holds {name} and {other}, which are one tensor: remove the one that does not belong")
    wanted = sum(value.numel() for value in empty.parameters())
    stored = sum(prod(tensor.shape) for tensor in tensors.values())
    if wanted > stored:
        problem = mismatches(untied_shapes(empty), shapes(tensors)) or "tensors are missing"
        raise ValueError(
            f"{folder} holds {stored} weights, but its configuration asks for {wanted}; {shorten(problem, _SHOWN)}: "
            "make or download it again"
        )
    how = {"dtype": dtype, "use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with loading_errors(folder):
        network, found = kind.from_pretrained(folder, config=config, **how, **OFFLINE)
    found["unexpected_keys"] = [name for name in found["unexpected_keys"] if not name.startswith(without)]
    if problems := [f"{len(names)} {fault.replace('_', ' ')}: {_shown(names)}" for fault, names in found.items() if names]:
        raise ValueError(f"{folder} does not fit its configuration; {'; '.join(problems)}")
    check_finite(folder, network)
    return network.eval()


def check_depth(source: Path | str, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Raises ValueError for a configuration of more layers than tensors: each would be made before it is found missing."""
    for key, value in _pairs(settings):
        if ("layers" in str(key) or key in ("n_layer", "depth")) and isinstance(value, int) and value > len(tensors):
            raise ValueError(f"{source} says {key} = {value}, but there are {len(tensors)} tensors: they do not fit")


def untied_shapes(network: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that a checkpoint of the network holds: of tied weights the first alone."""
    tied = set(network.all_tied_weights_keys)
    return {name: shape for name, shape in shapes(network.state_dict()).items() if name not in tied}


def check_floats(source: Path, network: nn.Module, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises ValueError where a stored tensor holds integers or packed numbers, unless that of the network does too."""
    held = network.state_dict()
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS and (name not in held or held[name].is_floating_point()):
            raise ValueError(
                f"{source} holds {name} as {tensor.dtype}: medv reads weights of the types {', '.join(FLOATS)}; "
                "take the checkpoint it was made from"
            )


def check_finite(source: Path, network: nn.Module) -> None:
    """Raises ValueError where a weight is NaN or infinite; one sum per tensor, at memory speed."""
    named = [*network.named_parameters(), *network.named_buffers()]
    named = [(name, value) for name, value in named if value.is_floating_point()]
    sums = torch.stack([value.detach().sum().float() for _, value in named]).isfinite().tolist() if named else []
    # A sum in half precision may overflow although every weight is finite: only then is each weight checked.
    if bad := [name for (name, value), fine in zip(named, sums, strict=True) if not fine and not value.isfinite().all().item()]:
        raise ValueError(
            f"{source} holds weights that are not finite (NaN or infinity), in {_shown(bad)}: "
            "it is damaged or its training diverged; train it again or take an earlier one"
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder; raises ValueError where none can be loaded without running its code."""
    return load_processor(AutoTokenizer, folder)


def load_processor(
    kind: type[ProcessorMixin] | type[AutoProcessor] | type[AutoTokenizer], folder: Path
) -> ProcessorMixin | PreTrainedTokenizerFast:
    """The processor of a folder, of a class of medv or `AutoProcessor`; raises ValueError as `load_tokenizer`."""
    check_folder(folder)
    with loading_errors(folder):
        loaded = kind.from_pretrained(folder, **OFFLINE)
        tokenizer = loaded if kind is AutoTokenizer else loaded.tokenizer
        tokenizer.decode(tokenizer.encode("a"))  # a setting of the wrong type (`model_max_length` as text) raises only here
    return loaded


def load_weights(module: nn.Module, file: Path) -> None:
    """Load one safetensors file into `module`, whose names and shapes it must have; raises ValueError."""
    tensors = stored_tensors(file)
    check_floats(file, module, tensors)
    if problem := mismatches(shapes(module.state_dict()), shapes(tensors)):
        raise ValueError(f"{file} does not fit the model; {shorten(problem, _SHOWN)}")
    with loading_errors(file):
        module.load_state_dict(load_file(file))
    check_finite(file, module)


def cached_folder(checkpoint: str) -> Path | None:
    """The folder of a checkpoint: a path, or the id of a downloaded model of the Hugging Face hub; None if neither.

    Looks at the disk only.
    """
    try:
        if Path(checkpoint).is_dir():
            return Path(checkpoint)
        found = try_to_load_from_cache(checkpoint, "config.json")
    except (OSError, ValueError):  # neither the form of a path nor that of an id
        return None
    return Path(found).parent if isinstance(found, str) else None


def _shown(names: Any) -> str:
    return shorten(", ".join(map(str, sorted(names, key=str))), _SHOWN)
