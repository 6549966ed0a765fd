"""Filters remove candidates that should be deferred to a later forward, before a schedule chooses.

Tokens of one forward are predicted independently of each other. Neighbors depend on each other most, and where little is known
the most frequent token is the best guess at all of them: "the the the". Filters cost no forward; deferred positions are
predicted again once their neighbors are written.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from medv import limits
from medv.diffusion.schedules import Filter, StepState


@dataclass(frozen=True)
class MinSpacing:
    """Tokens written at once lie at least `distance` apart; of two that are closer the more confident stays.

    Dilated unmasking (DUS, arXiv 2506.19037) as a filter on the order of confidence. 1 allows everything.
    """

    distance: int = 2

    def __post_init__(self):
        limits.whole("distance", self.distance, 1)

    def keep(self, state: StepState) -> torch.Tensor:
        """Greedily keep the best candidate and drop those near it, bool [B, K]."""
        length, reach = state.response.shape[1], self.distance - 1
        order = state.score.masked_fill(~state.candidates, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        rank = _spread(state, order.argsort(dim=1).float(), length)  # [B, L], 0 = best
        left = _spread(state, state.candidates.float(), 0).bool()
        kept = torch.zeros_like(left)
        while left.any():
            waiting = rank.masked_fill(~left, length)
            first = left & (waiting == -_widest(-waiting, reach))
            kept |= first
            left &= _widest(first.float(), reach) == 0
        return kept.gather(1, state.positions)


@dataclass(frozen=True)
class DuplicateVeto:
    """Defers a token equal to its written neighbor, or to a better candidate next to it, unless its confidence is high.

    confidence: from here on a repetition counts as intended: unlike a repetition penalty it permits sure repetitions.
    """

    confidence: float = 0.95

    def __post_init__(self):
        limits.real("confidence", self.confidence, 0, 1, open_ends="least")

    def keep(self, state: StepState) -> torch.Tensor:
        """Candidates that repeat nothing or are sure, bool [B, K]."""
        predicted = _spread(state, torch.where(state.candidates, state.tokens, -1), -1)  # [B, L], -1 = not asked
        written = state.response.masked_fill(state.masked, -1)
        score = _spread(state, state.score.masked_fill(~state.candidates, -torch.inf), -torch.inf)
        repeats = torch.zeros_like(state.masked)
        here, after = slice(None, -1), slice(1, None)
        for mine, other in ((here, after), (after, here)):
            better = score[:, other] > score[:, mine]
            if mine == after:
                better |= score[:, other] == score[:, mine]  # of equals the leftmost stays
            same = (predicted[:, mine] == written[:, other]) | ((predicted[:, mine] == predicted[:, other]) & better)
            repeats[:, mine] |= same & (predicted[:, mine] >= 0)
        return ~repeats.gather(1, state.positions) | (state.score >= math.log(self.confidence))


@dataclass(frozen=True)
class PhraseVeto:
    """Defers a token that repeats its neighbor or completes a run of `length` tokens that stands elsewhere in the answer.

    Runs are read from written and predicted tokens; a run is completed by its least confident token, and of two equal runs the
    one whose least confident token is the more confident stays. confidence: from here on a repetition counts as intended; at 1
    none does. This is the library's answer to section 6.4 of the paper; notebook 34 measures it.
    """

    length: int = 3
    confidence: float = 1.0

    def __post_init__(self):
        limits.whole("length", self.length, 2)
        limits.real("confidence", self.confidence, 0, 1, open_ends="least")

    def keep(self, state: StepState) -> torch.Tensor:
        """Candidates that complete no repetition or are sure, bool [B, K]."""
        if state.response.shape[1] < self.length:
            return DuplicateVeto(self.confidence).keep(state)
        score = _spread(state, state.score.masked_fill(~state.candidates, -torch.inf), -torch.inf)
        tokens = torch.where(state.masked, _spread(state, state.tokens, -1), state.response)  # [B, L]
        strength = torch.where(state.masked, score, torch.inf)
        runs = tokens.unfold(1, self.length, 1)  # [B, W, length]
        least, weakest = strength.unfold(1, self.length, 1).min(dim=-1)  # [B, W] each
        start = torch.arange(runs.shape[1], device=runs.device)
        mine, other = least[:, :, None], least[:, None, :]
        stays = (other > mine) | ((other == mine) & (start < start[:, None]))  # [B, W, W]: the other run before mine
        same = (runs[:, :, None] == runs[:, None]).all(dim=-1) & (torch.minimum(mine, other) > -torch.inf)
        again = (same & stays).any(dim=2)  # [B, W]
        repeats = torch.zeros_like(tokens).scatter_add(1, start + weakest, again.long()) > 0  # [B, L]
        sure = (state.score >= math.log(self.confidence)) & (self.confidence < 1)
        return DuplicateVeto(self.confidence).keep(state) & (sure | ~repeats.gather(1, state.positions))


def _spread(state: StepState, values: torch.Tensor, rest: float) -> torch.Tensor:
    """`values` [B, K] at their positions in the response, `rest` elsewhere: [B, L]."""
    return values.new_full(state.response.shape, rest).scatter(1, state.positions, values)


def _widest(values: torch.Tensor, reach: int) -> torch.Tensor:
    """The maximum within `reach` positions on both sides, [B, L]."""
    return F.max_pool1d(values[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0]


FILTERS: dict[str, Filter] = {"spacing": MinSpacing(), "veto": DuplicateVeto(), "phrases": PhraseVeto()}


def filters_named(name: str) -> tuple[Filter, ...]:
    """One of FILTERS as the setting `filters` of a sampler, () for "none". Raises ValueError for an unknown name."""
    limits.named("filter", name, ("none", *FILTERS))
    return () if name == "none" else (FILTERS[name],)
