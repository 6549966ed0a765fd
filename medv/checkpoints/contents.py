"""A hash of what a model consists of, independent of where it was loaded from."""

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

PLACES = {"_name_or_path", "name_or_path", "is_local", "local_files_only", "transformers_version", "architectures", "dtype"}
"""Configuration fields that note where, and by which program, a model was loaded or saved."""


def contents(model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, str]:
    """The sha256 of `weights` (names, shapes and values as float32), `config` and `processor`."""
    weights, files = hashlib.sha256(), hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        weights.update(f"{name} {tuple(value.shape)} ".encode())
        value = value.detach().cpu()
        weights.update((value.float() if value.is_floating_point() else value).contiguous().numpy())
    generation = model.generation_config.to_dict() if getattr(model, "generation_config", None) else {}
    config = json.dumps([_placeless(model.config.to_dict()), _placeless(generation)], sort_keys=True, default=str)
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            data = file.read_bytes()
            if file.suffix == ".json":
                data = json.dumps(_placeless(json.loads(data)), sort_keys=True).encode()
            files.update(f"{file.relative_to(folder).as_posix()} {len(data)} ".encode() + data)
    digests = {"weights": weights, "config": hashlib.sha256(config.encode()), "processor": files}
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _placeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _placeless(part) for name, part in value.items() if name not in PLACES}
    return [_placeless(part) for part in value] if isinstance(value, list | tuple) else value
