"""A model sampled in the way of the public references: `SamplerConfig.official()` and `SamplerConfig.llada()`.

The algorithms are in `medv.diffusion.official`; here is how they see the network: by embeddings, so that a placeholder's id in
the answer is a token like any other. "official" takes row by row without padding, "llada" the batch as it is.
"""

import torch
from torch import nn

from medv.diffusion.config import Denoiser, SamplerConfig, SamplerOutput, join_outputs
from medv.diffusion.official import Uniform
from medv.diffusion.sampler import sample


def generate_preset(
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
