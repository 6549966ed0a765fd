"""The autoregressive twin: a MedV model of the same size that is causal and trained on the next token.

It represents the autoregressive models of the paper (LLaVA-Med above all), so that length, cost per word and repetition
compare two ways of generating and not two sizes or two data sets. `MedVForCausalLM` replaces `MedVForMaskedDiffusion`
wherever one is trained or asked; it answers greedily by transformers' own `generate` with a key-value cache.
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


# Settings of a sampler that the twin follows or that mean nothing to it.
FREE = ("row_indices", "tell")
FOLLOWED = ("gen_length", "block_length", "steps", "suppress_tokens", "stop_tokens", "min_length", "seed")


class MedVForCausalLM(MedVForMaskedDiffusion):
    """Answers about an image token by token, left to right."""

    config: MedVTwinConfig
    config_class = MedVTwinConfig

    def _loss(self, labels: torch.Tensor, t: torch.Tensor | None, u: torch.Tensor | None, **inputs) -> MedVOutput:
        """The mean cross-entropy of each labelled token given those before it; t and u, the noise of a batch, are ignored."""
        hidden = self.model(**inputs)  # [B, T, D]
        scored = labels[:, 1:] != IGNORED_LABEL  # [B, T - 1]
        loss = cross_entropy(self.lm_head(hidden[:, :-1][scored]).float(), labels[:, 1:][scored])
        return MedVOutput(loss=loss, last_hidden_state=hidden)

    @torch.inference_mode()
    def stream(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_layouts: torch.Tensor | None = None,
        *,
        config: SamplerConfig,
        image_features: torch.Tensor | None = None,
        **options,
    ) -> Generator[Events, None, SamplerOutput]:
        """Answer left-padded prompts [B, P] greedily in at most `config.gen_length` tokens, at least `config.min_length`.

        There are no events and no random draws: the parent's row_indices and tell have no effect, and neither have block
        length, steps and seed. Any other setting or option of diffusion raises ValueError.
        """
        refused = [name for name, value in options.items() if value is not None and value is not False and name not in FREE]
        if refused:
            raise ValueError(f"the autoregressive twin has no option {', '.join(refused)} and fills no template: leave it out")
        if config != SamplerConfig(**{name: getattr(config, name, None) for name in FOLLOWED}):
            raise ValueError(f"the autoregressive twin decodes greedily and cannot follow {config}: leave the rest out")
        settings = self.settings(config)
        started = time.perf_counter()
        if pixel_values is not None:
            image_features = self.model.get_image_features(pixel_values, image_layouts)
        ids = language_tower(self).generate(
            inputs_embeds=self.model.embed(input_ids, image_features),
            attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            max_new_tokens=settings.gen_length,
            min_new_tokens=settings.min_length or None,
            do_sample=False,
            eos_token_id=list(settings.stop_tokens) or None,
            pad_token_id=self.config.fill_token_id,
            suppress_tokens=list(settings.suppress_tokens),
        )  # [B, at most gen_length]
        seconds, length = time.perf_counter() - started, settings.gen_length
        stops = torch.isin(ids, torch.tensor(settings.stop_tokens, device=ids.device))
        found = stops.any(dim=1)
        ends = torch.where(found, stops.int().argmax(dim=1), length)  # [B]
        written = torch.arange(length, device=ids.device) < ends[:, None]  # [B, L]
        sequences = torch.nn.functional.pad(ids, (0, length - ids.shape[1])).where(written, self.config.fill_token_id)
        yield from ()
        return SamplerOutput(
            sequences=sequences,
            lengths=ends.tolist(),
            forwards=(ends + 1).clamp_max(length).tolist(),
            seconds=seconds,
            finish_reason=["stop" if has else "length" for has in found.tolist()],
            trace=Trace((), length, self.config.mask_token_id),
        )

    def acceleration(self, config: SamplerConfig, graphs: bool | None = None) -> dict[str, bool]:
        """No options: transformers' own `generate` does the work. Raises ValueError where graphs are requested."""
        if graphs:
            raise ValueError("the autoregressive twin has no CUDA graphs: leave them off")
        return {}


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
