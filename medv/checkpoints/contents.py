"""What a model is, by its contents: the identity of weights, configuration and processor, wherever they were loaded from."""

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

PLACES = {"_name_or_path", "name_or_path", "is_local", "local_files_only", "transformers_version", "architectures", "dtype"}
"""What a configuration says of where, and by what, a model was loaded or saved."""


def contents(model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, str]:
    """The sha256 of `weights` (names, shapes and values as float32), `config` and `processor`."""
    generation = model.generation_config.to_dict() if getattr(model, "generation_config", None) else {}
    config = json.dumps([_placeless(model.config.to_dict()), _placeless(generation)], sort_keys=True, default=str)
    found = {"weights": _weights(model), "config": hashlib.sha256(config.encode()).hexdigest()}
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        return found | {"processor": _files(Path(folder))}


def _weights(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        value = value.detach().cpu()
        digest.update((value.float() if value.is_floating_point() else value).contiguous().numpy())
    return digest.hexdigest()


def _files(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = file.read_bytes()
        if file.suffix == ".json":
            data = json.dumps(_placeless(json.loads(data)), sort_keys=True).encode()
        digest.update(f"{file.relative_to(folder).as_posix()} {len(data)} ".encode() + data)
    return digest.hexdigest()


def _placeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _placeless(part) for name, part in value.items() if name not in PLACES}
    return [_placeless(part) for part in value] if isinstance(value, list | tuple) else value
