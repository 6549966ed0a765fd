"""Where the tiny weights that come with the package are, and how to load a model by name or folder."""

import json
from pathlib import Path

import torch

from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor
from medv.model.twin import MedVForCausalLM, MedVTwinConfig

BUNDLED = ("tokenizer", "language_tower", "vision_tower", "general_model", "tiny_model", "twin_tower")


def bundled(part: str) -> Path:
    """The folder of a bundled part; raises ValueError for an unknown name, FileNotFoundError where it was not shipped."""
    if part not in BUNDLED:
        raise ValueError(f"unknown bundled part {part!r}: use one of {', '.join(BUNDLED)}")
    folder = Path(__file__).parent.parent / "weights" / part
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the bundled {part} is missing from this installation: make it with `medv train pretrain`"
        )
    return folder


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> tuple[MedVForMaskedDiffusion, MedVProcessor]:
    """A model (or an autoregressive twin) in evaluation mode and its processor from a folder; nothing is downloaded."""
    if not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no model: it has no config.json")
    kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type")
    network = MedVForCausalLM if kind == MedVTwinConfig.model_type else MedVForMaskedDiffusion
    model = network.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), MedVProcessor.from_pretrained(folder, local_files_only=True)
