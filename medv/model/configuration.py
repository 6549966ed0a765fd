"""The configuration of LLaDA-MedV: a SigLIP vision tower, a projector and a bidirectional Llama (Fig. 2, Table 6)."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from medv.model.views import ViewPlan


@strict
class MedVConfig(PreTrainedConfig):
    """Configuration of `MedVForMaskedDiffusion`.

    vision_config: a `SiglipVisionConfig`; `num_hidden_layers` counts the layers that are kept (26 of 27 in the release), as
    features are the output of the last of them, before the final layer norm. image_pool: squares of so many patches a side
    are averaged to one visual token (1, no pooling, in the release; 2 in the tiny models). image_aspect, image_grid,
    image_max_tiles and patch_merge say how a picture becomes views and these become tokens (see `medv.model.views`); a
    model whose patch_merge is "spatial_unpad" has the parameter `model.image_newline`. text_config: a `LlamaConfig`;
    attention is made bidirectional here (`is_causal=False`), whatever the dictionary says. The token ids come from the
    tokenizer (see `medv.data.chat.SpecialTokens`); the defaults are those of the released model. suppress_token_ids are
    never written by the sampler unless its own configuration says otherwise; stop_token_ids end a response.
    loss_normalization and noise_eps belong to the training loss (see `medv.diffusion.loss`).
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
        # The switch that makes a stock Llama bidirectional with and without padding. The attribute of the attention
        # modules alone would leave padded batches causal, silently.
        self.text_config.is_causal = False
        self.vision_config.vision_use_head = False
        if self.text_config.tie_word_embeddings:
            self.tie_word_embeddings = True
        self.image_grid = [list(pair) for pair in self.image_grid]
        _ = self.view_plan  # refuses settings that do not fit together

    @property
    def image_tokens(self) -> int:
        """Visual tokens of one view of an image: 27 * 27 = 729 for the released tower, 4 * 4 = 16 for the tiny one."""
        return self.view_plan.side**2

    @property
    def view_plan(self) -> ViewPlan:
        """How pictures become views and visual tokens."""
        vision = self.vision_config
        return ViewPlan(
            size=vision.image_size,
            side=vision.image_size // vision.patch_size // self.image_pool,
            aspect=self.image_aspect,
            grid=tuple(tuple(pair) for pair in self.image_grid),
            max_tiles=self.image_max_tiles,
            merge=self.patch_merge,
        )


AutoConfig.register(MedVConfig.model_type, MedVConfig)
