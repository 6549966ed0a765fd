"""Which predictions of a forward are committed: schedules, on the state that every sampler shows them.

A schedule sees one forward of a batch as a `StepState` and marks what is written; `choose` puts it together with filters
(`medv.diffusion.filters`) and keeps three promises for every schedule: a forward writes at least one token of each open row,
a block never takes more forwards than it may, and what its last forward finds open is written. Ties are broken by (score
descending, position ascending). Schedules are frozen, know no network and decide for each row by itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from medv import limits


@dataclass(frozen=True)
class StepState:
    """One forward as a schedule sees it: B rows, K positions of the current block in ascending order.

    score [B, K] float32: the logarithm of the confidence. tokens [B, K] int64: predictions. positions [B, K] int64: places in
    the response. open [B, K] bool: what may be written. candidates [B, K] bool: what the filters have left of it.
    entropy [B, K] float32: of the untempered distributions, in nats; None unless the schedule `needs_entropy`.
    fresh_entropy [B] float32: mean entropy of a position when its block was still all masks, over the blocks so far; or None.
    response [B, L] int64 and masked [B, L] bool: the canvas before this forward. masks [B] int64: masked positions of the
    block. masks_after: tokens of the blocks to come. step: forwards this block has had. steps_left [B] int64: forwards it
    may still have, this one included. forwards_left [B] int64: the same for this block and those to come together.
    """

    score: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    open: torch.Tensor
    candidates: torch.Tensor
    response: torch.Tensor
    masked: torch.Tensor
    masks: torch.Tensor
    masks_after: int
    step: int
    steps_left: torch.Tensor
    forwards_left: torch.Tensor
    entropy: torch.Tensor | None = None
    fresh_entropy: torch.Tensor | None = None


class Schedule(Protocol):
    """How many, and which. `across_blocks`: forwards that one block does not need may go to another."""

    needs_entropy: bool
    across_blocks: bool

    def select(self, state: StepState) -> torch.Tensor:
        """What to write, bool [B, K]; only `state.candidates` count."""


class Filter(Protocol):
    """Takes candidates away."""

    def keep(self, state: StepState) -> torch.Tensor:
        """Which of `state.candidates` stay, bool [B, K]."""


def choose(state: StepState, schedule: Schedule, filters: Sequence[Filter] = ()) -> torch.Tensor:
    """What this forward writes, bool [B, K]: the schedule's choice of what the filters leave.

    The best candidate of a row is written where nothing else is, and the last forward of a block writes all that is open.
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


def best_candidates(state: StepState, count: int | torch.Tensor) -> torch.Tensor:
    """The `count` most confident candidates of each row, or all where there are fewer, bool [B, K]."""
    return top_positions(state.score.masked_fill(~state.candidates, -torch.inf), count) & state.candidates


def pace(state: StepState) -> torch.Tensor:
    """Tokens a row has to write now so that equal steps fill its block in time, int64 [B]."""
    left = state.steps_left.clamp_min(1)
    return (state.masks + left - 1) // left


def transfer_counts(masks: int, steps: int) -> list[int]:
    """How many tokens each of `steps` forwards commits so that `masks` are filled: the remainder goes to the first ones."""
    base, extra = divmod(masks, steps)
    return [base + (step < extra) for step in range(steps)]


SHAPES = ("linear", "cosine", "shift")


@dataclass(frozen=True)
class FixedSchedule:
    """So many tokens at each forward, whatever the network says.

    "linear": equal shares, the remainder first (Algorithm 1, LLaDA arXiv 2502.09992). "cosine": few first, many last
    (MaskGIT, arXiv 2202.04200). "shift": after the share x of the forwards the share s x / (1 + (s - 1) x) of the tokens is
    written, s = shift (LaViDa, arXiv 2505.16839, whose own argument counts the other way: its 1/3 is 3 here); s above 1
    writes many first, below 1 few first, 1 is linear.
    """

    shape: str = "linear"
    shift: float = 3.0
    needs_entropy = False
    across_blocks = False

    def __post_init__(self):
        if self.shape not in SHAPES:
            raise ValueError(f"unknown shape {self.shape!r}: use one of {', '.join(SHAPES)}")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}: it must be above 0, for example 3 (many first) or 1/3 (few first)")

    def counts(self, masks: int, steps: int) -> list[int]:
        """The tokens of each forward when `masks` positions are filled in at most `steps`; no tensor is needed for it."""
        counts = []
        for step in range(min(steps, masks)):  # each writes one at least
            counts.append(int(self._count(torch.tensor(masks), step, torch.tensor(steps - step))))
            masks -= counts[-1]
        return counts

    def select(self, state: StepState) -> torch.Tensor:
        """The most confident ones."""
        return best_candidates(state, self._count(state.masks, state.step, state.steps_left.clamp_min(1)))

    def _count(self, masks: torch.Tensor, step: int, left: torch.Tensor) -> torch.Tensor:
        """Of what is masked, the part which the shape leaves for later is taken off; so there is always one to write."""
        if self.shape == "linear":
            return masks - masks * (left - 1) // left
        steps = (step + left).double()
        keep = self._remaining((step + 1) / steps) / self._remaining(step / steps)
        return masks - (masks * keep + 1e-9).floor().long()

    def _remaining(self, done: torch.Tensor) -> torch.Tensor:
        if self.shape == "cosine":
            return torch.cos(done * math.pi / 2)
        return 1 - self.shift * done / (1 + (self.shift - 1) * done)


LINEAR = FixedSchedule()


@dataclass(frozen=True)
class ThresholdSchedule:
    """All predictions with at least this confidence, and never fewer than equal steps would write.

    Fast-dLLM (arXiv 2505.22618): greedy parallel decoding equals one token at a time where (n + 1)(1 - threshold) <= 1 for
    n tokens. Forwards that are not needed are saved.
    """

    threshold: float = 0.9
    needs_entropy = False
    across_blocks = False

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}: a confidence lies above 0 and up to 1, for example 0.9")

    def select(self, state: StepState) -> torch.Tensor:
        """Those above the threshold, and the pace."""
        return (state.score >= math.log(self.threshold)) | best_candidates(state, pace(state))


@dataclass(frozen=True)
class FactorSchedule:
    """The n most confident predictions for the largest n with (n + 1)(1 - c_n) < factor, and never fewer than equal steps.

    c_n is the n-th highest confidence: Fast-dLLM (arXiv 2505.22618), its theorem turned into a rule.
    """

    factor: float = 1.0
    needs_entropy = False
    across_blocks = False

    def __post_init__(self):
        limits.real("factor", self.factor, 0, open_ends="least")

    def select(self, state: StepState) -> torch.Tensor:
        """The longest allowed run of the order, and the pace."""
        ordered = state.score.masked_fill(~state.candidates, -torch.inf).sort(dim=1, descending=True).values
        n = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
        allowed = (n + 1) * -torch.expm1(ordered) < self.factor  # [B, K]
        return best_candidates(state, torch.maximum((allowed * n).amax(dim=1), pace(state)))


@dataclass(frozen=True)
class EntropyBoundSchedule:
    """The surest predictions while the entropies of all but the most uncertain of them sum to at most gamma nats.

    EB-Sampler (arXiv 2505.24857): the sum bounds how much the positions can tell about each other, which is what writing
    them at once ignores. The sum is over one row; never fewer than equal steps would write.
    """

    gamma: float = 0.1
    needs_entropy = True
    across_blocks = False

    def __post_init__(self):
        limits.real("gamma", self.gamma, 0)

    def select(self, state: StepState) -> torch.Tensor:
        """The entropy-bounded set, and the pace."""
        gamma = state.entropy.new_full((len(state.entropy),), self.gamma)
        return surest(state, torch.maximum(bounded_count(state, gamma), pace(state)))


@dataclass(frozen=True)
class BudgetedSchedule:
    """Exactly the given number of forwards, spent where the uncertainty is, over all blocks together.

    The work that is left is the entropy of what is open in this block, as this forward sees it, and for the blocks to come
    that of a position whose block is still all masks, which is more than they will cost: so forwards are spared for the end.
    Each forward takes the surest predictions while their entropies, the largest left out, sum to at most `share` of the work
    left / the forwards left. So sure tokens are written many at a time, doubtful ones few, and easy blocks leave forwards to
    hard ones. The bound is that of EB-Sampler (arXiv 2505.24857); closing the budget with it is this library's answer to
    section 6.4 of the paper. A forward writes at most `most` and at least 1 / `most` times tokens left / forwards left.
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
        # One token for each forward that is left, so that none of them is without work.
        return surest(state, torch.minimum(count, tokens - left + 1).clamp_min(1))


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
    """One of SCHEDULES with its defaults; ValueError for another name."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: use one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def bounded_count(state: StepState, gamma: torch.Tensor) -> torch.Tensor:
    """How many of the surest candidates have entropies that sum, the largest left out, to at most gamma [B]; int64 [B]."""
    ordered = state.entropy.masked_fill(~state.candidates, torch.inf).sort(dim=1).values  # [B, K]
    before = ordered.cumsum(dim=1).roll(1, dims=1)  # what was accepted before each
    before[:, 0] = 0
    return (before <= gamma[:, None]).cumprod(dim=1).sum(dim=1)


def surest(state: StepState, count: torch.Tensor) -> torch.Tensor:
    """The `count` [B] candidates of the lowest entropy of each row, bool [B, K]; of equals the leftmost."""
    return top_positions((-state.entropy).masked_fill(~state.candidates, -torch.inf), count) & state.candidates
