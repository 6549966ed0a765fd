"""Building a model: from a shape (random weights) or from a language tower and a vision tower on disk (stage 1's start)."""

from pathlib import Path

import torch
from transformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from medv.checkpoints.loading import load_network, load_tokenizer, load_weights
from medv.checkpoints.shards import read_object
from medv.data.chat import SpecialTokens
from medv.data.rows import is_number
from medv.model.configuration import MedVConfig
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor, image_processor
from medv.model.vision import SIGLIP, grid_side, lite0_config
from medv.profiles import ModelShape

HEADS = ("head.", "vision_model.head.", "classifier.")  # tensors of a vision tower's folder above the features
PREPARATION = "preprocessor_config.json"  # of a vision tower's folder: how its images are prepared


def vision_config(shape: ModelShape) -> PreTrainedConfig:
    """The configuration of a shape's vision tower, without SigLIP's pooling head."""
    if shape.vision == "efficientnet_lite0":
        return lite0_config(shape.image_size)
    if shape.vision != "siglip":
        raise ValueError(f"unknown vision tower {shape.vision!r}: use siglip or efficientnet_lite0")
    return SiglipVisionConfig(
        hidden_size=shape.vision_hidden_size,
        intermediate_size=shape.vision_intermediate_size,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        vision_use_head=False,
    )


def shape_config(shape: ModelShape, special: SpecialTokens, **options) -> MedVConfig:
    """The configuration of a shape with the ids of a tokenizer; `options` are further fields of MedVConfig."""
    text = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads or shape.heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_positions,
        rope_theta=shape.rope_theta,
        rms_norm_eps=1e-5,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=shape.tie_word_embeddings,
        bos_token_id=special.start_of_text,
        eos_token_id=special.end_of_text,
        pad_token_id=special.end_of_text,
        is_causal=False,
    )
    options = {**shape.sight, **token_ids(special), **options}
    return MedVConfig(vision_config=vision_config(shape), text_config=text, **options)


def token_ids(special: SpecialTokens) -> dict:
    """The special ids of a MedVConfig. Our own models may write end of text, which ends a response like end of turn."""
    return {
        "image_token_id": special.image,
        "mask_token_id": special.mask,
        "stop_token_ids": [special.end_of_turn, special.end_of_text],
        "suppress_token_ids": [special.start_of_text, special.start_header, special.end_header, special.image, special.mask],
        "fill_token_id": special.end_of_text,
    }


def _seeded(config: MedVConfig, seed: int) -> MedVForMaskedDiffusion:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MedVForMaskedDiffusion(config)


def random_model(shape: ModelShape, special: SpecialTokens, *, seed: int, **options) -> MedVForMaskedDiffusion:
    """A model with random weights that depend on `seed` alone; torch's global generator is left as it was."""
    return _seeded(shape_config(shape, special, **options), seed)


def assemble(language: Path, vision: Path, *, seed: int, projector: Path | None = None, **options) -> MedVForMaskedDiffusion:
    """Stage 1's start: a language tower (LlamaForCausalLM folder with its tokenizer), a vision tower (folder of a network
    that `medv.model.vision` supports) and a new projector drawn from `seed`.

    projector: a folder that `medv convert` made of a stage-1 artifact, loaded instead. `options` are further fields of
    MedVConfig, such as image_pool and feature_norm. Weights are float32.
    """
    vision = Path(vision)
    tower = vision_tower(vision)
    text = load_network(LlamaForCausalLM, _tower_folder(language, "llama"), dtype=torch.float32)
    special = SpecialTokens.of(load_tokenizer(language))
    tower.config._name_or_path = text.config._name_or_path = ""  # a model must not carry paths of the machine that made it
    preparation = {}  # a SigLIP without the file is prepared like its release
    if (file := vision / PREPARATION).is_file():
        settings = read_object(file)
        ours = {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255}
        for name, value in (ours | {"rescale_offset": False, "include_top": False}).items():
            if settings.get(name, value) != value:
                raise ValueError(f"{file} says {name} = {settings[name]}, which medv does not compute: it must be {value}")
        preparation = {name: settings.get(name) for name in ("image_mean", "image_std")}
        for name, values in preparation.items():
            threes = isinstance(values, list) and len(values) == 3 and all(map(is_number, values))
            if not threes or (name == "image_std" and min(values) <= 0):
                raise ValueError(f"{file} says {name} = {values}: give a number for each of three colours, image_std above 0")
    elif tower.config.model_type != SIGLIP:
        raise FileNotFoundError(f"{file} is missing: without image_mean and image_std the tower's pictures are unknown")
    options = {**token_ids(special), **preparation, **options}
    model = _seeded(MedVConfig(vision_config=tower.config, text_config=text.config, **options), seed)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    if projector is not None:
        load_weights(model.model.projector, projector / "projector.safetensors")
    model.tie_weights()
    return model


def vision_tower(folder: Path) -> PreTrainedModel:
    """The vision tower in a folder, in float32 and without a head; raises ValueError where it gives no grid of features."""
    kind = read_object(_tower_folder(folder) / "config.json").get("model_type")
    if kind == "siglip":
        raise ValueError(f"{folder} holds a whole SigLIP: take its vision tower out with `medv convert`")
    options = {"vision_use_head": False} if kind == SIGLIP else {}
    tower = load_network(AutoModel, folder, dtype=torch.float32, without=HEADS, **options)
    grid_side(tower.config)  # raises where there is no grid
    return tower


def _tower_folder(folder: Path, kind: str | None = None) -> Path:
    """The folder, if there is a network of that type in it."""
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tower: it has no config.json")
    found = read_object(Path(folder) / "config.json").get("model_type")
    if kind not in (None, found):
        raise ValueError(f"{folder} holds a network of type {found}, not {kind}: make a tower of it with `medv convert`")
    return Path(folder)


def new_processor(tokenizer: PreTrainedTokenizerFast, config: MedVConfig, *, system: str | None = None) -> MedVProcessor:
    """The processor that belongs to a model; its views and visual tokens are those of the configuration."""
    images = image_processor(config.vision_config.image_size, config.image_mean, config.image_std)
    shared = ("image_tokens", "image_aspect", "image_grid", "image_max_tiles", "patch_merge")
    return MedVProcessor(images, tokenizer, system=system, **{name: getattr(config, name) for name in shared})
