"""Sampling from a model: `generate` and `stream` of `MedVForMaskedDiffusion`.

The samplers are in `medv.diffusion`; this module gives them denoisers: a `Decoder`, the plain forward pass, or, for the
configurations that reproduce the public references, a forward pass over embeddings.
"""

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad

from medv import limits
from medv.diffusion import official
from medv.diffusion.blockwise import BlockwiseConfig, Denoiser, SamplerOutput
from medv.diffusion.caching import NO_CACHE
from medv.diffusion.config import SamplerConfig
from medv.diffusion.infilling import check_ids
from medv.diffusion.official import LladaConfig, OfficialConfig, Uniform, join_outputs
from medv.diffusion.trace import Events, drain
from medv.model import length
from medv.model.decoding import decoder_for
from medv.model.devices import can_compile, computes_on


class DiffusionGeneration:
    """The generation methods of `MedVForMaskedDiffusion`."""

    def generate(self, *inputs: torch.Tensor, config: BlockwiseConfig, **options: Any) -> SamplerOutput:
        """Answer left-padded prompts; the arguments are those of `stream`. Unknown options raise TypeError."""
        return drain(self.stream(*inputs, config=config, tell=False, **options))

    @torch.inference_mode()
    def stream(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_layouts: torch.Tensor | None = None,
        *,
        config: BlockwiseConfig,
        image_features: torch.Tensor | None = None,
        row_indices: list[int] | None = None,
        response: torch.Tensor | None = None,
        uniform: Uniform | None = None,
        reference: bool = False,
        graphs: bool = False,
        compiled: bool = False,
        tell: bool = True,
    ) -> Generator[Events, None, SamplerOutput]:
        """Answer left-padded prompts [B, P]: yields the events of each forward as it happens and returns the output.

        attention_mask [B, P], 1 = seen; pixel_values and image_layouts as in `forward`, or image_features [n, N, D] or [T', D]
        in their place, which spare the vision tower. row_indices: names of the rows for the random draws. response [B, L]
        int64: the answer with mask tokens at open positions, see `medv.diffusion.infilling`. reference: compute every position
        by `forward` instead of a `Decoder`. graphs: replay forwards as CUDA graphs; compiled: fuse what lies
        between the matrix products (see `acceleration`). tell: `medv.diffusion.sampler.stream`.
        An `OfficialConfig` or `LladaConfig` yields once, computes plainly, takes its random draws from `uniform`, and refuses a
        response.
        """
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("a prompt is padded on its right: pad prompts on the left, as MedVProcessor does")
        if pixel_values is not None:
            image_features = self.model.get_image_features(pixel_values, image_layouts)
        settings = self.settings(config)
        ids = {"mask_token_id": self.config.mask_token_id, "fill_token_id": self.config.fill_token_id}
        if response is not None:
            self._check_response(response, settings)
        if not isinstance(settings, SamplerConfig):
            output = self._sample_as_published(input_ids, attention_mask, image_features, settings, **ids, uniform=uniform)
            yield output.trace.events
            return output
        ids |= {"row_indices": row_indices, "response": response, "tell": tell}
        if reference:
            if config.cache != NO_CACHE:
                raise ValueError(f"the reference has no cache, but the configuration asks for {config.cache}: leave it out")
            plain = self._plain_denoiser(input_ids, attention_mask, image_features)
            return (yield from length.stream(plain, input_ids, settings, **ids))
        seen = {"attention_mask": attention_mask, "image_features": image_features, "cache": config.cache}
        with decoder_for(self, input_ids, config.gen_length, graphs=graphs, compiled=compiled, **seen) as decoder:
            output = yield from length.stream(decoder, input_ids, settings, **ids)
            return replace(output, refreshes=decoder.refreshes)

    def settings(self, config: BlockwiseConfig) -> BlockwiseConfig:
        """The configuration with the model's own tokens where it leaves them open; ValueError for one without an embedding."""
        own, suppressed, stops = self.config, config.suppress_tokens, getattr(config, "stop_tokens", ())
        suppressed = tuple(own.suppress_token_ids if suppressed is None else suppressed)
        stops = tuple(own.stop_token_ids if stops is None else stops)
        for token in (*suppressed, *stops):
            limits.whole("a suppressed or stop token", token, 0, len(self.get_input_embeddings().weight) - 1)
        if not isinstance(config, SamplerConfig):
            return replace(config, suppress_tokens=suppressed)
        # A placeholder of an image would ask for one more visual token than there are; a mask is never written over.
        return replace(config, suppress_tokens=(*suppressed, own.image_token_id, own.mask_token_id), stop_tokens=stops)

    def acceleration(self, config: BlockwiseConfig, graphs: bool | None = None) -> dict[str, bool]:
        """The options `graphs` and `compiled` of `generate`. None turns both on where they work: on one CUDA device and with a
        `SamplerConfig`, `compiled` where there is a compiler too.

        Raises ValueError where graphs are asked for and cannot be.
        """
        one_gpu = computes_on(self.get_input_embeddings()).type == "cuda" and not hasattr(self, "hf_device_map")
        possible = one_gpu and isinstance(config, SamplerConfig)
        if graphs and not possible:
            raise ValueError("CUDA graphs need a model on one CUDA device and no preset: leave them off")
        graphs = possible if graphs is None else graphs
        return {"graphs": graphs, "compiled": graphs and can_compile()}

    def _check_response(self, response: torch.Tensor, settings: BlockwiseConfig) -> None:
        """Raises ValueError for what no response can be with this vocabulary or this sampler."""
        if not isinstance(settings, SamplerConfig):
            raise ValueError(f"the preset {settings.preset!r} cannot keep tokens of a response: take SamplerConfig(...)")
        check_ids(response, len(self.get_input_embeddings().weight))
        if (response == self.config.image_token_id).any():
            raise ValueError("the response holds the placeholder of an image, which stands in prompts alone: leave it out")

    def _plain_denoiser(self, prompt: torch.Tensor, seeing: torch.Tensor | None, features: torch.Tensor | None) -> Denoiser:
        """`forward` over the whole canvas each time."""
        width = prompt.shape[1]

        def denoise(canvas: torch.Tensor, columns: slice, *, unconditional: bool = False) -> torch.Tensor:
            ids, seen, mask = canvas, features, None
            if unconditional:
                ids, seen = canvas.clone(), None
                ids[:, :width] = self.config.mask_token_id
            if seeing is not None and not seeing.all():
                mask = pad(seeing, (0, canvas.shape[1] - width), value=1)  # [B, T]
            return self(ids, mask, image_features=seen, logits_to_keep=columns).logits

        return denoise

    def _sample_as_published(
        self,
        prompt: torch.Tensor,
        attention_mask: torch.Tensor | None,
        features: torch.Tensor | None,
        config: OfficialConfig | LladaConfig,
        **ids: Any,
    ) -> SamplerOutput:
        """LLaDA takes the batch as it is, the official sampler row by row without padding.

        Raises ValueError where placeholders and visual tokens do not match.
        """
        features = None if features is None else features.reshape(-1, features.shape[-1])  # [T', D]
        if isinstance(config, LladaConfig):
            return official.sample(self._embedding_denoiser(prompt, attention_mask, features), prompt, config, **ids)
        outputs = []
        for row, line in enumerate(prompt):
            text = line[None] if attention_mask is None else line[attention_mask[row].bool()][None]
            seen, count = None, int((text == self.config.image_token_id).sum())
            if features is not None:
                seen, features = features[:count], features[count:]
            outputs.append(official.sample(self._embedding_denoiser(text, None, seen), text, config, **ids))
        if features is not None and len(features):
            raise ValueError(f"{len(features)} visual tokens have no place in the prompts: let MedVProcessor build both")
        return join_outputs(outputs)

    def _embedding_denoiser(self, prompt: torch.Tensor, seeing: torch.Tensor | None, features: torch.Tensor | None) -> Denoiser:
        """`forward` over embeddings, so that the id of a placeholder in the answer is a token like any other."""
        width, embedding = prompt.shape[1], self.get_input_embeddings()
        images = prompt == self.config.image_token_id  # [B, P]
        start = self.model.embed(prompt, features)  # [B, P, D]: raises where images and placeholders do not match

        def denoise(canvas: torch.Tensor, columns: slice, *, unconditional: bool = False) -> torch.Tensor:
            embeds, seen = embedding(canvas), None  # [B, T, D]
            embeds[:, :width][images] = start[images]
            if unconditional:
                embeds[:, :width] = embedding.weight[self.config.mask_token_id]
            if seeing is not None:
                seen = pad(seeing, (0, canvas.shape[1] - width), value=1)  # [B, T]
            positions = torch.arange(canvas.shape[1], device=canvas.device)[None]
            return self(attention_mask=seen, inputs_embeds=embeds, position_ids=positions, logits_to_keep=columns).logits

        return denoise
