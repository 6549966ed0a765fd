"""The autoregressive twin: the same towers, sizes and data as a MedV model, but causal and trained on the next token.

It stands for the autoregressive models of the paper (LLaVA-Med above all), so that length, cost per word and repetition are
compared between two ways of writing and not between two sizes or two data sets. `MedVForCausalLM` takes the place of
`MedVForMaskedDiffusion` wherever one is trained or asked; its answers come from transformers' own `generate` with a key-value
cache, greedily. It knows no noise: the times and draws that training batches carry are accepted and not read.
"""

import time
from collections.abc import Generator

import torch
from huggingface_hub.dataclasses import strict
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel, LlamaForCausalLM

from medv.diffusion.blockwise import SamplerOutput
from medv.diffusion.config import SamplerConfig
from medv.diffusion.trace import Events, Trace
from medv.model.configuration import MedVConfig
from medv.model.modeling import IGNORED_LABEL, MedVForMaskedDiffusion, MedVOutput


def language_tower(model: MedVForMaskedDiffusion) -> LlamaForCausalLM:
    """The language tower of a model with its head, sharing the weights."""
    with torch.device("meta"):
        tower = LlamaForCausalLM(model.config.text_config)
    tower.model, tower.lm_head = model.model.language_model, model.lm_head
    return tower


@strict
class MedVTwinConfig(MedVConfig):
    """A `MedVConfig` whose language tower is causal."""

    model_type = "llada_medv_twin"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.text_config.is_causal = True


class MedVForCausalLM(MedVForMaskedDiffusion):
    """Answers about an image token by token, left to right."""

    config: MedVTwinConfig
    config_class = MedVTwinConfig

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        u: torch.Tensor | None = None,
        logits_to_keep: slice | None = None,
        image_layouts: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_states: torch.Tensor | None = None,
    ) -> MedVOutput:
        """With labels [B, T] the mean cross-entropy of each labelled token given those before it; else as the parent.

        t and u belong to the noise of diffusion batches and are not read.
        """
        if labels is None:
            return super().forward(
                input_ids,
                attention_mask,
                pixel_values,
                image_features,
                logits_to_keep=logits_to_keep,
                image_layouts=image_layouts,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                vision_states=vision_states,
            )
        images = (pixel_values, image_features, image_layouts)
        hidden = self.model(input_ids, attention_mask, *images, position_ids, inputs_embeds, vision_states)  # [B, T, D]
        scored = labels[:, 1:] != IGNORED_LABEL  # [B, T - 1]
        loss = cross_entropy(self.lm_head(hidden[:, :-1][scored]).float(), labels[:, 1:][scored])
        return MedVOutput(loss=loss, last_hidden_state=hidden)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_layouts: torch.Tensor | None = None,
        *,
        config: SamplerConfig,
        row_indices: list[int] | None = None,
    ) -> SamplerOutput:
        """Answer left-padded prompts [B, P] greedily in at most `config.gen_length` tokens, at least `config.min_length`.

        `row_indices` number random draws, of which there are none. Block length, steps and seed have no meaning here; any
        other setting that a diffusion model would follow raises ValueError.
        """
        followed = ("gen_length", "block_length", "steps", "suppress_tokens", "stop_tokens", "min_length", "seed")
        if config != SamplerConfig(**{name: getattr(config, name, None) for name in followed}):
            raise ValueError(f"the autoregressive twin decodes greedily and cannot follow {config}: leave the rest out")
        settings = self.settings(config)
        started = time.perf_counter()
        features = None if pixel_values is None else self.model.get_image_features(pixel_values, image_layouts)
        ids = language_tower(self).generate(
            inputs_embeds=self.model.embed(input_ids, features),
            attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            max_new_tokens=settings.gen_length,
            min_new_tokens=settings.min_length or None,
            do_sample=False,
            eos_token_id=list(settings.stop_tokens) or None,
            pad_token_id=self.config.fill_token_id,
            suppress_tokens=[*settings.suppress_tokens, self.config.mask_token_id],
        )  # [B, at most gen_length]
        seconds = time.perf_counter() - started
        sequences = torch.nn.functional.pad(ids, (0, settings.gen_length - ids.shape[1]), value=self.config.fill_token_id)
        stops = torch.isin(sequences, torch.tensor(settings.stop_tokens, device=sequences.device))
        stops[:, ids.shape[1] :] = False
        found = stops.any(dim=1).tolist()
        ends = [int(row.int().argmax()) if has else settings.gen_length for row, has in zip(stops, found, strict=True)]
        for row, end in enumerate(ends):
            sequences[row, end:] = self.config.fill_token_id
        return SamplerOutput(
            sequences=sequences,
            lengths=ends,
            forwards=[min(end + 1, settings.gen_length) for end in ends],
            seconds=seconds,
            finish_reason=["stop" if has else "length" for has in found],
            trace=Trace((), settings.gen_length, self.config.mask_token_id),
        )

    def acceleration(self, config: SamplerConfig, graphs: bool | None = None) -> dict[str, bool]:
        """Nothing: transformers' own `generate` does the work. Raises ValueError where graphs are asked for."""
        if graphs:
            raise ValueError("the autoregressive twin has no CUDA graphs: leave them off")
        return {}

    def stream(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_layouts: torch.Tensor | None = None,
        *,
        config: SamplerConfig,
        row_indices: list[int] | None = None,
        tell: bool = True,
    ) -> Generator[Events, None, SamplerOutput]:
        """`generate` in the form of the parent's; whether asked to `tell` or not, there are no events: the order is known."""
        yield from ()
        given = (input_ids, attention_mask, pixel_values, image_layouts)
        return self.generate(*given, config=config, row_indices=row_indices)


def causal_twin(model: MedVForMaskedDiffusion) -> MedVForCausalLM:
    """A causal model of the same shape with copies of the same weights; the global generator is left as it was."""
    own = {"model_type", "architectures", "transformers_version"}
    config = MedVTwinConfig(**{name: value for name, value in model.config.to_dict().items() if name not in own})
    with torch.random.fork_rng(devices=[]):
        twin = MedVForCausalLM(config)
    twin.load_state_dict(model.state_dict())
    twin.tie_weights()
    return twin.train(model.training)


AutoConfig.register(MedVTwinConfig.model_type, MedVTwinConfig)
AutoModel.register(MedVTwinConfig, MedVForCausalLM)
