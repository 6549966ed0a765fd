"""Tensor names and configuration files of the released checkpoints in medv's terms, and back.

Three layouts hold the same tensors: LLaDA-8B's (OLMo style), LLaDA-V's and LLaDA-MedV's (Llama's), and medv's. In LLaDA-8B
`ff_out` is the output head at the top and the down-projection inside a block. The configurations use OLMo's or Llama's terms,
with LLaVA's for images; none describes the vision tower, which is read off its tensors or its own configuration.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, PreTrainedTokenizerFast, SiglipVisionConfig
from transformers.activations import ACT2FN

from medv import limits
from medv.checkpoints.shards import StoredTensor, read_object
from medv.data.chat import SpecialTokens
from medv.model.configuration import MedVConfig
from medv.model.views import MOST
from medv.model.vision import SIGLIP
from medv.reading import parse_json

# LLaDA-8B -> LLaDA-V.
_LLAMA_NAMES = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
    "model.transformer.blocks.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "model.transformer.blocks.{i}.q_proj": "model.layers.{i}.self_attn.q_proj",
    "model.transformer.blocks.{i}.k_proj": "model.layers.{i}.self_attn.k_proj",
    "model.transformer.blocks.{i}.v_proj": "model.layers.{i}.self_attn.v_proj",
    "model.transformer.blocks.{i}.attn_out": "model.layers.{i}.self_attn.o_proj",
    "model.transformer.blocks.{i}.ff_norm": "model.layers.{i}.post_attention_layernorm",
    "model.transformer.blocks.{i}.ff_proj": "model.layers.{i}.mlp.gate_proj",
    "model.transformer.blocks.{i}.up_proj": "model.layers.{i}.mlp.up_proj",
    "model.transformer.blocks.{i}.ff_out": "model.layers.{i}.mlp.down_proj",
}
_OLMO_NAMES = {new: old for old, new in _LLAMA_NAMES.items()}
# Prefixes, LLaDA-V and medv; the first that fits applies.
_PREFIXES = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.projector.linear_1."),
    ("model.mm_projector.2.", "model.projector.linear_2."),
    ("model.image_newline", "model.image_newline"),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
# Configuration fields, transformers' Llama and LLaDA-8B.
_FIELDS = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "weight_tying",
} | {name: name for name in ("rms_norm_eps", "rope_theta", "bos_token_id", "eos_token_id", "pad_token_id")}
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What a configuration may say about the computation itself; where it says something else, the weights would give other numbers.
_COMPUTED = {"rope": True, "partial_rotary_factor": 1, "alibi": False, "hidden_act": "silu", "activation_type": "silu"}
_COMPUTED |= {"layer_norm_type": "rms", "scale_logits": False, "input_emb_norm": False, "clip_qkv": None}
_COMPUTED |= dict.fromkeys(("attention_bias", "mlp_bias", "include_bias", "include_qkv_bias", "attention_layer_norm"), False)
_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_position_embeddings": 4096}
# SigLIP so400m, patch 14, 384 pixels: the tower of all released models. Heads and pixels cannot be read off its tensors.
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 384, "patch_size": 14}


def layout_of(names: Iterable[str]) -> str:
    """ "llada8b", "lladav" or "medv", the layout of these tensor names; raises ValueError where it is none of them."""
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


def by_table(name: str, table: Mapping[str, str]) -> str | None:
    """The new name of a tensor by a table of modules, in which {i} is the number of a layer; None for an unknown module."""
    module, _, kind = name.rpartition(".")
    numbers = re.findall(r"\.(\d+)\.", module)
    new = table.get(re.sub(r"\.\d+\.", ".{i}.", module))
    return f"{new.format(i=''.join(numbers))}.{kind}" if new else None


def llada8b_to_lladav(name: str) -> str | None:
    """The Llama-style name of a LLaDA-8B tensor; None for an unknown name."""
    return by_table(name, _LLAMA_NAMES)


def lladav_to_llada8b(name: str) -> str | None:
    """The inverse of `llada8b_to_lladav`; None for what LLaDA-8B does not have (the vision tower, the projector)."""
    return by_table(name, _OLMO_NAMES)


def lladav_to_medv(name: str) -> str | None:
    """The name in medv's layout; None for an unknown name."""
    return next((new + name.removeprefix(old) for old, new in _PREFIXES if name.startswith(old)), None)


def medv_to_lladav(name: str) -> str | None:
    """The inverse of `lladav_to_medv`."""
    return next((old + name.removeprefix(new) for old, new in _PREFIXES if name.startswith(new)), None)


def to_medv(name: str, layout: str) -> str | None:
    """A name of any layout in medv's; None for an unknown name."""
    if layout == "medv":
        return name
    llama = llada8b_to_lladav(name) if layout == "llada8b" else name
    return llama and lladav_to_medv(llama)


def read_config(source: Path) -> dict:
    """`config.json` of a checkpoint folder; raises FileNotFoundError or ValueError where it is missing or not JSON."""
    file = (source if source.is_dir() else source.parent) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: without it the sizes of the network are not known")
    return read_object(file)


def _part(settings: Mapping, name: str, default: Mapping) -> Mapping:
    """The object in the field `name` of a configuration, `default` where it is absent or null; raises ValueError."""
    part = default if settings.get(name) is None else settings[name]
    if not isinstance(part, Mapping):
        raise ValueError(f"{name} {part!r} of the configuration cannot be used: it must be an object with named fields")
    return part


@contextmanager
def _values() -> Iterator[None]:
    """Turn what is raised over a value of a configuration, and nothing else, into one ValueError."""
    try:
        yield
    except (StrictDataclassError, ValueError) as error:  # a wrong type, a wrong number
        raise ValueError(f"the configuration cannot be used ({shorten(str(error), 300)}): mend or replace it") from error


def language_config(settings: Mapping, vocab_size: int) -> LlamaConfig:
    """The language tower of a configuration in OLMo's or Llama's terms; the vocabulary is that of the tensors.

    Raises ValueError for sizes that are missing or cannot be, and for a computation that is not that of LLaDA.
    """
    settings = _part(settings, "text_config", settings)
    rope = {name: _part(settings, name, {}) for name in ("rope_parameters", "rope_scaling")}
    found = {ours: settings.get(ours, settings.get(theirs)) for ours, theirs in _FIELDS.items()}
    if found["rope_theta"] is None:
        found["rope_theta"] = next((part["rope_theta"] for part in rope.values() if "rope_theta" in part), None)
    found = {name: value for name, value in found.items() if value is not None}
    other = [f"{name} {settings[name]!r}" for name, ours in _COMPUTED.items() if settings.get(name) not in (None, ours)]
    for name, part in rope.items():  # a scaling of any spelling; the default type has nothing but its base
        if any(value not in (None, "default") for key, value in part.items() if key != "rope_theta"):
            other.append(f"{name} {dict(part)}")
    if other:
        raise ValueError(f"the configuration asks for {', '.join(other)}, which medv does not compute: it is of no LLaDA model")
    if missing := [name for name in _NEEDED if name not in found]:
        raise ValueError(f"the configuration does not say {', '.join(missing)}: it is not that of a LLaDA model")
    heads = found["num_attention_heads"]
    found.setdefault("num_key_value_heads", heads)
    with _values():
        for name in (*_NEEDED, "num_key_value_heads", "max_position_embeddings"):
            limits.whole(name, found.get(name, 1), 1)
        for name in ("rms_norm_eps", "rope_theta"):
            limits.real(name, found.get(name, 1), 0, open_ends="least")
        if (width := settings.get("head_dim")) not in (None, found["hidden_size"] / heads):
            raise ValueError(f"head_dim is {width}, but hidden_size {found['hidden_size']} is cut into {heads} heads")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the release names a bos outside its vocabulary
            limits.whole(name, found.get(name, 0), -1)
            if not 0 <= found.get(name, vocab_size) < vocab_size:
                found[name] = None
        return LlamaConfig(**_DEFAULTS | found, vocab_size=vocab_size, is_causal=False)


def vision_tower_config(settings: Mapping) -> SiglipVisionConfig:
    """The tower of a SigLIP release, all of its layers included; `settings` are those of the tower or of the whole SigLIP."""
    vision = _part(settings, "vision_config", settings)
    sizes = {name: vision[name] for name in SiglipVisionConfig.__annotations__ if name in vision}
    with _values():
        config = SiglipVisionConfig(**sizes | {"vision_use_head": False})
        for name in (*_NEEDED, "image_size", "patch_size", "num_channels"):
            limits.whole(name, getattr(config, name), 1)
        limits.named("hidden_act", config.hidden_act, ACT2FN)
    return config


def vision_config_of(tensors: Mapping[str, StoredTensor], settings: Mapping | None) -> SiglipVisionConfig:
    """The configuration of the vision tower among `tensors` (medv's names): sizes are read off their shapes.

    settings: the configuration of a SigLIP folder where one was given. Without it a tower that is not the released
    so400m raises ValueError, for the number of its heads is in no tensor.
    """
    prefix = "model.vision_tower."
    patch = tensors.get(prefix + "embeddings.patch_embedding.weight")
    if patch is None:
        raise ValueError("the checkpoint has no vision tower: give the SigLIP2 folder it was trained with (--vision)")
    layers = {int(m[1]) for name in tensors if (m := re.match(re.escape(prefix) + r"encoder\.layers\.(\d+)\.", name))}
    shape = dict(zip(("hidden_size", "num_channels", "patch_size"), patch.shape, strict=False))
    shape["num_hidden_layers"] = max(layers, default=-1) + 1
    width, side = (shape.get(name) for name in ("hidden_size", "patch_size"))
    if settings is None and (width, side) != (_SO400M["hidden_size"], _SO400M["patch_size"]):
        raise ValueError(
            f"a vision tower of width {width} and patch {side} is not the released so400m: "
            "give the folder it came from (--vision), its number of heads is not in the tensors"
        )
    return vision_tower_config(vision_tower_config(_SO400M if settings is None else settings).to_dict() | shape)


VIEWS = {
    "image_aspect_ratio": "anyres_max_4",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": "(1x1),...,(6x6)",
}
"""How LLaDA-V, whose recipe the released medical model follows, cuts an image, in LLaVA's terms."""


def image_settings(settings: Mapping, size: int) -> dict:
    """image_aspect, image_grid (in pixels), image_max_tiles and patch_merge from LLaVA's terms; `size` is the tower's."""
    written = settings.get("image_aspect_ratio") or "square"
    match = re.fullmatch(r"(square|pad|anyres)(?:_max_(\d+))?", str(written))
    if match is None or (match[2] and match[1] != "anyres"):
        raise ValueError(f"image_aspect_ratio {written!r} cannot be used: it is square, pad, anyres or anyres_max_N")
    aspect, most = match[1], match[2]
    pinpoints = settings.get("image_grid_pinpoints") if aspect == "anyres" else []
    if isinstance(pinpoints, str) and "x" in pinpoints:  # "(1x1),...,(6x6)" means every size between
        pairs = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if len(pairs) < 2:
            raise ValueError(f"image_grid_pinpoints {pinpoints!r} is not of the form (1x1),...,(6x6)")
        (first_w, first_h), (last_w, last_h) = pairs[0], pairs[-1]
        if max(last_w, last_h) > MOST:
            raise ValueError(f"image_grid_pinpoints {pinpoints!r} goes beyond {MOST} tiles: it is not of a released model")
        tiles = itertools.product(range(first_w, last_w + 1), range(first_h, last_h + 1))
        pinpoints = [[w * size, h * size] for w, h in tiles]
    grid = parse_json(pinpoints, "image_grid_pinpoints") if isinstance(pinpoints, str) else pinpoints
    if aspect == "anyres" and not grid:
        raise ValueError("image_aspect_ratio is anyres, but image_grid_pinpoints is missing: which grids are allowed?")
    if not isinstance(grid, list | tuple) or not all(isinstance(pair, list | tuple) for pair in grid):
        raise ValueError(f"image_grid_pinpoints {grid!r} cannot be used: it is a list of [width, height] in pixels")
    return {
        "image_aspect": aspect,
        "image_max_tiles": int(most) if most else None,
        "image_grid": [list(pair) for pair in grid],
        "patch_merge": settings.get("mm_patch_merge_type") or "flat",
    }


def medv_config(
    settings: Mapping, vision: SiglipVisionConfig, vocab_size: int, tokenizer: PreTrainedTokenizerFast | None
) -> MedVConfig:
    """The configuration of a whole released model; without its tokenizer the ids are the released ones.

    Embedding rows without a token are dead: the reference cuts them off, so they are suppressed here.
    """
    ids = {}
    if tokenizer is not None:
        special = SpecialTokens.of(tokenizer)
        if len(tokenizer) > vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, but the embedding only {vocab_size} rows")
        suppressed = (special.end_of_text, special.start_of_text, special.start_header, special.end_header)
        ids = {
            "image_token_id": special.image,
            "mask_token_id": special.mask,
            "stop_token_ids": [special.end_of_turn],
            "suppress_token_ids": [*suppressed, *range(len(tokenizer), vocab_size)],
            "fill_token_id": special.end_of_text,
        }
    text, pool = language_config(settings, vocab_size), settings.get("image_pool", 1)
    sight = image_settings(settings, vision.image_size)
    with _values():
        return MedVConfig(vision_config=vision, text_config=text, image_pool=pool, **sight, **ids)


def released_config(settings: Mapping, layout: str, vocab_size: int) -> dict:
    """`config.json` in a released layout, from the configuration of a medv model or of a language tower.

    LLaVA has no name for `image_pool`, which no release uses; medv's own name is written where it is not 1.
    """
    text = language_config(settings, vocab_size)
    values = {ours: getattr(text, ours) for ours in _FIELDS if ours != "rope_theta"}
    values["rope_theta"] = text.rope_parameters["rope_theta"]
    if layout == "llada8b":
        named = {_FIELDS[ours]: value for ours, value in values.items()}
        return {"model_type": "llada", **named, "vocab_size": vocab_size, "embedding_size": vocab_size}
    written = {"model_type": "llava_llada", **values, "vocab_size": vocab_size}
    if "vision_config" not in settings:
        return written
    config = MedVConfig.from_dict(dict(settings))
    if (kind := config.vision_config.model_type) != SIGLIP:
        raise ValueError(f"the vision tower is of the type {kind}: the layouts of the reference hold {SIGLIP} alone")
    vision_tower_config(settings)  # raises for sizes that cannot be
    most = "" if config.image_max_tiles is None else f"_max_{config.image_max_tiles}"
    return written | {
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_patch_merge_type": config.patch_merge,
        "image_aspect_ratio": config.image_aspect + most,
        "image_grid_pinpoints": config.image_grid or None,
        **({} if config.image_pool == 1 else {"image_pool": config.image_pool}),
    }
