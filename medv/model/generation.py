"""Sampling from a model: `generate` and `stream` of `MedVForMaskedDiffusion`, and how each sampler calls the network.

The samplers are in `medv.diffusion`; this module gives them denoisers: a `Decoder`, the plain forward pass, or, for the
configurations that reproduce the public references, a forward pass over embeddings.
"""

import dataclasses
from collections.abc import Generator

import torch
from torch import nn

from medv.diffusion.caching import NO_CACHE
from medv.diffusion.config import Denoiser, SamplerConfig, SamplerOutput, join_outputs
from medv.diffusion.fast import stream_fast
from medv.diffusion.official import Uniform
from medv.diffusion.sampler import sample, stream
from medv.diffusion.trace import Events, drain
from medv.model.decoding import decoder_for
from medv.model.devices import can_compile, computes_on


class DiffusionGeneration:
    """The generation methods of `MedVForMaskedDiffusion`."""

    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_layouts: torch.Tensor | None = None,
        *,
        config: SamplerConfig,
        image_features: torch.Tensor | None = None,
        row_indices: list[int] | None = None,
        uniform: Uniform | None = None,
        reference: bool = False,
        graphs: bool = False,
        compiled: bool = False,
    ) -> SamplerOutput:
        """Answer left-padded prompts [B, P]; the images are looked at once, or not at all given their image_features.

        `medv.diffusion.sampler.sample` says what is computed. With `reference` that plain loop over `forward` computes it;
        otherwise `medv.diffusion.fast` gives the same tokens sooner (with a revision, the plain loop over a `Decoder`).
        `graphs` replays forwards as CUDA graphs, and `compiled` fuses what lies between
        the matrix products (see `medv.model.decoding`). `uniform` gives the random draws of
        the presets of `SamplerConfig` (see `medv.diffusion.official`), which are always computed plainly.
        """
        given = (input_ids, attention_mask, pixel_values, image_layouts)
        how = {"image_features": image_features, "row_indices": row_indices, "uniform": uniform}
        how |= {"graphs": graphs, "compiled": compiled}
        return drain(self.stream(*given, config=config, reference=reference, tell=False, **how))

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
        row_indices: list[int] | None = None,
        uniform: Uniform | None = None,
        reference: bool = False,
        graphs: bool = False,
        compiled: bool = False,
        tell: bool = True,
    ) -> Generator[Events, None, SamplerOutput]:
        """`generate` as it happens: yields the events of each forward (`medv.diffusion.trace`) and returns its output.

        The presets yield once. Without `tell` the events may come empty, so that no forward makes the host wait for a GPU.
        """
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("a prompt is padded on its right: pad prompts on the left, as MedVProcessor does")
        if reference and config.cache != NO_CACHE:
            raise ValueError(f"the reference has no cache, but the configuration asks for {config.cache}: leave it out")
        if pixel_values is not None:
            image_features = self.model.get_image_features(pixel_values, image_layouts)
        if config.preset != "medv":
            suppressed = _first_given(config.suppress_tokens, self.config.suppress_token_ids)
            settings = dataclasses.replace(config, suppress_tokens=suppressed)
            output = _generate_preset(self, input_ids, attention_mask, image_features, settings, uniform)
            yield output.trace.events
            return output
        own, settings = self.config, self.settings(config)
        ids = {"mask_token_id": own.mask_token_id, "fill_token_id": own.fill_token_id, "row_indices": row_indices}
        if reference:
            plain = self._plain_denoiser(input_ids, attention_mask, image_features)
            return (yield from stream(plain, input_ids, settings, **ids))
        seen = {"attention_mask": attention_mask, "image_features": image_features, "cache": config.cache}
        with decoder_for(self, input_ids, config.gen_length, graphs=graphs, compiled=compiled, **seen) as decoder:
            if config.revision is None:
                output = yield from stream_fast(decoder, input_ids, settings, tell=tell, **ids)
            else:
                output = yield from stream(decoder, input_ids, settings, **ids)
            return dataclasses.replace(output, refreshes=decoder.refreshes)

    def acceleration(self, config: SamplerConfig, graphs: bool | None = None) -> dict[str, bool]:
        """What `generate` is told of `graphs` and `compiled`; None: both where they can be, which is on one GPU and without a
        preset, the second where there is a compiler too.

        Raises ValueError where graphs are asked for and cannot be.
        """
        could = (
            computes_on(self.get_input_embeddings()).type == "cuda"
            and not hasattr(self, "hf_device_map")
            and config.preset == "medv"
        )
        if graphs and not could:
            raise ValueError("CUDA graphs need a model on one CUDA device and no preset: leave them off")
        graphs = could if graphs is None else graphs
        return {"graphs": graphs, "compiled": graphs and can_compile()}

    def settings(self, config: SamplerConfig) -> SamplerConfig:
        """The configuration with the model's own suppressed and stop tokens where it leaves them open."""
        own = self.config
        # A placeholder in the answer would ask for one more visual token than there are.
        suppressed = (*_first_given(config.suppress_tokens, own.suppress_token_ids), own.image_token_id)
        stops = tuple(_first_given(config.stop_tokens, own.stop_token_ids))
        return dataclasses.replace(config, suppress_tokens=suppressed, stop_tokens=stops)

    def _plain_denoiser(
        self, prompt: torch.Tensor, attention_mask: torch.Tensor | None, features: torch.Tensor | None
    ) -> Denoiser:
        """`forward` over the whole canvas each time: what every faster way has to give."""
        width = prompt.shape[1]

        def denoise(canvas: torch.Tensor, columns: slice, *, unconditional: bool = False) -> torch.Tensor:
            ids, seen, mask = canvas, features, None
            if unconditional:
                ids, seen = canvas.clone(), None
                ids[:, :width] = self.config.mask_token_id
            if attention_mask is not None and not attention_mask.all():
                mask = torch.nn.functional.pad(attention_mask, (0, canvas.shape[1] - width), value=1)  # [B, T]
            return self(ids, mask, image_features=seen, logits_to_keep=columns).logits

        return denoise


def _generate_preset(
    model: nn.Module,
    prompt: torch.Tensor,
    attention_mask: torch.Tensor | None,
    features: torch.Tensor | None,
    config: SamplerConfig,
    uniform: Uniform | None,
) -> SamplerOutput:
    """Answers to left-padded prompts [B, P] with the visual tokens `features` [n, N, D] or [T', D] of a MedVForMaskedDiffusion.

    Raises ValueError where placeholders and visual tokens do not match.
    """
    own = model.config
    features = None if features is None else features.reshape(-1, features.shape[-1])  # [T', D]
    ids = {"mask_token_id": own.mask_token_id, "fill_token_id": own.fill_token_id, "uniform": uniform}
    if config.preset == "llada":
        return sample(_denoiser(model, prompt, attention_mask, features), prompt, config, **ids)
    outputs = []
    for row, line in enumerate(prompt):
        text = line[None] if attention_mask is None else line[attention_mask[row].bool()][None]
        seen, count = None, int((text == own.image_token_id).sum())
        if features is not None:
            seen, features = features[:count], features[count:]
        outputs.append(sample(_denoiser(model, text, None, seen), text, config, **ids))
    if features is not None and len(features):
        raise ValueError(f"{len(features)} visual tokens have no place in the prompts: let MedVProcessor build both")
    return join_outputs(outputs)


def _denoiser(
    model: nn.Module, prompt: torch.Tensor, attention_mask: torch.Tensor | None, features: torch.Tensor | None
) -> Denoiser:
    """Logits of a canvas by embeddings."""
    width, embedding = prompt.shape[1], model.get_input_embeddings()
    images = prompt == model.config.image_token_id  # [B, P]
    start = model.model.embed(prompt, features)  # [B, P, D]: raises where images and placeholders do not match

    def denoise(canvas: torch.Tensor, columns: slice, *, unconditional: bool = False) -> torch.Tensor:
        embeds = embedding(canvas)  # [B, T, D]
        embeds[:, :width][images] = start[images]
        if unconditional:
            embeds[:, :width] = embedding.weight[model.config.mask_token_id]
        seen = None
        if attention_mask is not None:
            seen = torch.nn.functional.pad(attention_mask, (0, canvas.shape[1] - width), value=1)  # [B, T]
        positions = torch.arange(canvas.shape[1], device=canvas.device)[None]
        return model(attention_mask=seen, inputs_embeds=embeds, position_ids=positions, logits_to_keep=columns).logits

    return denoise


def _first_given(asked: tuple[int, ...] | None, default: list[int] | tuple[int, ...]) -> tuple[int, ...]:
    return tuple(default) if asked is None else asked
