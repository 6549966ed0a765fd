"""LoRA adapters of a model on disk and in memory: what a folder of them holds, and how it becomes a plain model again.

A folder has the two files of peft, with the adapters of the language tower and the whole projector, and, where the model
has one, its `image_newline`, a bare parameter that peft does not know. Training is in `medv.training.lora`.
"""

import json
import os
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from medv.model.modeling import MedVForMaskedDiffusion

CONFIG_FILE, NEWLINE_FILE = "adapter_config.json", "image_newline.safetensors"


class AdaptedModel(PeftModel):
    """A peft model whose folders carry the image newline too; the newline learns in place, so `disable_adapter` keeps it."""

    @property
    def newline(self) -> torch.nn.Parameter | None:
        """`image_newline` [D] of the model below, or None."""
        return self.get_base_model().model.image_newline

    def save_pretrained(self, save_directory: str | Path, **options) -> None:
        """As in peft, and the newline; the base model is noted relative to the folder, so that both can move together."""
        config, folder = self.peft_config[self.active_adapter], Path(save_directory)
        base = config.base_model_name_or_path
        if base and Path(base).is_dir():
            config.base_model_name_or_path = os.path.relpath(base, folder)
        super().save_pretrained(str(folder), save_embedding_layers=False, **options)  # they never learn here
        config.base_model_name_or_path = base
        if self.newline is not None:
            save_file({"model.image_newline": self.newline.detach().contiguous()}, folder / NEWLINE_FILE)

    def load_adapter(self, model_id: str | Path, *args, **options):
        """As in peft, and the newline."""
        loaded = super().load_adapter(str(model_id), *args, **options)
        if self.newline is not None:
            self.newline.data.copy_(load_file(Path(model_id) / NEWLINE_FILE)["model.image_newline"])
        return loaded


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters and not a whole model."""
    return (Path(folder) / CONFIG_FILE).exists()


def base_folder(folder: Path) -> Path:
    """The folder of the model that adapters were trained on.

    Raises ValueError if it was never saved, FileNotFoundError, naming the line to change, if it is not where it was.
    """
    base = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not base:
        raise ValueError(
            f"the adapters in {folder} were trained on a model that was never saved: use the merged model beside them"
        )
    found = (Path(folder) / base).resolve()
    if not (found / "config.json").exists():
        raise FileNotFoundError(
            f"the adapters in {folder} belong to the model in {base}, which is not there: "
            f"set base_model_name_or_path in {Path(folder) / CONFIG_FILE} to the folder of that model"
        )
    return found


def with_adapters(base: MedVForMaskedDiffusion, folder: Path) -> MedVForMaskedDiffusion:
    """The plain model that a base and the adapters in `folder` make; the weights of `base` are changed in place."""
    return AdaptedModel.from_pretrained(base, str(folder)).merge_and_unload()
