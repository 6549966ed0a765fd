"""What learns: the named parts of a stage, or LoRA adapters on the language tower, by peft.

The pattern of the adapters is anchored, so the vision tower is never touched. The projector, and the image newline where there
is one, are trained in full beside them and saved with them.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig

from medv import limits
from medv.checkpoints.adapters import AdaptedModel
from medv.model.modeling import MedVForMaskedDiffusion

PARTS = {
    "projector": ("model.projector.",),
    "language_model": ("model.language_model.", "lm_head.", "model.image_newline"),
    # all but the token embedding
    "language_layers": ("model.language_model.layers.", "model.language_model.norm.", "model.image_newline"),
    # a deviation from the paper: the last block and the head convolution of an EfficientNet-Lite0
    "vision_end": ("model.vision_tower.encoder.blocks.15.", "model.vision_tower.encoder.top_"),
}
LANGUAGE_LAYERS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


def freeze_except(model: MedVForMaskedDiffusion, trains: Sequence[str]) -> int:
    """Let only the named parts learn; returns the number of trainable parameters.

    Raises ValueError for a part that is unknown or that this model does not have.
    """
    if unknown := set(trains) - set(PARTS):
        raise ValueError(f"unknown part {', '.join(sorted(unknown))}: a stage trains {' or '.join(PARTS)}")
    model.requires_grad_(False)
    for part in trains:
        found = [parameter for name, parameter in model.named_parameters() if name.startswith(PARTS[part])]
        if not found:
            raise ValueError(f"this model has no part {part}: only an EfficientNet-Lite0 has one of that name")
        for parameter in found:
            parameter.requires_grad_(True)
    return trainable_parameters(model)


def trainable_parameters(model: torch.nn.Module) -> int:
    """How many parameters learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


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

    The initial adapters are a function of `seed` alone; torch's global generator is left as it was.
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
        # peft still reads a deprecated name; the warning would appear at every training
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
