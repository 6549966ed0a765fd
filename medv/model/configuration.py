"""The configuration of LLaDA-MedV: a vision tower (SigLIP), a projector and a bidirectional Llama (Fig. 2, Table 6)."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from medv import limits
from medv.model.views import ViewPlan
from medv.model.vision import SIGLIP, grid_side

FEATURE_NORMS = ("none", "layer")


@strict
class MedVConfig(PreTrainedConfig):
    """Configuration of `MedVForMaskedDiffusion`; the defaults of the token ids are those of the released model.

    vision_config: a network that gives a grid of features (see `medv.model.vision`). For a `SiglipVisionConfig`,
    `num_hidden_layers` counts the layers kept (26 of 27 in the release): features are the output of the last of them, before
    the final layer norm. text_config: a `LlamaConfig`; attention is always made bidirectional (`is_causal=False`).
    image_pool: squares of so many features a side are averaged to one visual token (1 in the release, 2 in the tiny models).
    feature_norm: "layer" normalizes the averages over their channels, without parameters, for towers that do not end in a
    norm. image_mean and image_std: of each colour (0 to 1). image_aspect, image_grid, image_max_tiles and patch_merge: how a
    picture becomes views and visual tokens (see `medv.model.views`); "spatial_unpad" adds the parameter `model.image_newline`.
    suppress_token_ids are never sampled and stop_token_ids end a response, unless a sampler's configuration overrides them.
    loss_normalization and noise_eps: of the training loss (see `medv.diffusion.loss`).
    """

    model_type = "llada_medv"
    sub_configs_defaults = {  # noqa: RUF012 (the class attribute that transformers reads)
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_hidden_act: str = "gelu"
    image_pool: int = 1
    feature_norm: str = "none"
    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_aspect: str = "square"
    image_grid: list[list[int]] | tuple[tuple[int, int], ...] = ()
    image_max_tiles: int | None = None
    patch_merge: str = "flat"
    image_token_id: int = 126349
    mask_token_id: int = 126336
    stop_token_ids: list[int] | tuple[int, ...] = (126348,)
    suppress_token_ids: list[int] | tuple[int, ...] = (126081, 126080, 126346, 126347)
    fill_token_id: int = 126081
    loss_normalization: str = "sample"
    noise_eps: float = 1e-3
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # Makes a stock Llama bidirectional with and without padding; the attribute of the attention modules alone would
        # silently leave padded batches causal.
        self.text_config.is_causal = False
        if self.vision_config.model_type == SIGLIP:
            self.vision_config.vision_use_head = False
        limits.named("feature_norm", self.feature_norm, FEATURE_NORMS)
        tied = self.tie_word_embeddings or self.text_config.tie_word_embeddings  # either says it of the same two weights
        self.tie_word_embeddings = self.text_config.tie_word_embeddings = tied
        self.image_grid = [list(pair) for pair in self.image_grid]
        _ = self.view_plan  # raises for settings that do not fit together

    @property
    def image_tokens(self) -> int:
        """Visual tokens of one view of an image: 27 * 27 = 729 for the released tower, 4 * 4 = 16 for the tiny one."""
        return self.view_plan.side**2

    @property
    def view_plan(self) -> ViewPlan:
        """How pictures become views and visual tokens."""
        side = grid_side(self.vision_config)
        if self.image_pool < 1 or side % self.image_pool:
            raise ValueError(f"image_pool is {self.image_pool}: give a divisor of the {side} features along a side")
        return ViewPlan.of(self, self.vision_config.image_size, side // self.image_pool)


AutoConfig.register(MedVConfig.model_type, MedVConfig)
