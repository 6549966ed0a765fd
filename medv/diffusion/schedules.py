"""Schedules: which predictions of a forward are committed.

A schedule sees one forward of a batch as a `StepState` and marks what is written; `choose` combines it with filters
(`medv.diffusion.filters`) and guarantees for every schedule: a forward writes at least one token of each open row, a block
never takes more forwards than it may, and its last forward writes everything that is open. Ties are broken by (score
descending, position ascending). Schedules are frozen and decide for each row independently.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from medv import limits


@dataclass(frozen=True)
class StepState:
    """One forward of a block: B rows, K positions in ascending order.

    score [B, K] float32: log-confidence. tokens [B, K] int64: predictions. positions [B, K] int64: in the response. open
    [B, K] bool: may be written. candidates [B, K] bool: open and kept by the filters. entropy [B, K] float32: of the
    untempered distributions, in nats; None unless the schedule `needs_entropy`. fresh_entropy [B] float32: mean entropy of a
    position when its block was still all masks, over the blocks so far. response [B, L] int64 and masked [B, L] bool: the
    canvas before this forward. masks [B] int64: masked positions of the block. masks_after [B] int64: of later blocks. step:
    forwards this block has had. steps_left [B] int64: forwards it may still have, this one included. forwards_left [B] int64:
    the same for this block and all later ones together.
    """

    score: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    open: torch.Tensor
    candidates: torch.Tensor
    response: torch.Tensor
    masked: torch.Tensor
    masks: torch.Tensor
    masks_after: torch.Tensor
    step: int
    steps_left: torch.Tensor
    forwards_left: torch.Tensor
    entropy: torch.Tensor | None = None
    fresh_entropy: torch.Tensor | None = None


class Schedule:
    """Chooses the tokens of a forward. `across_blocks`: forwards that one block does not need may go to another."""

    needs_entropy = False
    across_blocks = False

    def select(self, state: StepState) -> torch.Tensor:
        """The positions to write, bool [B, K]; those outside `state.candidates` are ignored."""
        raise NotImplementedError


class Filter(Protocol):
    """Removes candidates that should be deferred to a later forward."""

    def keep(self, state: StepState) -> torch.Tensor:
        """Which of `state.candidates` stay, bool [B, K]."""


def choose(state: StepState, schedule: Schedule, filters: Sequence[Filter] = ()) -> torch.Tensor:
    """The positions that this forward writes, bool [B, K]: the schedule's choice among the candidates that the filters keep.

    Where this is empty, the best candidate of the row is written. The last forward of a block writes all that is open.
    """
    for each in filters:
        state = replace(state, candidates=_or_best(each.keep(state) & state.candidates, state))
    chosen = _or_best(schedule.select(state) & state.candidates, state)
    return torch.where(state.steps_left[:, None] <= 1, state.open, chosen)


def _or_best(chosen: torch.Tensor, state: StepState) -> torch.Tensor:
    none = ~chosen.any(dim=1, keepdim=True)
    return chosen | (none & best_candidates(state, 1))


def top_positions(score: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Mark the `count` (one number, or one a row [B]) highest scores of each row [B, K] bool; of equals the leftmost."""
    order = score.sort(dim=1, descending=True, stable=True).indices
    taken = torch.arange(score.shape[1], device=score.device)[None] < (count if isinstance(count, int) else count[:, None])
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order, taken.expand_as(order))


def best_candidates(state: StepState, count: int | torch.Tensor, value: torch.Tensor | None = None) -> torch.Tensor:
    """The `count` candidates of each row with the highest `value` [B, K] (default: the score), or all; bool [B, K]."""
    value = state.score if value is None else value
    return top_positions(value.masked_fill(~state.candidates, -torch.inf), count) & state.candidates


def pace(state: StepState) -> torch.Tensor:
    """Tokens that each row must write now to fill its block in equal steps, int64 [B]."""
    left = state.steps_left.clamp_min(1)
    return (state.masks + left - 1) // left


def transfer_counts(masks: int, steps: int) -> list[int]:
    """The number of tokens that each of `steps` forwards commits to fill `masks`: the remainder goes to the first ones."""
    base, extra = divmod(masks, steps)
    return [base + (step < extra) for step in range(steps)]


@dataclass(frozen=True)
class FixedSchedule(Schedule):
    """A fixed number of tokens at each forward.

    "linear": equal shares, the remainder first (Algorithm 1, LLaDA arXiv 2502.09992). "cosine": few first, many last
    (MaskGIT, arXiv 2202.04200). "shift": after the share x of the forwards the share s x / (1 + (s - 1) x) of the tokens is
    written, s = shift (LaViDa, arXiv 2505.16839, whose own argument counts the other way: its 1/3 is 3 here); s above 1
    writes many first, below 1 few first, 1 is linear.
    """

    shape: str = "linear"
    shift: float = 3.0

    def __post_init__(self):
        limits.named("shape", self.shape, ("linear", "cosine", "shift"))
        limits.real("shift", self.shift, 0, open_ends="least")

    def counts(self, masks: int, steps: int) -> list[int]:
        """The tokens of each forward when `masks` positions are filled in at most `steps`."""
        counts = []
        for step in range(min(steps, masks)):  # each writes at least one
            counts.append(int(self._count(torch.tensor(masks), step, torch.tensor(steps - step))))
            masks -= counts[-1]
        return counts

    def select(self, state: StepState) -> torch.Tensor:
        """The most confident candidates."""
        return best_candidates(state, self._count(state.masks, state.step, state.steps_left.clamp_min(1)))

    def _count(self, masks: torch.Tensor, step: int, left: torch.Tensor) -> torch.Tensor:
        """The masked positions without the share that the shape leaves for later; always at least one, at the end all."""
        if self.shape == "linear":
            return masks - masks * (left - 1) // left
        steps = (step + left).double()
        keep = self._remaining((step + 1) / steps) / self._remaining(step / steps)  # NaN where a filter left some of the rest
        return masks - (masks * keep.nan_to_num() + 1e-9).floor().long().clamp_max(masks - 1).clamp_min(0)

    def _remaining(self, done: torch.Tensor) -> torch.Tensor:
        if self.shape == "cosine":
            return torch.cos(done * math.pi / 2)
        return 1 - self.shift * done / (1 + (self.shift - 1) * done)


LINEAR = FixedSchedule()


@dataclass(frozen=True)
class ThresholdSchedule(Schedule):
    """All predictions with at least this confidence, but never fewer than equal steps would write.

    Fast-dLLM (arXiv 2505.22618): greedy parallel decoding equals one token at a time where (n + 1)(1 - threshold) <= 1 for
    n tokens. Forwards that are not needed are saved.
    """

    threshold: float = 0.9

    def __post_init__(self):
        limits.real("threshold", self.threshold, 0, 1, open_ends="least")

    def select(self, state: StepState) -> torch.Tensor:
        """Candidates above the threshold, at least the pace."""
        return (state.score >= math.log(self.threshold)) | best_candidates(state, pace(state))


@dataclass(frozen=True)
class FactorSchedule(Schedule):
    """The n most confident predictions for the largest n with (n + 1)(1 - c_n) < factor, but never fewer than equal steps.

    c_n is the n-th highest confidence: the theorem of Fast-dLLM (arXiv 2505.22618) as a rule.
    """

    factor: float = 1.0

    def __post_init__(self):
        limits.real("factor", self.factor, 0, open_ends="least")

    def select(self, state: StepState) -> torch.Tensor:
        """The longest allowed prefix of the order, at least the pace."""
        ordered = state.score.masked_fill(~state.candidates, -torch.inf).sort(dim=1, descending=True).values
        n = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
        allowed = (n + 1) * -torch.expm1(ordered) < self.factor  # [B, K]
        return best_candidates(state, torch.maximum((allowed * n).amax(dim=1), pace(state)))


@dataclass(frozen=True)
class EntropyBoundSchedule(Schedule):
    """The surest predictions while the entropies of all but the most uncertain of them sum to at most gamma nats.

    EB-Sampler (arXiv 2505.24857): the sum over a row bounds the mutual information of the positions, which is ignored when
    they are written at once. Never fewer than equal steps would write.
    """

    gamma: float = 0.1
    needs_entropy = True

    def __post_init__(self):
        limits.real("gamma", self.gamma, 0)

    def select(self, state: StepState) -> torch.Tensor:
        """The entropy-bounded set, at least the pace."""
        gamma = state.entropy.new_full((len(state.entropy),), self.gamma)
        return best_candidates(state, torch.maximum(bounded_count(state, gamma), pace(state)), -state.entropy)


@dataclass(frozen=True)
class BudgetedSchedule(Schedule):
    """Exactly the given number of forwards over all blocks, spent where the uncertainty is.

    The work left is the entropy of the open positions of this block and, for each position of later blocks, the mean entropy
    of a position in a block of masks: an overestimate, so that forwards are saved for the end. Each forward writes the surest
    predictions while their entropies, the largest left out, sum to at most `share` of the work left / the forwards left.
    Sure tokens are so written many at a time, doubtful ones few, and easy blocks leave forwards to hard ones. The bound is
    that of EB-Sampler (arXiv 2505.24857); closing the budget with it is this library's answer to section 6.4 of the paper. A
    forward writes at most `most` and at least 1 / `most` times tokens left / forwards left.
    """

    share: float = 0.85
    most: float = 3.0
    needs_entropy = True
    across_blocks = True

    def __post_init__(self):
        limits.real("share", self.share, 0, open_ends="least")
        limits.real("most", self.most, 1)

    def select(self, state: StepState) -> torch.Tensor:
        """The entropy-bounded set of this forward, within what closes the budget."""
        left = state.forwards_left.clamp_min(1)
        tokens = state.masks + state.masks_after
        mean = tokens / left
        here = state.entropy.double().masked_fill(~state.open, 0).sum(dim=1)  # [B]
        work = here + state.masks_after * state.fresh_entropy
        count = bounded_count(state, self.share * work / left)
        count = count.clamp((mean / self.most).floor().long(), (mean * self.most).ceil().long())
        # One token is left for each later forward.
        return best_candidates(state, torch.minimum(count, tokens - left + 1).clamp_min(1), -state.entropy)


SCHEDULES: dict[str, Schedule] = {
    "linear": LINEAR,
    "cosine": FixedSchedule("cosine"),
    "shift": FixedSchedule("shift"),
    "threshold": ThresholdSchedule(),
    "factor": FactorSchedule(),
    "entropy": EntropyBoundSchedule(),
    "budgeted": BudgetedSchedule(),
}


def schedule_named(name: str) -> Schedule:
    """One of SCHEDULES. Raises ValueError for an unknown name."""
    limits.named("schedule", name, SCHEDULES)
    return SCHEDULES[name]


def bounded_count(state: StepState, gamma: torch.Tensor) -> torch.Tensor:
    """The number of surest candidates whose entropies, the largest left out, sum to at most gamma [B]; int64 [B]."""
    ordered = state.entropy.masked_fill(~state.candidates, torch.inf).sort(dim=1).values  # [B, K]
    before = ordered.cumsum(dim=1).roll(1, dims=1)  # the sum of those before each
    before[:, 0] = 0
    return (before <= gamma[:, None]).cumprod(dim=1).sum(dim=1)
