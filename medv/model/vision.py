"""Square grids of features from the vision networks of transformers.

| type of the configuration | features | grid |
|---|---|---|
| siglip_vision_model | last kept layer, before the final norm, as in the reference | image_size / patch_size |
| efficientnet | the map [n, C, h, w] before pooling | image_size / 32 |
| ViT, DINOv2 and the like | last hidden state, without class and register tokens | image_size / patch_size |

SigLIP2 of fixed size is a siglip_vision_model; its variant for any size takes other inputs and is not supported.
"""

import json
from functools import lru_cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MODEL_MAPPING, AutoConfig, EfficientNetConfig, PreTrainedConfig

SIGLIP, EFFICIENTNET = "siglip_vision_model", "efficientnet"
STRIDE = 32  # pixels a side of one feature of an EfficientNet


def lite0_config(image_size: int) -> EfficientNetConfig:
    """EfficientNet-Lite0 as a stock EfficientNet: relu6, no widening of stem and head; squeeze-excite must be neutral."""
    widths = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
    return EfficientNetConfig(image_size=image_size, hidden_act="relu6", batch_norm_eps=1e-3, **widths)


def grid_side(config: PreTrainedConfig) -> int:
    """Features along one side of the grid; raises ValueError for a network that gives no grid."""
    if config.model_type == EFFICIENTNET:
        return -(-config.image_size // STRIDE)
    sizes = [getattr(config, name, None) for name in ("image_size", "patch_size")]
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(
            f"a vision tower of type {config.model_type} does not say image_size and patch_size: "
            "use SigLIP, EfficientNet, or a ViT whose features form one square grid"
        )
    return sizes[0] // sizes[1]


def feature_width(config: PreTrainedConfig) -> int:
    """Channels of a feature."""
    return config.hidden_dim if config.model_type == EFFICIENTNET else config.hidden_size


def grid_features(tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Features [n, h * w, C] of n views [n, 3, H, W], row by row; raises ValueError where there are fewer than `grid_side`²."""
    config, pixel_values = tower.config, pixel_values.to(dtype=tower.dtype)
    if config.model_type == SIGLIP:
        return tower.encoder(inputs_embeds=tower.embeddings(pixel_values)).last_hidden_state
    features, count = tower(pixel_values).last_hidden_state, grid_side(config) ** 2
    if features.dim() == 4:
        features = features.flatten(2).transpose(1, 2)
    if features.shape[1] < count:
        raise ValueError(
            f"the {config.model_type} gives {features.shape[1]} features, not the {count} of its grid: "
            "use a tower whose features form one square grid"
        )
    return features[:, -count:]  # class and register tokens come first


def view_flops(config: PreTrainedConfig) -> int:
    """Multiplications and additions of one view's forward pass."""
    return _view_flops(config.to_json_string(use_diff=False))


@lru_cache(maxsize=8)
def _view_flops(config: str) -> int:
    settings = AutoConfig.for_model(**json.loads(config))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        # Not AutoModel.from_config, which under ZeRO-3 would shard the model over the processes.
        tower = MODEL_MAPPING[type(settings)](settings)
        grid_features(tower, torch.empty(1, 3, settings.image_size, settings.image_size))
    return counter.get_total_flops()
