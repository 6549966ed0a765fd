"""Algorithm 1 of the paper: unmask the response block by block, the most confident predictions first.

This version is written to be read. `medv.diffusion.sampler` writes the same tokens faster (the tests compare the two) and adds
stop tokens, guidance, other schedules, filters and revision.
"""

import torch

from medv.diffusion.blockwise import Denoiser
from medv.diffusion.schedules import top_positions, transfer_counts


@torch.inference_mode()
def sample_response(
    denoise: Denoiser,
    prompt: torch.Tensor,
    *,
    gen_length: int,
    block_length: int,
    steps: int,
    mask_token_id: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    response: torch.Tensor | None = None,
) -> torch.Tensor:
    """Responses [B, L] to prompts [B, P] int64: L = gen_length tokens in blocks of B = block_length, with Z = steps forwards.

    `denoise` is the mask predictor and must never predict the mask itself; `generator` gives the noise of a temperature
    above 0; `response` [B, L] holds masks and tokens that stay (infilling).
    """
    width = prompt.shape[1]
    if response is None:
        response = prompt.new_full((len(prompt), gen_length), mask_token_id)  # fully masked
    canvas = torch.cat([prompt, response], dim=1)
    for start in range(width, width + gen_length, block_length):  # semi-autoregressive: left to right
        block = slice(start, start + block_length)
        masks = (canvas[:, block] == mask_token_id).sum(dim=1).tolist()
        counts = [transfer_counts(each, steps * block_length // gen_length) for each in masks]  # Z B / L forwards
        for count in prompt.new_tensor(counts).T:
            if not count.any():
                break
            tokens, confidence = predict(denoise(canvas, block), temperature, generator)  # [B, K] each
            confidence = confidence.masked_fill(canvas[:, block] != mask_token_id, -torch.inf)  # written tokens stay
            unmasked = top_positions(confidence, count)  # the others are remasked
            canvas[:, block] = torch.where(unmasked, tokens, canvas[:, block])
    return canvas[:, width:]


def predict(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The predicted tokens and their confidence, [B, K] each, of logits [B, K, V].

    Above temperature 0 the tokens are drawn from softmax(logits / temperature) by adding Gumbel noise. The confidence is the
    probability without temperature.
    """
    logits, noisy = logits.double(), logits.double()
    if temperature > 0:
        uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
        noisy = logits / temperature - torch.log(-torch.log(uniform))
    tokens = noisy.argmax(dim=-1)
    return tokens, logits.softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
