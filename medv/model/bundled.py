"""Where the tiny weights that come with the package are, and how to load a model by name or folder."""

from pathlib import Path

import torch

from medv.model.adapters import base_folder, is_adapter, with_adapters
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor

BUNDLED = ("tokenizer", "language_tower", "vision_tower", "general_model", "tiny_model")


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
    """A model in evaluation mode and its processor from a folder on disk; nothing is downloaded.

    A folder of LoRA adapters gives the model that they were trained on with the adapters merged into it.
    """
    if is_adapter(folder):
        model, processor = load_model(base_folder(folder), dtype=dtype)
        return with_adapters(model, folder).eval(), processor
    if not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no model: it has no config.json")
    model = MedVForMaskedDiffusion.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), MedVProcessor.from_pretrained(folder, local_files_only=True)
