"""Revisions: written tokens are masked again, to be predicted with more context.

A masked-diffusion model treats its own tokens as given: re-predicting them only confirms them. Doubt is therefore measured by
the confidence at commit time and by repetition. `RevealRemask` spends forwards reserved for the time after the fill; `ReMDM`
takes tokens back during the fill. A position is taken back at most `limit` times, a stop token never.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from medv import limits
from medv.diffusion.schedules import top_positions


@dataclass(frozen=True)
class RevisionState:
    """A block after a forward: B rows, K positions.

    score [B, K] float32: log-confidence when each token was written. tokens [B, K] int64. written [B, K] bool. allowed [B, K]
    bool: may be taken back. step: forwards the block has had in this phase, this one included. steps: all forwards of the
    phase. draw: returns uniform draws [B, K].
    """

    score: torch.Tensor
    tokens: torch.Tensor
    written: torch.Tensor
    allowed: torch.Tensor
    step: int
    steps: int
    draw: Callable[[], torch.Tensor]


class Revision:
    """Chooses the tokens to take back. `budget`: the share of reserved forwards; `limit`: how often per position."""

    budget: float
    limit: int

    def reserve(self, steps: int) -> int:
        """Of the `steps` forwards of a block, those reserved for the time after it is full: one at least, if it has two."""
        return min(max(1, round(self.budget * steps)), steps - 1)

    def during(self, state: RevisionState) -> torch.Tensor | None:
        """Positions to take back after a forward of the fill that is not the last, bool [B, K] or None."""
        return None

    def after(self, state: RevisionState) -> torch.Tensor | None:
        """Positions to take back before each reserved forward, bool [B, K] or None."""
        raise NotImplementedError


@dataclass(frozen=True)
class RevealRemask(Revision):
    """Reserves the share `budget` of a block's forwards; when the block is full, as many tokens are taken back and refilled.

    Tokens that repeat the 1 to `ngram` tokens before them go first, then those of the lowest confidence at commit time, as in
    ReMDM-conf (arXiv 2503.00307) but after the fill. tokens: positions per reserved forward; 1 predicts them one at a time.
    ngram: 0 uses the confidence alone.
    """

    budget: float = 0.125
    tokens: int = 1
    ngram: int = 2
    limit: int = 1

    def __post_init__(self):
        limits.real("budget", self.budget, 0, 1, open_ends="least, most")
        for name, least in (("tokens", 1), ("ngram", 0), ("limit", 1)):
            limits.whole(name, getattr(self, name), least)

    def after(self, state: RevisionState) -> torch.Tensor | None:
        """All at once, before the first reserved forward."""
        if state.step > 0:
            return None
        doubt = -state.score
        for n in range(1, self.ngram + 1):
            doubt = doubt + 1e6 * repeated(state.tokens, state.written, n)
        doubt = doubt.masked_fill(~state.allowed, -torch.inf)
        return top_positions(doubt, self.tokens * state.steps) & state.allowed


@dataclass(frozen=True)
class ReMDM(Revision):
    """Remasking as a sampler of the same diffusion (ReMDM, arXiv 2503.00307), with alpha the share of the block written.

    sigma_max = min(1, (1 - alpha_s) / alpha_t) is the largest chance to take a token back between the times t and s. "cap":
    min(eta, sigma_max). "rescale": eta sigma_max. "conf": eta sigma_max, distributed over the written tokens in proportion
    to exp(-confidence at commit time), so that about one token at most is expected back. "loop": nothing during the fill; the
    share `budget` of the forwards is reserved, and before each of them a token is taken back with chance eta.
    """

    kind: str = "conf"
    eta: float = 0.1
    budget: float = 0.25
    limit: int = 2

    def __post_init__(self):
        limits.named("kind", self.kind, ("cap", "rescale", "conf", "loop"))
        limits.real("eta", self.eta, 0, 1, open_ends="least")
        limits.real("budget", self.budget, 0, 1, open_ends="least, most")
        limits.whole("limit", self.limit, 1)

    def reserve(self, steps: int) -> int:
        """Forwards of the loop."""
        return super().reserve(steps) if self.kind == "loop" else 0

    def during(self, state: RevisionState) -> torch.Tensor | None:
        """Each token with the chance of the kind."""
        if self.kind == "loop":
            return None
        now = state.written.float().mean(dim=1, keepdim=True).clamp_min(1e-6)  # [B, 1]
        largest = ((1 - min(1.0, (state.step + 1) / state.steps)) / now).clamp_max(1)
        chance = largest.clamp_max(self.eta) if self.kind == "cap" else self.eta * largest
        if self.kind == "conf":
            doubt = (-state.score.exp()).exp() * state.written
            chance = chance * doubt / doubt.sum(dim=1, keepdim=True).clamp_min(1e-6)
        return (state.draw() < chance) & state.allowed

    def after(self, state: RevisionState) -> torch.Tensor | None:
        """Each token with chance eta."""
        return (state.draw() < self.eta) & state.allowed


def repeated(tokens: torch.Tensor, written: torch.Tensor, n: int) -> torch.Tensor:
    """Positions [B, K] bool inside an n-gram of written tokens that repeats the one right before it; the first stays.

    n = 1 marks the second and later ones of "the the the", n = 2 the second "on the" of "on the on the".
    """
    if tokens.shape[1] < 2 * n:
        return torch.zeros_like(written)
    same = (tokens[:, n:] == tokens[:, :-n]) & written[:, n:] & written[:, :-n]  # [B, K - n]: equal to n places before
    runs = same.unfold(1, n, 1).all(dim=-1)  # [B, K - 2n + 1]
    marked = torch.zeros_like(written)
    for offset in range(n):
        marked[:, n + offset : n + offset + runs.shape[1]] |= runs
    return marked
