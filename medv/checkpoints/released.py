"""What the configuration files of the released checkpoints say, in medv's terms, and the other way round.

LLaDA-8B writes OLMo's words (d_model, n_layers), LLaDA-V and LLaDA-MedV Llama's (hidden_size) with LLaVA's for images
(image_aspect_ratio "anyres_max_4", mm_patch_merge_type, image_grid_pinpoints). Neither says what its vision tower looks like:
that is read off the tensors, or off the configuration of the tower itself. Nothing here touches weights.
"""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path

from transformers import LlamaConfig, PreTrainedTokenizerFast, SiglipVisionConfig

from medv.checkpoints.shards import StoredTensor, read_object
from medv.data.chat import SpecialTokens
from medv.model.configuration import MedVConfig
from medv.model.views import MOST

# Ours (transformers' Llama) and LLaDA-8B's own.
_OLMO = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "weight_tying",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_position_embeddings": 4096}
_VISION = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
# SigLIP so400m, patch 14, 384 pixels: the tower of all released models. Heads and pixels cannot be read off its tensors.
_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
}


def read_config(source: Path) -> dict:
    """`config.json` of a checkpoint folder; raises FileNotFoundError or ValueError where it is missing or not JSON."""
    file = (source if source.is_dir() else source.parent) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: without it the sizes of the network are not known")
    return read_object(file)


def language_config(settings: Mapping, vocab_size: int) -> LlamaConfig:
    """The language tower of a configuration in OLMo's or Llama's words; the vocabulary is that of the tensors."""
    found = {}
    for ours, theirs in _OLMO.items():
        value = settings.get(ours, settings.get(theirs))
        if value is None and ours == "rope_theta":
            value = (settings.get("rope_parameters") or {}).get("rope_theta")
        if value is not None:
            found[ours] = value
    missing = [name for name in _NEEDED if name not in found]
    if missing:
        raise ValueError(f"the configuration does not say {', '.join(missing)}: it is not that of a LLaDA model")
    found.setdefault("num_key_value_heads", found["num_attention_heads"])
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the release names a bos outside its vocabulary
        if found.get(name, vocab_size) >= vocab_size:
            found[name] = None
    return LlamaConfig(**_DEFAULTS | found, vocab_size=vocab_size, is_causal=False)


def vision_tower_config(settings: Mapping) -> tuple[SiglipVisionConfig, int]:
    """The configuration of a SigLIP release's tower without its last layer, and how many layers it has with it."""
    vision = settings.get("vision_config", settings)
    layers = int(vision.get("num_hidden_layers", 12))
    sizes = {name: vision[name] for name in _VISION if name in vision}
    return SiglipVisionConfig(**sizes | {"num_hidden_layers": layers - 1}, vision_use_head=False), layers


def vision_config_of(tensors: Mapping[str, StoredTensor], settings: Mapping | None) -> SiglipVisionConfig:
    """The configuration of the vision tower among `tensors` (medv's names): sizes read off their shapes.

    settings: the configuration of a SigLIP folder where one was given. Without it a tower that is not the released
    so400m raises ValueError, for the number of its heads is in no tensor.
    """
    prefix = "model.vision_tower."
    patch = tensors.get(prefix + "embeddings.patch_embedding.weight")
    if patch is None:
        raise ValueError("the checkpoint has no vision tower: give the SigLIP2 folder it was trained with (--vision)")
    layers = {int(m[1]) for name in tensors if (m := re.match(re.escape(prefix) + r"encoder\.layers\.(\d+)\.", name))}
    shape = {
        "hidden_size": patch.shape[0],
        "num_channels": patch.shape[1],
        "patch_size": patch.shape[2],
        "num_hidden_layers": max(layers, default=-1) + 1,
    }
    if settings is not None:
        config, _ = vision_tower_config(settings)
        return SiglipVisionConfig(**{**{n: getattr(config, n) for n in _VISION}, **shape}, vision_use_head=False)
    if any(shape[name] != _SO400M[name] for name in ("hidden_size", "patch_size")):
        raise ValueError(
            f"a vision tower of width {shape['hidden_size']} and patch {shape['patch_size']} is not the released so400m: "
            "give the folder it came from (--vision), its number of heads is not in the tensors"
        )
    return SiglipVisionConfig(**_SO400M | shape, vision_use_head=False)


def image_settings(settings: Mapping, size: int) -> dict:
    """image_aspect, image_grid, image_max_tiles and patch_merge from LLaVA's words; `size` is the tower's, in pixels."""
    written = settings.get("image_aspect_ratio") or "square"
    match = re.fullmatch(r"(square|pad|anyres)(?:_max_(\d+))?", written)
    if match is None or (match[2] and match[1] != "anyres"):
        raise ValueError(f"image_aspect_ratio {written!r} is not known: square, pad, anyres or anyres_max_N")
    aspect, most = match[1], match[2]
    return {
        "image_aspect": aspect,
        "image_max_tiles": int(most) if most else None,
        "image_grid": _grid(settings.get("image_grid_pinpoints"), size) if aspect == "anyres" else [],
        "patch_merge": settings.get("mm_patch_merge_type") or "flat",
    }


def _grid(pinpoints, size: int) -> list[list[int]]:
    """[[width, height], ...] in pixels, from a list or from "(1x1),...,(6x6)", which means every size between."""
    if isinstance(pinpoints, str) and "x" in pinpoints:
        pairs = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if len(pairs) < 2:
            raise ValueError(f"image_grid_pinpoints {pinpoints!r} is not of the form (1x1),...,(6x6)")
        (first_w, first_h), (last_w, last_h) = pairs[0], pairs[-1]
        if max(last_w, last_h) > MOST:
            raise ValueError(f"image_grid_pinpoints {pinpoints!r} goes beyond {MOST} tiles: it is not of a released model")
        steps = itertools.product(range(first_w, last_w + 1), range(first_h, last_h + 1))
        return [[w * size, h * size] for w, h in steps]
    pairs = json.loads(pinpoints) if isinstance(pinpoints, str) else pinpoints
    if not pairs:
        raise ValueError("image_aspect_ratio is anyres, but image_grid_pinpoints is missing: which grids are allowed?")
    return [list(pair) for pair in pairs]


def medv_config(
    settings: Mapping, vision: SiglipVisionConfig, vocab_size: int, tokenizer: PreTrainedTokenizerFast | None
) -> MedVConfig:
    """The configuration of a whole released model; without its tokenizer the ids are the released ones."""
    return MedVConfig(
        vision_config=vision,
        text_config=language_config(settings, vocab_size),
        image_pool=settings.get("image_pool", 1),
        **image_settings(settings, vision.image_size),
        **({} if tokenizer is None else _token_ids(tokenizer, vocab_size)),
    )


def _token_ids(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> dict:
    """Ids by their strings. Rows of the embedding without a token are dead: the reference cuts them off, so they are never
    written here.
    """
    special = SpecialTokens.of(tokenizer)
    if len(tokenizer) > vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, but the embedding only {vocab_size} rows")
    written_never = (special.end_of_text, special.start_of_text, special.start_header, special.end_header)
    dead = range(len(tokenizer), vocab_size)
    return {
        "image_token_id": special.image,
        "mask_token_id": special.mask,
        "stop_token_ids": [special.end_of_turn],
        "suppress_token_ids": [*written_never, *dead],
        "fill_token_id": special.end_of_text,
    }


def released_config(settings: Mapping, layout: str, vocab_size: int) -> dict:
    """`config.json` in a released layout, from the configuration of a medv model or of a language tower in any words.

    LLaVA's words have none for `image_pool`, which no release has; ours stands for itself where it is not 1.
    """
    text = language_config(settings.get("text_config", settings), vocab_size)
    values = {ours: getattr(text, ours) for ours in _OLMO if ours != "rope_theta"}
    values["rope_theta"] = text.rope_parameters["rope_theta"]
    if layout == "llada8b":
        named = {_OLMO[ours]: value for ours, value in values.items()}
        return {"model_type": "llada", **named, "vocab_size": vocab_size, "embedding_size": vocab_size}
    written = {"model_type": "llava_llada", **values, "vocab_size": vocab_size}
    if "vision_config" not in settings:
        return written
    config = MedVConfig.from_dict(dict(settings))
    most = "" if config.image_max_tiles is None else f"_max_{config.image_max_tiles}"
    return written | {
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_patch_merge_type": config.patch_merge,
        "image_aspect_ratio": config.image_aspect + most,
        "image_grid_pinpoints": config.image_grid or None,
        **({} if config.image_pool == 1 else {"image_pool": config.image_pool}),
    }
