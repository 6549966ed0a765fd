"""Safetensors files on disk: what a checkpoint folder holds, and copying tensors under new names.

Conversion renames tensors without changing any values, so bytes are copied in small pieces: memory does not depend on the
size of the checkpoint, and the copy is exact. The safetensors library checks every header before it is read here.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from medv.reading import check_regular, read_json

T = TypeVar("T")
INDEX = "model.safetensors.index.json"
PICKLED_INDEX = "pytorch_model.bin.index.json"
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth")
SHARD_BYTES = 2 << 30
_PIECE = 8 << 20


@dataclass(frozen=True)
class StoredTensor:
    """The place of one tensor: `nbytes` from `offset` of `file`; dtype as safetensors spells it ("F32", "BF16")."""

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(source: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, or of a folder with one file or an index of shards, by name.

    Reads headers only. Raises FileNotFoundError for a missing shard; ValueError for a truncated or invalid file, for an index
    that points out of its folder or does not agree with its shards, and for an index beside a single file.
    """
    if source.is_file():
        return _read_header(source)
    single = source / SINGLE
    if single.is_file() and (source / INDEX).is_file():
        raise ValueError(f"{source} holds both {SINGLE} and {INDEX}: remove the one that does not belong there")
    files = [single] if single.is_file() else sorted(source.glob("*.safetensors"))
    files, promised = whole_set(source, files, INDEX)
    if not files:
        raise FileNotFoundError(f"{source} holds no safetensors file: give the folder of a checkpoint")
    return united(source, files, promised, _read_header)


def whole_set(source: Path, files: Sequence[Path], index: str) -> tuple[list[Path], dict[str, str]]:
    """The shards that the file `index` of the folder `source` names, and the shard of each tensor; without it `files` and {}.

    Raises FileNotFoundError for shards that the index or the numbers of `files` ("00001-of-00003") promise and that are not
    there; ValueError for an index that is none or points out of the folder.
    """
    promised: dict[str, str] = {}
    numbered = (re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\..*)", file.name) for file in files)
    names = {f"{m[1]}{number:05}{m[2]}" for m in numbered if m for number in range(1, int(m[3]) + 1)}
    if (source / index).is_file():
        promised = read_object(source / index).get("weight_map")
        if not promised or not isinstance(promised, dict) or not all(isinstance(name, str) for name in promised.values()):
            raise ValueError(f"{source / index} is not an index of shards: its weight_map does not give a file for each tensor")
        names = set(promised.values())
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{source / index} points to {outside[0]!r}, outside its own folder: it is not to be trusted")
        files = [source / name for name in sorted(names)]
    if missing := sorted(name for name in names if not (source / name).is_file()):
        raise FileNotFoundError(f"{source} lacks {_few(missing)}, which belong to its weights: download it again")
    return list(files), promised


def united(source: Path, files: Iterable[Path], index: Mapping[str, str], read: Callable[[Path], dict[str, T]]) -> dict[str, T]:
    """What `read` gives of each shard, by name; raises ValueError for a tensor in two files, or not in the one `index`."""
    tensors: dict[str, T] = {}
    for file in files:
        found = read(file)
        if lost := [name for name, place in index.items() if place == file.name and name not in found]:
            raise ValueError(f"{file.name} lacks {_few(lost)}, which the index of {source} says it holds")
        if twice := tensors.keys() & found.keys():
            raise ValueError(f"{min(twice)} is in two files of {source}: remove the one that does not belong there")
        tensors |= found
    return tensors


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_header(file: Path) -> dict[str, StoredTensor]:
    check_regular(file)
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): download it again") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    tensors = {}
    for name, facts in header.items():
        if name != "__metadata__":
            begin, end = facts["data_offsets"]
            tensors[name] = StoredTensor(file, 8 + length + begin, end - begin, facts["dtype"], tuple(facts["shape"]))
    return tensors


def pickles(folder: Path) -> list[Path]:
    """The pickled files of a folder that may hold weights; those of a trainer's state are left out."""
    found = (file for file in folder.iterdir() if file.suffix in PICKLED)
    return sorted(file for file in found if not file.name.startswith(("training_args", "optimizer", "scheduler", "rng")))


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ValueError where it is no regular file or holds anything else."""
    value = read_json(file)
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object: make or download it again")
    return value


def copy_tensors(target: Path, new: Mapping[str, StoredTensor], *, shard_bytes: int = SHARD_BYTES, quiet: bool = False) -> None:
    """Write the tensors under their new names to the folder `target`, in shards of at most `shard_bytes` (or one tensor)."""
    # Tensors with wide numbers come first, so that all are aligned.
    ordered = dict(sorted(new.items(), key=lambda item: -(item[1].nbytes // max(prod(item[1].shape), 1))))
    split = split_state_dict_into_shards_factory(
        ordered,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    with tqdm(total=split.metadata["total_size"], unit="B", unit_scale=True, desc="converting", disable=quiet) as progress:
        for file, names in split.filename_to_tensors.items():
            _write_shard(target / file, {name: new[name] for name in names}, progress)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, tensors: Mapping[str, StoredTensor], progress: tqdm) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the library wants the data aligned
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            with tensor.file.open("rb") as source:
                source.seek(tensor.offset)
                left = tensor.nbytes
                while left:
                    piece = source.read(min(_PIECE, left))
                    if not piece:
                        raise ValueError(f"{source.name} ended in the middle of a tensor: it was changed while it was read")
                    stream.write(piece)
                    progress.update(len(piece))
                    left -= len(piece)


def shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, stored or in memory."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def mismatches(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], unknown: Iterable[str] = ()
) -> str | None:
    """One sentence naming all missing, unexpected and mis-shaped tensors; None where there are none."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted([*(found.keys() - expected.keys()), *unknown])
    wrong = [
        f"{name} (is {list(found[name])}, should be {list(expected[name])})"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong)]
    return "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in parts if names) or None
