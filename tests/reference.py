"""The reference's outputs on tiny random models: where they are, and their weights in medv's layout, by `medv convert`."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from medv.checkpoints.convert import convert
from medv.model.configuration import MedVConfig
from medv.model.modeling import MedVForMaskedDiffusion

FOLDER = Path(os.environ.get("MEDV_FIXTURES", Path(__file__).resolve().parents[2] / "shared" / "fixtures"))
needs_reference = pytest.mark.skipif(
    not (FOLDER / "config.json").is_file(), reason=f"outputs of the reference are not at {FOLDER}: set MEDV_FIXTURES"
)


def read(name: str) -> dict:
    """What a JSON file of the folder holds; nothing where it is missing."""
    path = FOLDER / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keys(name: str) -> list[str]:
    """The names of the tensors in a file of the folder."""
    if not (FOLDER / name).exists():
        return []
    with safe_open(FOLDER / name, "pt") as file:
        return list(file.keys())


def settings() -> dict:
    """The configuration of the reference's tiny model: lm, vision and mm."""
    return read("config.json")


def reference_network(config: MedVConfig) -> MedVForMaskedDiffusion:
    """The reference's weights under medv's names, renamed here by hand: the oracle of `medv convert`."""
    renames = [
        ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
        ("model.mm_projector.0.", "model.projector.linear_1."),
        ("model.mm_projector.2.", "model.projector.linear_2."),
        ("model.image_newline", "model.image_newline"),
        ("lm_head.", "lm_head."),
        ("model.", "model.language_model."),
    ]
    weights = {}
    for key, value in load_file(FOLDER / "weights_lladav.safetensors").items():
        old, new = next(pair for pair in renames if key.startswith(pair[0]))
        weights[new + key.removeprefix(old)] = value
    built = MedVForMaskedDiffusion(config)
    built.load_state_dict(weights)
    return built.eval()


def released_folder(folder: Path, weights: str) -> Path:
    """A checkpoint folder as the authors publish them: weights under the standard name, and config.json."""
    folder.mkdir(parents=True)
    shutil.copy(FOLDER / weights, folder / "model.safetensors")
    said = settings()
    config = said["lm"] | said["mm"] | {"model_type": "llava_llada"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def vision_folder(folder: Path) -> Path:
    """A SigLIP release: the tower with all its layers."""
    source = FOLDER / settings()["mm"]["mm_vision_tower"]
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    return folder


def converted_model(folder: Path) -> Path:
    """The tiny LLaDA-V checkpoint as a medv model folder, under `folder`."""
    source = released_folder(folder / "released", "weights_lladav.safetensors")
    convert(source, folder / "medv", vision=vision_folder(folder / "siglip"), quiet=True)
    return folder / "medv"
