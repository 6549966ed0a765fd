"""A length of its own for every answer: where the end tokens are to stand is decided before the text is written.

A masked diffusion model gets its length as the size of its canvas. If its training scored end tokens behind the answers
(padding "fixed:N" or "batch" of `medv.training.collate`), one forward over the masked canvas gives at each position the
probability that the answer is over there, however long the canvas is. The sum over the end tokens is read, the length is
chosen, an end token is written behind it and the fill token behind that, and the sampler writes the rest as an infilling
(`medv.diffusion.infilling`). Without such a choice the sampler either forbids end tokens and fills the canvas (the paper), or
allows them and, being surest of them, writes them far too early. rho-EOS (arXiv 2601.22527) and DAEDAL (2508.00819) read the
same probabilities and change the canvas during the sampling; here they are read once.

A model that was trained without such padding expects its end at the last position of any canvas and so gets the whole canvas.
"""

import time
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch

from medv.diffusion import sampler
from medv.diffusion.blockwise import Denoiser, SamplerOutput
from medv.diffusion.config import SamplerConfig
from medv.diffusion.sampler import RowDenoiser
from medv.diffusion.trace import Events


def end_probabilities(logits: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The probability of any of the tokens `ends` [E] under softmax(logits [..., V]), float32 [...]."""
    logits = logits.float()
    return (logits.index_select(-1, ends).logsumexp(dim=-1) - logits.logsumexp(dim=-1)).exp()


def stream(
    denoise: RowDenoiser | Denoiser,
    prompt: torch.Tensor,
    config: SamplerConfig,
    *,
    response: torch.Tensor | None = None,
    **options: Any,
) -> Generator[Events, None, SamplerOutput]:
    """`sampler.stream` with the length that `config` may choose; its forward is counted.

    Raises ValueError where a length is to be chosen and there is a response already, or no end token.
    """
    if config.length is None:
        return (yield from sampler.stream(denoise, prompt, config, response=response, **options))
    if response is not None:
        raise ValueError("a response with fixed tokens has its length: leave out either the response or the chosen length")
    started = time.perf_counter()
    ended, spent = chosen_response(denoise, prompt, config, options["mask_token_id"], options["fill_token_id"])
    output = yield from sampler.stream(denoise, prompt, replace(config, length=None), response=ended, **options)
    forwards = [count + spent for count in output.forwards]
    return replace(output, forwards=forwards, seconds=time.perf_counter() - started)


@torch.inference_mode()
def chosen_response(
    denoise: RowDenoiser | Denoiser, prompt: torch.Tensor, config: SamplerConfig, mask_token_id: int, fill_token_id: int
) -> tuple[torch.Tensor | None, int]:
    """The response [B, L] with end tokens behind the length of each row, and the forwards it took; None for a whole canvas.

    The choice draws nothing and looks at no other row.
    """
    if not config.stop_tokens:
        raise ValueError("a length is chosen by the end token, and stop_tokens names none: name one, or leave out length")
    (rows, width), size, least = prompt.shape, config.gen_length, max(config.length.shortest, config.min_length)
    if least == size:
        return None, 0
    canvas = prompt.new_full((rows, size), mask_token_id)
    # These columns never begin where the first block does, so that a cache does not take this forward for one of its own.
    logits = denoise(torch.cat([prompt, canvas], dim=1), slice(width + least, width + size))  # [B, L - least, V]
    stops = prompt.new_tensor(config.stop_tokens)
    ends = end_probabilities(logits, torch.cat([stops, prompt.new_tensor([fill_token_id])]).unique())
    length = (least + (ends < config.length.threshold).sum(dim=1, keepdim=True)).clamp_max(size - 1)  # [B, 1]
    place = torch.arange(size, device=prompt.device)[None]
    canvas = canvas.masked_fill(place == length, config.stop_tokens[0]).masked_fill(place > length, fill_token_id)
    return canvas, 1
