"""What all samplers share: the denoiser they call, the settings of block-wise sampling, and their output."""

from dataclasses import dataclass
from typing import Protocol

import torch

from medv import limits
from medv.diffusion.trace import Trace

LONGEST = 2**20
"""Tokens, or forwards, of a response: more than any model has positions for."""
TEMPERATURES = (1e-6, 100.0)
"""Between these, and at 0, the noisy logits are finite in float64."""


class Denoiser(Protocol):
    """The network as a sampler sees it."""

    def __call__(self, canvas: torch.Tensor, columns: slice, *, unconditional: bool = False) -> torch.Tensor:
        """Logits [B, K, V] at the K `columns` of the canvas [B, T]; `unconditional` hides the prompt (guidance)."""


@dataclass(frozen=True)
class BlockwiseConfig:
    """The settings of every sampler. L = gen_length, B = block_length, Z = steps, the paper's symbols.

    gen_length: tokens of the response canvas. block_length: tokens of a block; must divide gen_length. steps: forwards
    allowed over all blocks; must be a multiple of the number of blocks (Z = L commits one token a forward).
    temperature: 0 takes the most probable token, above it Gumbel noise is added in float64. cfg_scale: classifier-free
    guidance, logits = u + (1 + scale)(c - u). remasking: "low_confidence" keeps the most confident predictions of a
    forward, "random" keeps random ones. suppress_tokens: ids that are never written; None leaves it to the model. seed: of
    all random draws.
    """

    gen_length: int = 128
    block_length: int = 32
    steps: int = 128
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    suppress_tokens: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("gen_length", "block_length", "steps"):
            limits.whole(name, getattr(self, name), 1, LONGEST)
        if self.gen_length % self.block_length:
            divisors = [d for d in range(1, self.gen_length + 1) if self.gen_length % d == 0]
            raise ValueError(
                f"block_length {self.block_length} does not divide gen_length {self.gen_length}: "
                f"choose a divisor, for example {min(divisors, key=lambda d: abs(d - self.block_length))}"
            )
        if self.steps % self.blocks:
            low = max(self.blocks, self.steps // self.blocks * self.blocks)
            raise ValueError(f"steps {self.steps} is not a multiple of the {self.blocks} blocks: use {low}, for example")
        if self.temperature != 0:
            limits.real("temperature", self.temperature, *TEMPERATURES)
        limits.real("cfg_scale", self.cfg_scale, 0)
        limits.seed("seed", self.seed)
        limits.named("remasking", self.remasking, ("low_confidence", "random"))

    @property
    def blocks(self) -> int:
        """Number of blocks, L / B."""
        return self.gen_length // self.block_length


@dataclass(frozen=True)
class SamplerOutput:
    """The result of a sampling call; B rows.

    sequences [B, L] int64: the responses, `fill_token_id` from each row's end on. lengths [B]: tokens before the stop
    token. forwards [B]: network calls while the row was open (guidance counts two). seconds: wall time of the call.
    finish_reason [B]: "stop" or "length". trace: the events. refreshes: forwards of the call that filled a cache.
    """

    sequences: torch.Tensor
    lengths: list[int]
    forwards: list[int]
    seconds: float
    finish_reason: list[str]
    trace: Trace
    refreshes: int = 0
