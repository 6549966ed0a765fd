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

from collections.abc import Callable
from dataclasses import dataclass

import torch

from medv import limits
from medv.diffusion.blockwise import BlockwiseConfig
from medv.diffusion.infilling import given_response


@dataclass(frozen=True)
class ChosenLength:
    """The number of positions at which an end is less probable than `threshold`, but at least `shortest` tokens and at most
    gen_length - 1: the canvas always holds an end.

    block_length and steps are those of the whole canvas: a block behind the end takes no forwards, so that one block (B = L)
    writes short answers with as many as long ones. A lower threshold chooses shorter answers. `shortest` = gen_length is the
    fixed canvas and costs no forward.
    """

    threshold: float = 0.5
    shortest: int = 1

    def __post_init__(self):
        limits.real("threshold", self.threshold, 0, 1, open_ends="least, most")
        limits.whole("shortest", self.shortest, 1)


LENGTHS: dict[str, ChosenLength | None] = {"canvas": None, "auto": ChosenLength()}


def length_named(name: str) -> ChosenLength | None:
    """One of LENGTHS. Raises ValueError for an unknown name."""
    if name not in LENGTHS:
        raise ValueError(f"unknown length {name!r}: use one of {', '.join(LENGTHS)}")
    return LENGTHS[name]


def end_probabilities(logits: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The probability of any of the tokens `ends` [E] under softmax(logits [..., V]), float32 [...]."""
    logits = logits.float()
    return (logits.index_select(-1, ends).logsumexp(dim=-1) - logits.logsumexp(dim=-1)).exp()


def beginning(
    denoise: Callable[..., torch.Tensor],
    prompt: torch.Tensor,
    config: BlockwiseConfig,
    response: torch.Tensor | None,
    mask_token_id: int,
    fill_token_id: int,
) -> tuple[torch.Tensor | None, int]:
    """The canvas of a sampling call and the forwards it took: `given_response`, or, where the config of `sampler.stream` has a
    length, the response [B, L] with end tokens behind the length of each row. The choice draws nothing and looks at no other
    row. Raises ValueError where there is no end token, or a response already.
    """
    if config.length is None:
        return given_response(response, prompt, config, mask_token_id), 0
    if response is not None:
        raise ValueError("a response with fixed tokens has its length: leave out either the response or the chosen length")
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
    return given_response(canvas, prompt, config, mask_token_id), 1
