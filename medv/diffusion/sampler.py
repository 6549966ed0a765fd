"""The sampler: Algorithm 1 of the paper with stop tokens, guidance, schedules, filters and revision.

It writes what `medv.diffusion.algorithm` writes, without the waste: the network is asked for the open positions of the block
alone; confidence is a float32 log-probability computed in the memory of the logits; a fixed schedule has its counts beforehand,
so that no step makes the host wait for the device; a row that has ended leaves the batch. A plain function is sampled too:
all its rows and all columns of the block are computed every time.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch

from medv.diffusion.blockwise import Denoiser, SamplerOutput
from medv.diffusion.config import SamplerConfig
from medv.diffusion.corruption import noise_generator
from medv.diffusion.infilling import fixed_events, given_response, open_positions
from medv.diffusion.revision import RevisionState
from medv.diffusion.schedules import FixedSchedule, StepState, best_candidates, choose
from medv.diffusion.trace import COMMIT, REMASK, Event, Events, Trace, drain

LEAST_DRAW = 2.0**-25  # below every other float32 draw: a drawn 0 is still above what may not be chosen


class RowDenoiser(Protocol):
    """A denoiser that computes single positions and rows. `static`: shapes are to stay the same within a block; `compiled`:
    `best` is faster than a reduction of the logits here.
    """

    static: bool
    compiled: bool

    def __call__(
        self, canvas: torch.Tensor, columns: slice, *, unconditional: bool = False, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the canvas [B, T] at the block `columns`, or at `positions` [B, K] in it. The caller overwrites them."""

    def best(self, canvas: torch.Tensor, columns: slice, never: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`log_confidence` [B, K] each of the most probable tokens, the ids `never` [N] left out."""

    def keep(self, rows: torch.Tensor) -> None:
        """From now on the canvas holds only these rows [B'] of the previous one."""


def sample(denoise: Denoiser | RowDenoiser, prompt: torch.Tensor, config: SamplerConfig, **options: Any) -> SamplerOutput:
    """Sample one response per row of `prompt`; the arguments are those of `stream`."""
    return drain(stream(denoise, prompt, config, tell=False, **options))


@torch.inference_mode()
def stream(
    denoise: Denoiser | RowDenoiser,
    prompt: torch.Tensor,
    config: SamplerConfig,
    *,
    mask_token_id: int,
    fill_token_id: int,
    row_indices: Sequence[int] | None = None,
    response: torch.Tensor | None = None,
    tell: bool = True,
) -> Generator[Events, None, SamplerOutput]:
    """Sample one response per row of `prompt` [B, P] int64 (left-padded; the denoiser handles the padding).

    Yields the events of each forward as it happens and returns the output. Reporting events makes the host wait for the
    device at each forward; `tell=False` yields empty tuples instead. `row_indices` names the rows for the random draws
    (default 0 .. B-1). `response` [B, L] int64: mask tokens are open, others fixed (`medv.diffusion.infilling`).
    """
    started = time.perf_counter()
    indices = range(len(prompt)) if row_indices is None else row_indices
    if config.length is not None:
        raise ValueError("the sampler writes into a given canvas: `medv.model.length` chooses a length before")
    given = given_response(response, prompt, config, mask_token_id)
    call = _Call(denoise, prompt, config, mask_token_id, [noise_generator(config.seed, 0, index) for index in indices], given)
    reported = 0
    for block in range(config.blocks):
        for _ in call.fill_block(slice(block * config.block_length, (block + 1) * config.block_length)):
            events = _events(call.events[reported:]) if tell else ()
            reported = len(call.events)
            if events or not tell:  # a GPU reports an end late: the forwards until then write nothing
                yield events
        if not call.batch.generators:
            break
    call.leave([False] * len(call.batch.generators))
    ends = _first_stop(call.canvas, call.masked, call.stops)  # [B]
    beyond = torch.arange(config.gen_length, device=prompt.device)[None] >= ends[:, None]
    lengths = ends.tolist()
    return SamplerOutput(
        sequences=call.canvas.masked_fill(beyond, fill_token_id),
        lengths=lengths,
        forwards=call.forwards.tolist(),
        seconds=time.perf_counter() - started,
        finish_reason=["stop" if length < config.gen_length else "length" for length in lengths],
        trace=Trace(_events(call.events), config.gen_length, mask_token_id, fixed_events(given, mask_token_id)),
    )


@dataclass
class _Batch:
    """The rows that are still sampled, B' of the B of the call; L = gen_length."""

    rows: torch.Tensor  # [B'] int64, their numbers in the call
    canvas: torch.Tensor  # [B', P + L] int64
    masked: torch.Tensor  # [B', L] bool: positions not yet written
    is_open: torch.Tensor  # [B'] bool: a position before the first stop token is masked
    forwards: torch.Tensor  # [B'] int64: network calls
    filling: torch.Tensor  # [B'] int64: steps, without those reserved for revision
    opened: torch.Tensor  # [B', L] bool: positions that may be written
    stops_from: torch.Tensor  # [B'] int64: no stop token is written before this position
    begun: torch.Tensor  # [B'] int64: blocks that had an open position
    fresh: torch.Tensor  # [B'] float32: sum over these of their mean entropy at the first forward
    score: torch.Tensor  # [B', L] float32: log-confidence at commit time
    taken_back: torch.Tensor  # [B', L] int64: how often
    generators: list[torch.Generator]

    def keep(self, kept: torch.Tensor) -> None:
        """Continue with these rows [B'']."""
        for field in fields(self)[:-1]:
            setattr(self, field.name, getattr(self, field.name)[kept])
        self.generators = [self.generators[row] for row in kept.tolist()]


class _Call:
    """One sampling call: its settings, the batch, and the results of the rows that have left it."""

    def __init__(
        self,
        denoise: Denoiser | RowDenoiser,
        prompt: torch.Tensor,
        config: SamplerConfig,
        mask_token_id: int,
        generators: list[torch.Generator],
        given: torch.Tensor | None,
    ):
        rows, self.width = prompt.shape
        self.stops = prompt.new_tensor(config.stop_tokens or ())
        response = prompt.new_full((rows, config.gen_length), mask_token_id) if given is None else given
        opened, stops_from = open_positions(response, mask_token_id, self.stops, config.min_length)
        self.batch = _Batch(
            rows=torch.arange(rows, device=prompt.device),
            canvas=torch.cat([prompt, response], dim=1),
            masked=opened.clone(),
            is_open=opened.any(dim=1),
            forwards=prompt.new_zeros(rows),
            filling=prompt.new_zeros(rows),
            opened=opened,
            stops_from=stops_from,
            begun=prompt.new_zeros(rows),
            fresh=torch.zeros(rows, device=prompt.device),
            score=torch.zeros_like(response, dtype=torch.float32),
            taken_back=torch.zeros_like(response),
            generators=generators,
        )
        self.canvas, self.masked, self.forwards = response.clone(), self.batch.masked.clone(), prompt.new_zeros(rows)
        self.denoise, self.config, self.mask_token_id = denoise, config, mask_token_id
        self.plain = not hasattr(denoise, "keep")
        self.static = self.plain or denoise.static
        more = config.temperature or config.cfg_scale or config.remasking == "random" or config.schedule.needs_entropy
        self.compiled = not self.plain and denoise.compiled and not more
        self.never = prompt.new_tensor(config.suppress_tokens or ())
        self.infills = given is not None
        self.stopless = int(stops_from.amax()) if self.infills and rows else config.min_length
        self.step = 0
        self.events: list[tuple] = []

    def fill_block(self, here: slice) -> Generator[None]:
        """Write the positions `here` of the response in every row that is open; yields after each forward."""
        config = self.config
        plain = not (config.filters or config.revision or self.infills)
        if isinstance(config.schedule, FixedSchedule) and plain:
            yield from self._fill_by_counts(here)
        else:
            yield from self._fill_by_state(here)
        if len(self.stops):
            self.leave(self.batch.is_open.tolist())

    def _fill_by_counts(self, here: slice) -> Generator[None]:
        """The steps of a block whose counts are known beforehand: no step waits for the device."""
        left, ends = here.stop - here.start, _Ends(self.batch.rows.device)
        for count in self.config.schedule.counts(left, self.config.steps // self.config.blocks):
            if not left or not len(self.batch.rows):
                return
            # An open row has exactly `left` masks here: everything so far was written, or it would have ended.
            self._advance(here, left, lambda state, count=count: best_candidates(state, count), None)
            left -= count
            yield
            if len(self.stops) and left:
                is_open = ends.read(self.batch.is_open)
                if is_open is not None and not (self.static and any(is_open)):
                    self.leave(is_open)

    def _fill_by_state(self, here: slice) -> Generator[None]:
        """The steps of a block whose number depends on the predictions, then those that the revision has reserved."""
        config, revision, began, step = self.config, self.config.revision, self.batch.is_open.clone(), 0
        own = config.steps // config.blocks
        reserved = revision.reserve(own) if revision else 0
        self.batch.begun += self.batch.opened[:, here].any(dim=1)

        def pick(state: StepState) -> torch.Tensor:
            return choose(state, config.schedule, config.filters)

        while masks := self._open_masks(here):
            batch = self.batch
            active = batch.masked[:, here].any(dim=1) & batch.is_open  # [B']
            total = config.steps - config.blocks * reserved - batch.filling
            after = batch.opened[:, here.stop :].unflatten(1, (-1, config.block_length)).sum(dim=2)  # [B', later blocks]
            across = config.schedule.across_blocks
            left = total - (after > 0).sum(dim=1) if across else torch.full_like(total, own - reserved - step)
            positions, written = self._advance(here, masks, pick, (step, left, total, after.sum(dim=1)))
            batch.filling += active
            step += 1
            if revision:
                fresh = torch.zeros_like(batch.masked).scatter(1, positions, written)[:, here]
                older = (active & (left > 1))[:, None] & ~fresh
                self._take_back(revision.during, here, older, step, own - reserved)
            yield
            if len(self.stops) and not self.static and not revision:
                self.leave(batch.is_open.tolist())
        for step in range(reserved):
            self._take_back(revision.after, here, began[:, None], step, reserved)
            if masks := self._open_masks(here):
                left = torch.full_like(self.batch.filling, reserved - step)
                self._advance(here, masks, pick, (step, left, left, torch.zeros_like(left)))
                yield

    def _open_masks(self, here: slice) -> int:
        """The largest number of masked positions in the block of any open row."""
        return max((self.batch.masked[:, here].sum(dim=1) * self.batch.is_open).tolist(), default=0)

    def _advance(
        self,
        here: slice,
        left: int,
        pick: Callable[[StepState], torch.Tensor],
        budget: tuple[int, torch.Tensor, torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward; `pick` chooses what is written of the at most `left` open positions of the block.

        budget: forwards the block has had, those it may still have [B'], those of it and all later blocks [B'], open positions
        of the later blocks [B']. Returns the positions in the response [B', K], ascending, and which of them were written.
        """
        config, batch = self.config, self.batch
        positions = torch.arange(here.start, here.stop, device=batch.rows.device).expand(len(batch.rows), -1)  # [B', K]
        if not self.static:  # the open ones alone
            written = (~batch.masked[:, here]).byte()
            positions = here.start + written.sort(dim=1, stable=True).indices[:, :left]
        active = batch.masked[:, here].any(dim=1) & batch.is_open  # [B']
        tokens, score, entropy = self._predict(here, positions, active)  # [B', K] each
        response, was_masked = batch.canvas[:, self.width :], batch.masked.gather(1, positions)
        may = was_masked & active[:, None] & (positions < _first_stop(response, batch.masked, self.stops)[:, None])
        step, steps_left, forwards_left, masks_after = budget or (0, batch.filling, batch.filling, batch.filling)
        chosen = pick(
            StepState(
                score=score,
                tokens=tokens,
                positions=positions,
                open=may,
                candidates=may,
                response=response,
                masked=batch.masked,
                masks=batch.masked[:, here].sum(dim=1),
                masks_after=masks_after,
                step=step,
                steps_left=steps_left,
                forwards_left=forwards_left,
                entropy=entropy,
                fresh_entropy=batch.fresh / batch.begun.clamp_min(1),
            )
        )
        response.scatter_(1, positions, torch.where(chosen, tokens, response.gather(1, positions)))
        batch.masked.scatter_(1, positions, was_masked & ~chosen)
        batch.forwards += active * (2 if config.cfg_scale else 1)
        self.events.append((COMMIT, self.step, batch.rows, positions, tokens, score, chosen))
        self.step += 1
        if config.revision:
            batch.score.scatter_(1, positions, torch.where(chosen, score, batch.score.gather(1, positions)))
        if len(self.stops):
            stop = _first_stop(response, batch.masked, self.stops)
            before = torch.arange(config.gen_length, device=stop.device)[None] < stop[:, None]
            batch.is_open &= (batch.masked & before).any(dim=1)
        return positions, chosen

    def _predict(
        self, here: slice, positions: torch.Tensor, active: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Tokens, log-confidence and, if the schedule needs it, entropy at `positions` of the response, [B', K] each.

        The confidence is the probability without temperature; for random remasking it is a uniform draw.
        """
        config, batch, entropy, tokens = self.config, self.batch, None, None
        columns = slice(self.width + here.start, self.width + here.stop)
        no_stops_yet = len(self.stops) > 0 and here.start < self.stopless
        if self.compiled and not no_stops_yet:
            return *self.denoise.best(batch.canvas, columns, self.never), None
        only = {} if self.static else {"positions": self.width + positions}
        logits = self.denoise(batch.canvas, columns, **only).float()  # [B', K, V]
        if config.cfg_scale:
            unguided = self.denoise(batch.canvas, columns, unconditional=True, **only).float()
            logits = unguided + (config.cfg_scale + 1) * (logits - unguided)
        elif self.plain:
            logits = logits.clone()  # the function may own them
        if len(self.never):
            logits.index_fill_(-1, self.never, -torch.inf)
        if no_stops_yet:
            early = (positions < batch.stops_from[:, None])[..., None]
            logits.index_copy_(-1, self.stops, logits.index_select(-1, self.stops).masked_fill(early, -torch.inf))
        if config.schedule.needs_entropy:
            entropy = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)  # [B', K]
            masked = batch.masked.gather(1, positions)  # [B', K]
            first = active & batch.masked[:, here].eq(batch.opened[:, here]).all(dim=1)
            share = positions.shape[1] / masked.sum(dim=1).clamp_min(1)  # 1 where all are masked
            batch.fresh += entropy.masked_fill(~masked, 0).mean(dim=1) * share * first
        places, shape = positions - here.start, (config.block_length, logits.shape[-1])
        if config.temperature > 0:
            # float64 on purpose: rounding in float32 Gumbel noise changes the distribution that is sampled (LLaDA's remark)
            gumbel = -torch.log(-torch.log(self._uniform(active, shape, torch.float64, places)))
            tokens = (logits.double() / config.temperature + gumbel).argmax(dim=-1)
        if config.remasking == "random":
            draws = self._uniform(active, shape[:1], torch.float32, places).clamp_min(LEAST_DRAW)
            score = draws.log() + 0 * logits.amax(dim=-1)  # NaN where the logits are not finite
            return logits.argmax(dim=-1) if tokens is None else tokens, score, entropy
        return *log_confidence(logits, tokens), entropy

    def _uniform(self, drawing: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, places: torch.Tensor) -> torch.Tensor:
        """Draws at `places` [B', K] of whole blocks, each row from its own generator; the rest get 1/2."""
        half = torch.full(shape, 0.5, dtype=dtype)
        draws = [
            (torch.rand(shape, generator=generator, dtype=dtype) if draws else half)[place]
            for generator, draws, place in zip(self.batch.generators, drawing.tolist(), places.cpu(), strict=True)
        ]
        return torch.stack(draws).to(places.device)

    def _take_back(
        self, ask: Callable[[RevisionState], torch.Tensor | None], here: slice, where: torch.Tensor, step: int, steps: int
    ) -> None:
        """Mask what the revision asks for in the block, of the places `where` [B', K or 1]; its rows are open again."""
        batch, response = self.batch, self.batch.canvas[:, self.width :]
        tokens, score, written = response[:, here], batch.score[:, here], ~batch.masked[:, here]  # [B', K] each
        positions = torch.arange(here.start, here.stop, device=where.device).expand_as(tokens)
        before = positions < _first_stop(response, batch.masked, self.stops)[:, None]
        rarely = batch.taken_back[:, here] < self.config.revision.limit
        allowed = written & batch.opened[:, here] & before & where & rarely

        def draw() -> torch.Tensor:
            return self._uniform(where.any(dim=1), score.shape[1:], torch.float32, positions - here.start)

        chosen = ask(RevisionState(score, tokens, written, allowed, step, steps, draw))
        if chosen is None:
            return
        self.events.append((REMASK, self.step - 1, batch.rows, positions, tokens.clone(), score.clone(), chosen))
        tokens[chosen] = self.mask_token_id
        batch.masked[:, here] |= chosen
        batch.taken_back[:, here] += chosen
        batch.is_open |= chosen.any(dim=1)

    def leave(self, is_open: list[bool]) -> None:
        """Take the rows that have ended out of the batch.

        Where new shapes are expensive, only when half of the rows have ended; rows of a plain function stay until all have.
        """
        batch, left = self.batch, sum(is_open)
        if left == len(is_open) or (self.static and 2 * left > len(is_open)) or (self.plain and left):
            return
        self.canvas[batch.rows] = batch.canvas[:, self.width :]
        self.masked[batch.rows] = batch.masked
        self.forwards[batch.rows] = batch.forwards
        kept = batch.rows.new_tensor([row for row, still in enumerate(is_open) if still])
        batch.keep(kept)
        if len(kept):
            self.denoise.keep(kept)


class _Ends:
    """Reads a few booleans from the device without waiting for it: on CUDA they are those of an earlier step.

    A row that has ended stays so and is not written to: late news costs forwards and changes nothing.
    """

    def __init__(self, device: torch.device):
        self.on_gpu, self.host, self.event = device.type == "cuda", None, None

    def read(self, is_open: torch.Tensor) -> list[bool] | None:
        """Which rows are open, or None where no news has come; a list has one entry for each row of `is_open`."""
        if not self.on_gpu:
            return is_open.tolist()
        news = None
        if self.event is not None and self.event.query():
            news = self.host.tolist() if len(self.host) == len(is_open) else None
            self.event = None
        if self.event is None:
            self.host = torch.empty(len(is_open), dtype=torch.bool, pin_memory=True)
            self.host.copy_(is_open, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        return news


def log_confidence(logits: torch.Tensor, tokens: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [...] int64 and their log-probabilities [...] float32 under softmax(logits [..., V]), logits float32.

    Without `tokens` the most probable ones are taken. The logits are overwritten. log p = l - l_best - log1p(sum over
    v != best of exp(l_v - l_best)): near p = 1 this resolves 1 - p down to 1e-38, where a float32 softmax is exactly 1 from a
    gap of 16.6 nats on and a float64 softmax from 36.7, so that such predictions are still ranked.
    """
    top, best = logits.max(dim=-1, keepdim=True)
    chosen = top if tokens is None else logits.gather(-1, tokens[..., None])
    rest = logits.sub_(top).scatter_(-1, best, -torch.inf).exp_().sum(dim=-1, keepdim=True)
    score = chosen - top - rest.log1p()
    return (best if tokens is None else tokens[..., None])[..., 0], score[..., 0]


def _first_stop(response: torch.Tensor, masked: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """The first position of a written stop token, or L where there is none, [B]."""
    length = response.shape[1]
    positions = torch.arange(length, device=response.device).expand_as(response)
    return positions.masked_fill(~torch.isin(response, stops) | masked, length).amin(dim=1)


def _events(entries: list[tuple]) -> Events:
    """The written and taken-back tokens in order; the device is waited for a few times, not at each step."""
    if not entries:
        return ()
    steps = []
    for kind, step, rows, positions, tokens, score, chosen in entries:
        step, kind = (torch.full_like(tokens, number) for number in (step, kind == REMASK))
        steps.append((chosen, step, rows[:, None].expand_as(tokens), positions, tokens, score.exp(), kind))
    chosen, *columns = (torch.cat([part.reshape(-1) for part in parts]) for parts in zip(*steps, strict=True))
    events = zip(*(column[chosen].tolist() for column in columns), strict=True)
    return tuple(Event(*entry, REMASK if is_remask else COMMIT) for *entry, is_remask in events)
