"""The sampler of `medv.diffusion.sampler`, token for token and commit for commit, without what that one wastes.

Which positions are open is a boolean state on the device. The network is asked for the open positions of the block alone;
confidence is a float32 log-probability in the memory of the logits; a fixed schedule knows its counts beforehand, so that no
step makes the host wait for the device; a row that has ended leaves the batch. It knows token ids and a denoiser with the
two more abilities of `RowDenoiser`; what these cost is the denoiser's affair. It knows all schedules and filters, and no
revision: what is taken back opens positions of which no count is known beforehand.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from medv.diffusion.confidence import compiled_best, log_confidence
from medv.diffusion.config import SamplerConfig, SamplerOutput
from medv.diffusion.corruption import noise_generator
from medv.diffusion.ends import Ends
from medv.diffusion.sampler import LEAST_DRAW
from medv.diffusion.schedules import FixedSchedule, StepState, choose
from medv.diffusion.trace import Event, Events, Trace, drain


class RowDenoiser(Protocol):
    """The network as the fast sampler sees it. `static`: shapes are to stay the same within a block; `compiled`: so may be
    what is made of the logits.
    """

    static: bool
    compiled: bool

    def __call__(
        self, canvas: torch.Tensor, columns: slice, *, unconditional: bool = False, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the canvas [B, T] at the block `columns`, or at `positions` [B, K] in it. The caller overwrites them."""

    def keep(self, rows: torch.Tensor) -> None:
        """From now on the canvas holds these rows [B'] of the one before."""


@dataclass
class _Batch:
    """The rows that are still sampled, B' of the B of the call."""

    names: torch.Tensor  # [B'] int64, the row of the call
    canvas: torch.Tensor  # [B', T] int64
    masked: torch.Tensor  # [B', L] bool: positions not yet written
    still_open: torch.Tensor  # [B'] bool
    forwards: torch.Tensor  # [B'] int64: network calls
    filling: torch.Tensor  # [B'] int64: steps
    fresh: torch.Tensor  # [B'] float32: sum over blocks of their mean entropy when all masked
    generators: list[torch.Generator]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with some rows [B'']."""
        for name in ("names", "canvas", "masked", "still_open", "forwards", "filling", "fresh"):
            setattr(self, name, getattr(self, name)[rows])
        self.generators = [self.generators[row] for row in rows.tolist()]


@dataclass
class _Call:
    """One sampling call: what it was asked, the rows at work, and what has been gathered."""

    denoise: RowDenoiser
    config: SamplerConfig
    width: int
    batch: _Batch
    canvas: torch.Tensor  # [B, T] the results
    masked: torch.Tensor  # [B, L]
    forwards: torch.Tensor  # [B]
    never: torch.Tensor  # suppressed ids
    stops: torch.Tensor  # ids that end a response
    taken: torch.Tensor | None = None  # [V] -inf at suppressed ids, where they are added to the logits
    step: int = 0
    events: list[tuple] = field(default_factory=list)


def sample_fast(
    denoise: RowDenoiser,
    prompt: torch.Tensor,
    config: SamplerConfig,
    *,
    mask_token_id: int,
    fill_token_id: int,
    row_indices: Sequence[int] | None = None,
) -> SamplerOutput:
    """What `medv.diffusion.sampler.sample` returns for the same arguments, sooner.

    Revision and the presets are left to that one (ValueError).
    """
    ids = {"mask_token_id": mask_token_id, "fill_token_id": fill_token_id}
    return drain(stream_fast(denoise, prompt, config, row_indices=row_indices, tell=False, **ids))


@torch.inference_mode()
def stream_fast(
    denoise: RowDenoiser,
    prompt: torch.Tensor,
    config: SamplerConfig,
    *,
    mask_token_id: int,
    fill_token_id: int,
    row_indices: Sequence[int] | None = None,
    tell: bool = True,
) -> Generator[Events, None, SamplerOutput]:
    """`sample_fast` forward by forward, as `medv.diffusion.sampler.stream`: yields the events and returns the output.

    To tell them makes the host wait for the device at each forward; without `tell` it does not, and they come empty.
    """
    if config.preset != "medv" or config.revision is not None:
        raise ValueError(f"the fast sampler knows no {config.revision or config.preset}: call sampler.sample")
    started = time.perf_counter()
    call = _begin(denoise, prompt, config, mask_token_id, range(len(prompt)) if row_indices is None else row_indices)
    for block in range(config.blocks):
        for _ in _fill_block(call, block * config.block_length):
            events = _told(call.events[-1:]) if tell else ()
            if events or not tell:  # late news of an end costs a forward that writes nothing
                yield events
        if not call.batch.generators:
            break
    _leave(call, [False] * len(call.batch.generators))
    response = call.canvas[:, call.width :]
    ends = _first_stop(response, call.masked, call.stops)  # [B]
    beyond = torch.arange(config.gen_length, device=prompt.device)[None] >= ends[:, None]
    lengths = ends.tolist()
    return SamplerOutput(
        sequences=response.masked_fill(beyond, fill_token_id),
        lengths=lengths,
        forwards=call.forwards.tolist(),
        seconds=time.perf_counter() - started,
        finish_reason=["stop" if length < config.gen_length else "length" for length in lengths],
        trace=Trace(_told(call.events), config.gen_length, mask_token_id),
    )


def _begin(
    denoise: RowDenoiser, prompt: torch.Tensor, config: SamplerConfig, mask_token_id: int, indices: Sequence[int]
) -> _Call:
    rows, width = prompt.shape
    response = prompt.new_full((rows, config.gen_length), mask_token_id)
    batch = _Batch(
        names=torch.arange(rows, device=prompt.device),
        canvas=torch.cat([prompt, response], dim=1),
        masked=torch.ones_like(response, dtype=torch.bool),
        still_open=torch.ones(rows, dtype=torch.bool, device=prompt.device),
        forwards=prompt.new_zeros(rows),
        filling=prompt.new_zeros(rows),
        fresh=torch.zeros(rows, device=prompt.device),
        generators=[noise_generator(config.seed, 0, index) for index in indices],
    )
    return _Call(
        denoise=denoise,
        config=config,
        width=width,
        batch=batch,
        canvas=batch.canvas.clone(),
        masked=batch.masked.clone(),
        forwards=batch.forwards.clone(),
        never=prompt.new_tensor(config.suppress_tokens or ()),
        stops=prompt.new_tensor(config.stop_tokens or ()),
    )


def _fill_block(call: _Call, start: int) -> Generator[None]:
    """Write the positions from `start` to the end of the block in every row that is at work; yields after each forward."""
    config = call.config
    here, own = slice(start, start + config.block_length), config.steps // config.blocks
    if isinstance(config.schedule, FixedSchedule) and not config.filters:
        yield from _fill_by_counts(call, here, config.schedule.counts(config.block_length, own))
    else:
        yield from _fill_by_state(call, here, own)
    if len(call.stops):
        _leave(call, call.batch.still_open.tolist())


def _fill_by_counts(call: _Call, here: slice, counts: list[int]) -> Generator[None]:
    """The steps of a block whose counts are known beforehand: nothing is asked of the device."""
    left, ends = here.stop - here.start, Ends(call.batch.names.device)
    for count in counts:
        if not left or not len(call.batch.names):
            return
        # An open row has exactly `left` masks here: it has written all that it was told, or it would have ended.
        _advance(call, here, left, lambda state, count=count: _best(state, count), None)
        left -= count
        yield
        if len(call.stops) and left:
            rows = ends.read(call.batch.still_open)
            if rows is not None and not (call.denoise.static and any(rows)):
                _leave(call, rows)


def _fill_by_state(call: _Call, here: slice, own: int) -> Generator[None]:
    """The steps of a block where predictions decide how many there are: one look at the device for each."""
    config, step = call.config, 0
    later = (config.gen_length - here.stop) // config.block_length

    def pick(state: StepState) -> torch.Tensor:
        return choose(state, config.schedule, config.filters)

    while len(call.batch.names):
        batch = call.batch
        masks = (batch.masked[:, here].sum(dim=1) * batch.still_open).tolist()
        if not any(masks):
            return
        total = config.steps - batch.filling
        left = total - later if config.schedule.across_blocks else torch.full_like(total, own - step)
        _advance(call, here, max(masks), pick, (step, left, total))
        step += 1
        yield
        if len(call.stops) and not call.denoise.static:
            _leave(call, call.batch.still_open.tolist())


def _advance(
    call: _Call,
    here: slice,
    left: int,
    pick: Callable[[StepState], torch.Tensor],
    budget: tuple[int, torch.Tensor, torch.Tensor] | None,
) -> None:
    """One forward: of the at most `left` open positions of the block, those that `pick` marks are written.

    budget: forwards the block has had, those it may still have [B'], those of it and all later blocks [B'].
    """
    config, batch, width = call.config, call.batch, call.width
    asked, positions = None, torch.arange(here.start, here.stop, device=batch.names.device)
    if call.denoise.static:
        positions = positions.expand(len(batch.names), -1)  # [B', K]
    else:
        written = (~batch.masked[:, here]).byte()
        positions = here.start + written.sort(dim=1, stable=True).indices[:, :left]  # [B', left], the open ones ascending
        asked = width + positions
    active, entropy = batch.masked[:, here].any(dim=1) & batch.still_open, None  # [B']
    if _plain(call, here):
        tokens, score = _best_tokens(call, slice(width + here.start, width + here.stop))  # [B', K] each
    else:
        logits = _logits(call, slice(width + here.start, width + here.stop), asked, positions)  # [B', K, V]
        if config.schedule.needs_entropy:
            entropy = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)  # [B', K]
            batch.fresh += entropy.mean(dim=1) * (batch.masked[:, here].all(dim=1) & active)
        tokens, score = _predict(logits, positions - here.start, active, batch, config)  # [B', K] each
    was_masked = batch.masked.gather(1, positions)
    before_stop = positions < _first_stop(batch.canvas[:, width:], batch.masked, call.stops)[:, None]
    may = was_masked & active[:, None] & before_stop
    chosen = pick(_seen(call, here, tokens, score, positions, may, entropy, budget))
    places = width + positions
    batch.canvas.scatter_(1, places, torch.where(chosen, tokens, batch.canvas.gather(1, places)))
    batch.masked.scatter_(1, positions, was_masked & ~chosen)
    batch.forwards += active * (2 if config.cfg_scale else 1)
    batch.filling += active
    call.events.append((call.step, batch.names, positions, tokens, score, chosen))
    call.step += 1
    if len(call.stops):
        stop = _first_stop(batch.canvas[:, width:], batch.masked, call.stops)
        before = torch.arange(config.gen_length, device=stop.device)[None] < stop[:, None]
        batch.still_open &= (batch.masked & before).any(dim=1)


def _plain(call: _Call, here: slice) -> bool:
    """Whether the most probable allowed token and its probability are all that is wanted, and a compiler may give them."""
    config, early = call.config, bool(len(call.stops)) and here.start < call.config.min_length
    more = config.temperature or config.cfg_scale or config.remasking == "random" or config.schedule.needs_entropy
    return call.denoise.compiled and not more and not early


def _best_tokens(call: _Call, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-confidence [B', K] of the block without guidance, noise or anything else to do with the logits."""
    logits = call.denoise(call.batch.canvas, columns)
    if call.taken is None:
        zeros = torch.zeros(logits.shape[-1], device=logits.device)
        call.taken = zeros.index_fill_(0, call.never, -torch.inf)
    return compiled_best()(logits, call.taken)


def _logits(call: _Call, columns: slice, asked: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
    """Float32 logits [B', K, V] at `positions` of the response, guided, without what may not be written there."""
    config, canvas = call.config, call.batch.canvas
    logits = call.denoise(canvas, columns, positions=asked).float()
    if config.cfg_scale:
        unguided = call.denoise(canvas, columns, positions=asked, unconditional=True).float()
        logits = unguided + (config.cfg_scale + 1) * (logits - unguided)
    if len(call.never):
        logits.index_fill_(-1, call.never, -torch.inf)
    if len(call.stops) and columns.start - call.width < config.min_length:
        early = (positions < config.min_length)[..., None]
        logits.index_copy_(-1, call.stops, logits.index_select(-1, call.stops).masked_fill(early, -torch.inf))
    return logits


def _seen(
    call: _Call,
    here: slice,
    tokens: torch.Tensor,
    score: torch.Tensor,
    positions: torch.Tensor,
    may: torch.Tensor,
    entropy: torch.Tensor | None,
    budget: tuple[int, torch.Tensor, torch.Tensor] | None,
) -> StepState:
    """The forward as a schedule sees it."""
    batch = call.batch
    step, steps_left, forwards_left = budget or (0, batch.filling, batch.filling)
    return StepState(
        score=score,
        tokens=tokens,
        positions=positions,
        open=may,
        candidates=may,
        response=batch.canvas[:, call.width :],
        masked=batch.masked,
        masks=batch.masked[:, here].sum(dim=1),
        masks_after=call.config.gen_length - here.stop,
        step=step,
        steps_left=steps_left,
        forwards_left=forwards_left,
        entropy=entropy,
        fresh_entropy=batch.fresh / (here.stop // call.config.block_length),
    )


def _best(state: StepState, count: int) -> torch.Tensor:
    """`best_candidates` for a count that the host knows, which so never has to travel."""
    order = state.score.masked_fill(~state.candidates, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(state.candidates).scatter(1, order[:, :count], True) & state.candidates


def _predict(
    logits: torch.Tensor, places: torch.Tensor, active: torch.Tensor, batch: _Batch, config: SamplerConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-confidence [B', K] at `places` [B', K] of the block, with the draws of the plain sampler."""
    tokens, shape = None, (config.block_length, logits.shape[-1])
    if config.temperature > 0:
        uniform = _uniform(batch, active, shape, torch.float64, places)
        gumbel = -torch.log(-torch.log(uniform))
        tokens = (logits.double() / config.temperature + gumbel).argmax(dim=-1)
    if config.remasking == "random":
        draws = _uniform(batch, active, shape[:1], torch.float32, places)
        return logits.argmax(dim=-1) if tokens is None else tokens, draws.clamp_min(LEAST_DRAW).log()
    return log_confidence(logits, tokens)


def _uniform(
    batch: _Batch, active: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, places: torch.Tensor
) -> torch.Tensor:
    """Draws for whole blocks, of which those at `places` [B', K] are given; a row that waits for others draws nothing."""
    rows = zip(batch.generators, active.tolist(), places.cpu(), strict=True)
    half = torch.full(shape, 0.5, dtype=dtype)
    draws = [(torch.rand(shape, generator=g, dtype=dtype) if drawing else half)[place] for g, drawing, place in rows]
    return torch.stack(draws).to(places.device)


def _leave(call: _Call, still_open: list[bool]) -> None:
    """Take the rows that have ended out of the batch; where a new shape is dear, when half of them have."""
    batch, left = call.batch, sum(still_open)
    if left == len(still_open) or (call.denoise.static and 2 * left > len(still_open)):
        return
    call.canvas[batch.names] = batch.canvas
    call.masked[batch.names] = batch.masked
    call.forwards[batch.names] = batch.forwards
    rows = batch.names.new_tensor([row for row, is_open in enumerate(still_open) if is_open])
    batch.keep(rows)
    if len(rows):
        call.denoise.keep(rows)


def _first_stop(response: torch.Tensor, masked: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """The first position of a written stop token, or L where there is none, [B]."""
    length = response.shape[1]
    positions = torch.arange(length, device=response.device).expand_as(response)
    return positions.masked_fill(~torch.isin(response, stops) | masked, length).amin(dim=1)


def _told(events: list[tuple]) -> Events:
    """The written tokens in the order of (step, row, position). The device is waited for a few times, not at each step."""
    if not events:
        return ()
    steps = (
        (torch.full_like(tokens, step), names[:, None].expand_as(tokens), positions, tokens, score, chosen)
        for step, names, positions, tokens, score, chosen in events
    )
    *columns, chosen = (torch.cat([part.reshape(-1) for part in parts]) for parts in zip(*steps, strict=True))
    columns[-1] = columns[-1].exp()
    return tuple(Event(*entry) for entry in zip(*(column[chosen].tolist() for column in columns), strict=True))
