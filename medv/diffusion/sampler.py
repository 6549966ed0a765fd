"""The reverse process: unmask a fully masked response block by block (Algorithm 1 of the paper).

A canvas [B, P + L] holds the prompt and L masks. Blocks of `block_length` are filled from left to right; each forward
predicts every masked position of the current block, and the most confident predictions are committed, or those that the
schedule, filters and revision of the configuration choose. This is the plain sampler: clear first. It knows token ids and a
function `denoise` that returns logits; it knows no images and no tokenizer.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch

from medv.diffusion import official
from medv.diffusion.confidence import log_confidence
from medv.diffusion.config import Denoiser, SamplerConfig, SamplerOutput
from medv.diffusion.corruption import noise_generator
from medv.diffusion.revision import RevisionState
from medv.diffusion.schedules import StepState, choose, top_positions, transfer_counts
from medv.diffusion.trace import REMASK, Event, Events, Trace, drain

__all__ = ["Denoiser", "SamplerConfig", "SamplerOutput", "sample", "stream", "top_positions", "transfer_counts"]

LEAST_DRAW = 2.0**-25  # below every other float32 draw: a drawn 0 is still above what may not be chosen


@dataclass
class _State:
    """The moving parts of one sampling call; B rows, L = gen_length."""

    canvas: torch.Tensor  # [B, P + L] int64
    masked: torch.Tensor  # [B, L] bool: positions not yet written
    open_rows: torch.Tensor  # [B] bool: rows not yet finished
    forwards: torch.Tensor  # [B] int64: network calls
    filling: torch.Tensor  # [B] int64: steps spent on filling blocks, without those kept for revision
    score: torch.Tensor  # [B, L] float32: log-confidence at commit time
    taken: torch.Tensor  # [B, L] int64: how often a position was taken back
    fresh: torch.Tensor  # [B] float32: sum over blocks of their mean entropy when all masked
    generators: list[torch.Generator]
    mask_token_id: int
    step: int = 0
    events: list[Event] = field(default_factory=list)


def sample(
    denoise: Denoiser,
    prompt: torch.Tensor,
    config: SamplerConfig,
    *,
    mask_token_id: int,
    fill_token_id: int,
    row_indices: Sequence[int] | None = None,
    uniform: official.Uniform | None = None,
) -> SamplerOutput:
    """Sample one response per row of `prompt` [B, P] int64 (left-padded; padding is the denoiser's affair).

    `row_indices` names the rows for the random draws (default 0 .. B-1), so that a row draws the same alone and in a batch.
    `uniform` replaces the random draws of the presets "official" and "llada" (see `medv.diffusion.official`).
    """
    ids = {"mask_token_id": mask_token_id, "fill_token_id": fill_token_id}
    return drain(stream(denoise, prompt, config, row_indices=row_indices, uniform=uniform, **ids))


@torch.inference_mode()
def stream(
    denoise: Denoiser,
    prompt: torch.Tensor,
    config: SamplerConfig,
    *,
    mask_token_id: int,
    fill_token_id: int,
    row_indices: Sequence[int] | None = None,
    uniform: official.Uniform | None = None,
) -> Generator[Events, None, SamplerOutput]:
    """`sample` forward by forward: yields the events of each as it happens and returns the output.

    The presets yield once, all events. What is taken back after a forward comes with the events of that forward, or with
    those of the next one where a block is full in between.
    """
    if config.preset != "medv":
        ids = {"mask_token_id": mask_token_id, "fill_token_id": fill_token_id}
        output = official.sample(denoise, prompt, config, uniform=uniform, **ids)
        yield output.trace.events
        return output
    started = time.perf_counter()
    rows, width = prompt.shape
    indices = range(rows) if row_indices is None else row_indices
    state = _begin(prompt, config, mask_token_id, [noise_generator(config.seed, 0, index) for index in indices])
    told = 0
    for block in range(config.blocks):
        for _ in _fill_block(denoise, state, config, block, width):
            yield tuple(state.events[told:])
            told = len(state.events)
        if not state.open_rows.any():
            break
    lengths, reasons = _endings(state.canvas[:, width:], state.masked, config.stop_tokens or ())
    places = torch.arange(config.gen_length, device=prompt.device)[None]
    beyond = places >= torch.tensor(lengths, device=prompt.device)[:, None]
    return SamplerOutput(
        sequences=state.canvas[:, width:].masked_fill(beyond, fill_token_id),
        lengths=lengths,
        forwards=state.forwards.tolist(),
        seconds=time.perf_counter() - started,
        finish_reason=reasons,
        trace=Trace(tuple(state.events), config.gen_length, mask_token_id),
    )


def _begin(prompt: torch.Tensor, config: SamplerConfig, mask_token_id: int, generators: list[torch.Generator]) -> _State:
    response = prompt.new_full((len(prompt), config.gen_length), mask_token_id)
    return _State(
        canvas=torch.cat([prompt, response], dim=1),  # [B, P + L]
        masked=torch.ones_like(response, dtype=torch.bool),
        open_rows=torch.ones(len(prompt), dtype=torch.bool, device=prompt.device),
        forwards=prompt.new_zeros(len(prompt)),
        filling=prompt.new_zeros(len(prompt)),
        score=torch.zeros_like(response, dtype=torch.float32),
        taken=torch.zeros_like(response),
        fresh=torch.zeros(len(prompt), device=prompt.device),
        generators=generators,
        mask_token_id=mask_token_id,
    )


def _fill_block(denoise: Denoiser, state: _State, config: SamplerConfig, block: int, width: int) -> Generator[None]:
    """The steps of one block: first the fill, then the forwards that the revision has kept for itself."""
    here = slice(block * config.block_length, (block + 1) * config.block_length)
    own, later = config.steps // config.blocks, config.blocks - block - 1
    revision, began, step = config.revision, state.open_rows.clone(), 0
    kept = revision.reserve(own) if revision else 0
    while (active := state.masked[:, here].any(dim=1) & state.open_rows).any():  # [B]
        total = config.steps - config.blocks * kept - state.filling
        left = total - later if config.schedule.across_blocks else torch.full_like(total, own - kept - step)  # [B]
        written = _advance(denoise, state, config, here, width, active, (step, left, total, later * config.block_length))
        state.filling += active
        step += 1
        if revision:
            older = (active & (left > 1))[:, None] & ~written
            _take_back(state, config, revision.during, here, width, older, step, own - kept)
        state.open_rows &= ~_finished(state.canvas[:, width:], state.masked, config.stop_tokens or ())
        yield
    for step in range(kept):
        _take_back(state, config, revision.after, here, width, began[:, None], step, kept)
        active = state.masked[:, here].any(dim=1) & state.open_rows
        if active.any():
            left = torch.full_like(state.filling, kept - step)
            _advance(denoise, state, config, here, width, active, (step, left, left, 0))
            state.open_rows &= ~_finished(state.canvas[:, width:], state.masked, config.stop_tokens or ())
            yield


def _advance(
    denoise: Denoiser,
    state: _State,
    config: SamplerConfig,
    here: slice,
    width: int,
    active: torch.Tensor,
    budget: tuple[int, torch.Tensor, torch.Tensor, int],
) -> torch.Tensor:
    """One forward over the block `here` of the response, for the `active` rows [B]; writes what is chosen, [B, K].

    budget: forwards the block has had, those it may still have [B], those of it and all later blocks [B], tokens of those.
    """
    columns = slice(width + here.start, width + here.stop)
    logits = _allowed(_guided_logits(denoise, state.canvas, columns, config), config, here)  # [B, K, V]
    tokens, score = _predict(logits, state, config, active)  # [B, K] each
    entropy = None
    if config.schedule.needs_entropy:
        entropy = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)  # [B, K]
        state.fresh += entropy.mean(dim=1) * (state.masked[:, here].all(dim=1) & active)
    step, steps_left, forwards_left, masks_after = budget
    positions = torch.arange(here.start, here.stop, device=logits.device).expand_as(tokens)
    stop = _first_stop(state.canvas[:, width:], state.masked, config.stop_tokens or ())
    may = state.masked[:, here] & active[:, None] & (positions < stop[:, None])
    seen = StepState(
        score=score,
        tokens=tokens,
        positions=positions,
        open=may,
        candidates=may,
        response=state.canvas[:, width:],
        masked=state.masked,
        masks=state.masked[:, here].sum(dim=1),
        masks_after=masks_after,
        step=step,
        steps_left=steps_left,
        forwards_left=forwards_left,
        entropy=entropy,
        fresh_entropy=state.fresh / (here.stop // config.block_length),
    )
    chosen = choose(seen, config.schedule, config.filters)
    _commit(state, chosen, tokens, score, here, width)
    state.forwards += active * (2 if config.cfg_scale else 1)
    state.step += 1
    return chosen


def _guided_logits(denoise: Denoiser, canvas: torch.Tensor, columns: slice, config: SamplerConfig) -> torch.Tensor:
    """Float32 logits [B, K, V], with classifier-free guidance where asked."""
    logits = denoise(canvas, columns).float()
    if not config.cfg_scale:
        return logits
    unguided = denoise(canvas, columns, unconditional=True).float()
    return unguided + (config.cfg_scale + 1) * (logits - unguided)


def _allowed(logits: torch.Tensor, config: SamplerConfig, here: slice) -> torch.Tensor:
    """The logits [B, K, V] without what may not be written; a copy where anything is taken away."""
    if config.suppress_tokens:
        never = torch.tensor(config.suppress_tokens, device=logits.device)
        logits = logits.index_fill(-1, never, -torch.inf)
    early = min(here.stop, config.min_length) - here.start
    if early > 0 and config.stop_tokens:
        logits = logits.clone()
        logits[:, :early, list(config.stop_tokens)] = -torch.inf
    return logits


def _predict(
    logits: torch.Tensor, state: _State, config: SamplerConfig, active: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The predicted token and the logarithm of its confidence at each position of the block, [B, K] each.

    Confidence is the probability without temperature; for random remasking it is a uniform draw.
    """
    if config.temperature > 0:
        # float64 on purpose: rounding in float32 Gumbel noise changes the distribution that is sampled (LLaDA's remark)
        gumbel = -torch.log(-torch.log(_uniform(state, active, logits.shape[1:], torch.float64)))
        tokens = (logits.double() / config.temperature + gumbel).argmax(dim=-1)
    else:
        tokens = logits.argmax(dim=-1)
    if config.remasking == "random":
        return tokens, _uniform(state, active, logits.shape[1:2], torch.float32).clamp_min(LEAST_DRAW).log()
    return tokens, log_confidence(logits.clone(), tokens)[1]


def _uniform(state: _State, rows: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Draws [B, *shape], each row from its own generator; a row that waits for others draws nothing and gets 1 / 2."""
    half = torch.full(tuple(shape), 0.5, dtype=dtype)
    draws = [
        torch.rand(half.shape, generator=generator, dtype=dtype) if drawing else half
        for generator, drawing in zip(state.generators, rows.tolist(), strict=True)
    ]
    return torch.stack(draws).to(state.canvas.device)


def _commit(state: _State, chosen: torch.Tensor, tokens: torch.Tensor, score: torch.Tensor, here: slice, width: int) -> None:
    """Write the chosen tokens [B, K] into the canvas and note them in the trace."""
    block = state.canvas[:, width + here.start : width + here.stop]
    block[chosen] = tokens[chosen]
    state.masked[:, here] &= ~chosen
    state.score[:, here] = torch.where(chosen, score, state.score[:, here])
    rows, columns = chosen.nonzero(as_tuple=True)
    told = zip(rows.tolist(), columns.tolist(), tokens[chosen].tolist(), score[chosen].exp().tolist(), strict=True)
    state.events += [Event(state.step, row, here.start + column, token, sure) for row, column, token, sure in told]


def _take_back(
    state: _State,
    config: SamplerConfig,
    ask: Callable[[RevisionState], torch.Tensor | None],
    here: slice,
    width: int,
    where: torch.Tensor,
    step: int,
    steps: int,
) -> None:
    """Mask again what the revision asks for in the block `here`, of the places `where` [B, K or 1]; its rows are open."""
    tokens, written = state.canvas[:, width + here.start : width + here.stop], ~state.masked[:, here]
    stop = _first_stop(state.canvas[:, width:], state.masked, config.stop_tokens or ())
    before = torch.arange(here.start, here.stop, device=stop.device)[None] < stop[:, None]
    allowed = written & before & where & (state.taken[:, here] < config.revision.limit)
    score = state.score[:, here]

    def draw() -> torch.Tensor:
        return _uniform(state, where.any(dim=1), score.shape[1:], torch.float32)

    chosen = ask(RevisionState(score, tokens, written, allowed, step, steps, draw))
    if chosen is None or not chosen.any():
        return
    rows, columns = chosen.nonzero(as_tuple=True)
    told = zip(rows.tolist(), columns.tolist(), tokens[chosen].tolist(), score[chosen].exp().tolist(), strict=True)
    state.events += [Event(state.step - 1, row, here.start + at, token, sure, REMASK) for row, at, token, sure in told]
    tokens[chosen] = state.mask_token_id
    state.masked[:, here] |= chosen
    state.taken[:, here] += chosen
    state.open_rows |= chosen.any(dim=1)


def _first_stop(response: torch.Tensor, masked: torch.Tensor, stop_tokens: Sequence[int]) -> torch.Tensor:
    """The first position of a written stop token, or L where there is none, [B]."""
    is_stop = torch.isin(response, torch.tensor(stop_tokens, device=response.device, dtype=response.dtype)) & ~masked
    positions = torch.arange(response.shape[1], device=response.device).expand_as(response)
    return positions.masked_fill(~is_stop, response.shape[1]).amin(dim=1)


def _finished(response: torch.Tensor, masked: torch.Tensor, stop_tokens: Sequence[int]) -> torch.Tensor:
    """Rows [B] whose text is final: no mask is left before their first stop token (or before the end)."""
    before = torch.arange(response.shape[1], device=response.device)[None] < _first_stop(response, masked, stop_tokens)[:, None]
    return ~(masked & before).any(dim=1)


def _endings(response: torch.Tensor, masked: torch.Tensor, stop_tokens: Sequence[int]) -> tuple[list[int], list[str]]:
    """Length and finish reason of each row."""
    lengths = _first_stop(response, masked, stop_tokens).tolist()
    return lengths, ["stop" if length < response.shape[1] else "length" for length in lengths]
