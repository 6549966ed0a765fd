"""LoRA on the language tower, by peft: the pattern is anchored, so the vision tower is never touched.

The projector, and the image newline where there is one, are trained in full beside the adapters and saved with them.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig

from medv import limits
from medv.checkpoints.adapters import AdaptedModel
from medv.model.modeling import MedVForMaskedDiffusion

LANGUAGE_LAYERS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class LoraRecipe:
    """Rank, scale (alpha) and dropout of the adapters; the projector is trained in full beside them."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0

    def __post_init__(self):
        limits.whole("the rank of LoRA", self.rank, 1)
        limits.real("alpha of LoRA", self.alpha, 0, open_ends="least")
        limits.real("dropout of LoRA", self.dropout, 0, 1, open_ends="most")


def attach_lora(model: MedVForMaskedDiffusion, recipe: LoraRecipe, *, seed: int = 0) -> AdaptedModel:
    """Freeze the model, put adapters on every linear map of the language layers, and train projector and newline in full.

    The adapters begin as a function of `seed` alone; torch's global generator is left as it was.
    """
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=LANGUAGE_LAYERS,
        modules_to_save=["projector"],
        bias="none",
        base_model_name_or_path=model.name_or_path or None,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft still asks by the old name; one line a training would bury what a notebook has to say
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        torch.manual_seed(seed)
        network = AdaptedModel(model, config)
    if network.newline is not None:
        network.newline.requires_grad_(True)
    return network


def merge_lora(network: AdaptedModel, folder: Path) -> MedVForMaskedDiffusion:
    """Save the adapters to `folder`, then fold them into the weights and return the plain model."""
    network.save_pretrained(folder)
    return network.merge_and_unload()
