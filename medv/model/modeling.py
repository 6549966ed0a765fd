"""The LLaDA-MedV network and its loss: a vision tower, a two-layer projector and a bidirectional Llama, in transformers' terms.

`forward` includes the corruption and the training loss of Eq. 4, so that distributed wrappers see one call; only the masked
positions reach the output head. There is no shift: the logits at position i predict token i. `generate` and `stream` are in
`medv.model.generation`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import layer_norm
from transformers import AutoModel, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from medv.diffusion.corruption import corrupt
from medv.diffusion.loss import masked_cross_entropy, token_weights
from medv.model.configuration import MedVConfig
from medv.model.generation import DiffusionGeneration
from medv.model.views import merge_views, pool_patches
from medv.model.vision import feature_width, grid_features

IGNORED_LABEL = -100


@dataclass
class MedVOutput(ModelOutput):
    """loss: float32 scalar, with labels. logits: float [B, K, V] of the requested columns, without labels. masked: bool
    [B, T], the positions that were masked and scored. last_hidden_state: [B, T, D].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    masked: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


class MedVProjector(nn.Module):
    """Two linear layers with a GELU between: vision width to language width (Table 6)."""

    def __init__(self, config: MedVConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(feature_width(config.vision_config), width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[n, N, D_vision] -> [n, N, D]."""
        return self.linear_2(self.act(self.linear_1(features)))


class MedVPreTrainedModel(PreTrainedModel):
    """Settings and initialization shared by all MedV models."""

    config: MedVConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # The loss is already a mean; without this the Trainer would treat it as a sum and scale it by the accumulation.
    accepts_loss_kwargs = False
    _no_split_modules = ["LlamaDecoderLayer", "SiglipEncoderLayer", "EfficientNetBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MedVModel) and module.image_newline is not None:
            initialization.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)


class MedVModel(MedVPreTrainedModel):
    """The towers and the projector, without the output head."""

    def __init__(self, config: MedVConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config).eval()  # see `train`
        self.projector = MedVProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.image_newline = None
        if "unpad" in config.patch_merge:
            self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))
        self.post_init()

    def train(self, mode: bool = True) -> "MedVModel":
        """As in torch, but the vision tower stays in evaluation mode: fixed batch norm statistics, no dropout."""
        super().train(mode)
        self.vision_tower.eval()
        return self

    def get_image_features(self, pixel_values: torch.Tensor, image_layouts: torch.Tensor | None = None) -> torch.Tensor:
        """Projected visual tokens [n, N, D] of n views [n, 3, H, W]; with image_layouts [m, 7] those of m images, [T, D]."""
        return self.project(self.look(pixel_values), image_layouts)

    def look(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Vision states [n, N, D_vision] of n views [n, 3, H, W], pooled and normed as configured."""
        features = grid_features(self.vision_tower, pixel_values)  # [n, P, D_vision]
        pooled = pool_patches(features, self.config.image_pool)
        return pooled if self.config.feature_norm == "none" else layer_norm(pooled, pooled.shape[-1:])

    def project(self, vision_states: torch.Tensor, image_layouts: torch.Tensor | None = None) -> torch.Tensor:
        """Visual tokens of the vision states, as `get_image_features` returns them."""
        projected = self.projector(vision_states)  # [n, N, D]
        return projected if image_layouts is None else merge_views(projected, image_layouts, self.image_newline)

    def embed(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings [B, T, D] with the visual tokens ([n, N, D] or [T', D]) in place of their placeholders, in order."""
        embeds = self.get_input_embeddings()(input_ids)  # [B, T, D]
        placeholders = input_ids == self.config.image_token_id  # [B, T]
        wanted, given = int(placeholders.sum()), 0 if image_features is None else image_features[..., 0].numel()
        if wanted != given:
            raise ValueError(
                f"the text has {wanted} image placeholders but the images give {given} visual tokens: "
                "let MedVProcessor build both from the same images"
            )
        if not wanted:
            return embeds
        return embeds.masked_scatter(placeholders[..., None], image_features.to(embeds))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        image_layouts: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, D] of ids [B, T] int64, or of embeddings [B, T, D] that include the visual tokens.

        attention_mask: [B, T] with 1 = visible to every token, or [B, 1, T, T] bool with True where a query (the third
        dimension) sees a key. pixel_values: [n, 3, H, W] of all views in the order of their placeholders, with image_layouts
        [m, 7] where the processor gives them; instead of them the results of `look` (vision_states [n, N, D_vision]) or of
        `get_image_features` (image_features [n, N, D] or [T', D]). position_ids [B or 1, T]: by default padding moves no token.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, one of the two")
        if pixel_values is not None and vision_states is not None:
            raise ValueError("vision_states are what the tower saw in pixel_values: give one of the two")
        if pixel_values is not None:
            vision_states = self.look(pixel_values)
        if vision_states is not None:
            image_features = self.project(vision_states, image_layouts)
        elif image_layouts is not None:
            raise ValueError("image_layouts say how views are put together, but there are no pixel_values")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, image_features)
        elif image_features is not None:
            raise ValueError("inputs_embeds hold their visual tokens already: give no images with them")
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)  # [B, T]: padding moves no token
        outputs = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        return outputs.last_hidden_state


class MedVForMaskedDiffusion(MedVPreTrainedModel, DiffusionGeneration):
    """LLaDA-MedV: answers about an image by unmasking."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MedVConfig):
        super().__init__(config)
        self.model = MedVModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        u: torch.Tensor | None = None,
        logits_to_keep: slice | None = None,
        **inputs: torch.Tensor | None,
    ) -> MedVOutput:
        """The loss of clean text, or the logits of a canvas; `inputs` are the other inputs of `MedVModel.forward`.

        With labels [B, T] (-100 = never masked, never scored) the text must be clean: the positions where u [B, T] < p(t [B])
        are masked and scored (Eq. 1-4); without t and u they come from torch's global generator. Without labels the logits
        of the columns `logits_to_keep` (all by default) are returned.
        """
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        if labels is not None:
            return self._loss(labels, t, u, **inputs)
        hidden = self.model(**inputs)  # [B, T, D]
        kept = hidden if logits_to_keep is None else hidden[:, logits_to_keep]
        return MedVOutput(logits=self.lm_head(kept), last_hidden_state=hidden)

    def _loss(
        self,
        labels: torch.Tensor,
        t: torch.Tensor | None,
        u: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        **inputs: torch.Tensor | None,
    ) -> MedVOutput:
        if (t is None) != (u is None):
            raise ValueError("t and u belong together: give both, or neither to draw them")
        if t is None:
            t, u = torch.rand(len(labels)), torch.rand(labels.shape)
        targets = labels != IGNORED_LABEL
        clean = labels if input_ids is None else input_ids
        times, draws = t.to(labels.device), u.to(labels.device)
        noise = corrupt(clean, targets, times, draws, self.config.mask_token_id, eps=self.config.noise_eps)
        ids = noise.ids
        if inputs_embeds is not None:
            mask = self.get_input_embeddings().weight[self.config.mask_token_id]  # [D]
            ids, inputs_embeds = input_ids, torch.where(noise.masked[..., None], mask, inputs_embeds)
        hidden = self.model(ids, inputs_embeds=inputs_embeds, **inputs)  # [B, T, D]
        weights = token_weights(noise.masked, targets, noise.p_mask, self.config.loss_normalization)
        loss = masked_cross_entropy(hidden[noise.masked], self.lm_head, labels[noise.masked], weights)
        return MedVOutput(loss=loss, masked=noise.masked, last_hidden_state=hidden)


AutoModel.register(MedVConfig, MedVForMaskedDiffusion)
