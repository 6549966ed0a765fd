"""The names of the same tensors in three layouts: LLaDA-8B's (OLMo style), LLaDA-V's and LLaDA-MedV's (Llama's), and medv's.

Renaming is all there is to it: no tensor is transposed, split or permuted. Beware of `ff_out` in LLaDA-8B's layout, which is
the output head at the top and the down-projection inside a block. This module knows strings, no files and no tensors.
"""

import re
from collections.abc import Iterable

LAYOUTS = ("llada8b", "lladav", "medv")

# Without the prefix of a layer: (LLaDA-8B, Llama).
_OUTER = (
    ("model.transformer.wte.weight", "embed_tokens.weight"),
    ("model.transformer.ln_f.weight", "norm.weight"),
    ("model.transformer.ff_out.weight", "lm_head.weight"),
)
_IN_A_LAYER = (
    ("attn_norm", "input_layernorm"),
    ("q_proj", "self_attn.q_proj"),
    ("k_proj", "self_attn.k_proj"),
    ("v_proj", "self_attn.v_proj"),
    ("attn_out", "self_attn.o_proj"),
    ("ff_norm", "post_attention_layernorm"),
    ("ff_proj", "mlp.gate_proj"),
    ("up_proj", "mlp.up_proj"),
    ("ff_out", "mlp.down_proj"),
)
# (LLaDA-V, medv); the first prefix that fits is meant.
_PREFIXES = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.projector.linear_1."),
    ("model.mm_projector.2.", "model.projector.linear_2."),
    ("model.image_newline", "model.image_newline"),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
_BLOCK = re.compile(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_OUTER_TO_LLAMA = {old: new if new.startswith("lm_head") else f"model.{new}" for old, new in _OUTER}
_LLAMA_TO_OUTER = {new: old for old, new in _OUTER_TO_LLAMA.items()}
_BLOCK_TO_LAYER = dict(_IN_A_LAYER)
_LAYER_TO_BLOCK = {new: old for old, new in _IN_A_LAYER}


def layout_of(names: Iterable[str]) -> str:
    """Which of `LAYOUTS` a checkpoint with these tensor names is in; raises ValueError where it is none."""
    names = set(names)
    if any(name.startswith("model.transformer.") for name in names):
        return "llada8b"
    if any(name.startswith("model.language_model.") for name in names):
        return "medv"
    if any(name.startswith(("model.layers.", "model.mm_projector.")) for name in names):
        return "lladav"
    shown = ", ".join(sorted(names)[:3]) or "no tensor at all"
    raise ValueError(
        f"the checkpoint holds {shown}: neither LLaDA-8B's names (model.transformer...), LLaDA-V's (model.layers...) nor "
        "medv's (model.language_model...)"
    )


def llada8b_to_lladav(name: str) -> str | None:
    """The Llama-style name of a LLaDA-8B tensor; None for a name that LLaDA-8B does not have."""
    if name in _OUTER_TO_LLAMA:
        return _OUTER_TO_LLAMA[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _BLOCK_TO_LAYER:
        return None
    return f"model.layers.{match[1]}.{_BLOCK_TO_LAYER[match[2]]}.weight"


def lladav_to_llada8b(name: str) -> str | None:
    """The inverse of `llada8b_to_lladav`; None for what LLaDA-8B does not have (the vision tower, the projector)."""
    if name in _LLAMA_TO_OUTER:
        return _LLAMA_TO_OUTER[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER_TO_BLOCK:
        return None
    return f"model.transformer.blocks.{match[1]}.{_LAYER_TO_BLOCK[match[2]]}.weight"


def lladav_to_medv(name: str) -> str | None:
    """The name in medv's layout; None for a name that fits nowhere."""
    return next((new + name.removeprefix(old) for old, new in _PREFIXES if name.startswith(old)), None)


def medv_to_lladav(name: str) -> str | None:
    """The inverse of `lladav_to_medv`."""
    return next((old + name.removeprefix(new) for old, new in _PREFIXES if name.startswith(new)), None)


def to_medv(name: str, layout: str) -> str | None:
    """A name of any layout in medv's; None for a name that fits nowhere."""
    if layout == "medv":
        return name
    if layout == "llada8b":
        name = llada8b_to_lladav(name)
    return None if name is None else lladav_to_medv(name)
