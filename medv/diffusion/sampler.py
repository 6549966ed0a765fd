"""The reverse process: unmask a fully masked response block by block (Algorithm 1 of the paper).

A canvas [B, P + L] holds the prompt and L masks. Blocks of `block_length` are filled from left to right; each forward
predicts every masked position of the current block, and the most confident predictions are committed. This is the plain
sampler: clear first. It knows token ids and a function `denoise` that returns logits; it knows no images and no tokenizer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from medv.diffusion.caching import NO_CACHE, CachePolicy
from medv.diffusion.confidence import log_confidence
from medv.diffusion.corruption import noise_generator
from medv.diffusion.trace import Commit, Trace

LEAST_DRAW = 2.0**-25  # below every other float32 draw: a drawn 0 is still above what may not be chosen


class Denoiser(Protocol):
    """The network as the sampler sees it."""

    def __call__(self, canvas: torch.Tensor, columns: slice, *, unconditional: bool = False) -> torch.Tensor:
        """Logits [B, K, V] at the K `columns` of the canvas [B, T]; `unconditional` hides the prompt (guidance)."""


@dataclass(frozen=True)
class SamplerConfig:
    """How a response is sampled. L = gen_length, B = block_length, Z = steps, the paper's symbols.

    gen_length: tokens of the response canvas. block_length: tokens of a block; must divide gen_length. steps: forwards
    allowed over all blocks; must be a multiple of the number of blocks (Z = L commits one token a forward).
    temperature: 0 takes the most probable token, above it Gumbel noise is added in float64. cfg_scale: classifier-free
    guidance, logits = u + (1 + scale)(c - u). remasking: "low_confidence" keeps the most confident predictions of a
    forward, "random" keeps random ones. suppress_tokens: ids that are never written; None leaves it to the model.
    stop_tokens: ids that end the response; None leaves it to the model, () never stops. seed: of all random draws.
    cache: which keys and values a forward may keep from earlier ones (see `medv.diffusion.caching`); the model's affair.
    """

    gen_length: int = 128
    block_length: int = 32
    steps: int = 128
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    suppress_tokens: tuple[int, ...] | None = None
    stop_tokens: tuple[int, ...] | None = None
    seed: int = 0
    cache: CachePolicy = NO_CACHE

    def __post_init__(self):
        for name in ("gen_length", "block_length", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.gen_length % self.block_length:
            raise ValueError(
                f"block_length {self.block_length} does not divide gen_length {self.gen_length}: "
                f"choose a divisor, for example {_nearest_divisor(self.gen_length, self.block_length)}"
            )
        if self.steps % self.blocks:
            low = max(self.blocks, self.steps // self.blocks * self.blocks)
            raise ValueError(
                f"steps {self.steps} is not a multiple of the {self.blocks} blocks: use {low}, for example"
            )
        if self.temperature < 0 or self.cfg_scale < 0:
            raise ValueError(f"temperature {self.temperature} and cfg_scale {self.cfg_scale} must not be negative")
        if self.remasking not in ("low_confidence", "random"):
            raise ValueError(f"unknown remasking {self.remasking!r}: use 'low_confidence' or 'random'")

    @property
    def blocks(self) -> int:
        """Number of blocks, L / B."""
        return self.gen_length // self.block_length


def _nearest_divisor(length: int, wanted: int) -> int:
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))


@dataclass(frozen=True)
class SamplerOutput:
    """What a sampling call returns; B rows.

    sequences [B, L] int64: the responses, `fill_token_id` from each row's end on. lengths [B]: tokens before the stop
    token. forwards [B]: network calls while the row was open (guidance counts two). seconds: wall time of the call.
    finish_reason [B]: "stop" or "length". trace: the commits. refreshes: forwards of the call that filled a cache.
    """

    sequences: torch.Tensor
    lengths: list[int]
    forwards: list[int]
    seconds: float
    finish_reason: list[str]
    trace: Trace
    refreshes: int = 0


def transfer_counts(masks: int, steps: int) -> list[int]:
    """How many tokens each of `steps` forwards commits so that `masks` are filled: the remainder goes to the first ones."""
    base, extra = divmod(masks, steps)
    return [base + (step < extra) for step in range(steps)]


@dataclass
class _State:
    """The moving parts of one sampling call."""

    canvas: torch.Tensor  # [B, P + L] int64
    masked: torch.Tensor  # [B, L] bool: positions not yet written
    open_rows: torch.Tensor  # [B] bool: rows not yet finished
    forwards: torch.Tensor  # [B] int64
    generators: list[torch.Generator]
    step: int = 0
    commits: list[Commit] = field(default_factory=list)


@torch.inference_mode()
def sample(
    denoise: Denoiser,
    prompt: torch.Tensor,
    config: SamplerConfig,
    *,
    mask_token_id: int,
    fill_token_id: int,
    row_indices: Sequence[int] | None = None,
) -> SamplerOutput:
    """Sample one response per row of `prompt` [B, P] int64 (left-padded; padding is the denoiser's affair).

    `row_indices` names the rows for the random draws (default 0 .. B-1), so that a row draws the same alone and in a batch.
    """
    started = time.perf_counter()
    rows, width = prompt.shape
    length = config.gen_length
    response = torch.full((rows, length), mask_token_id, dtype=prompt.dtype, device=prompt.device)
    indices = range(rows) if row_indices is None else row_indices
    state = _State(
        canvas=torch.cat([prompt, response], dim=1),  # [B, P + L]
        masked=torch.ones_like(response, dtype=torch.bool),
        open_rows=torch.ones(rows, dtype=torch.bool, device=prompt.device),
        forwards=torch.zeros(rows, dtype=torch.long, device=prompt.device),
        generators=[noise_generator(config.seed, 0, index) for index in indices],
    )
    for block in range(config.blocks):
        _fill_block(denoise, state, config, block, width)
        if not state.open_rows.any():
            break
    lengths, reasons = _endings(state.canvas[:, width:], state.masked, config.stop_tokens or ())
    beyond = torch.arange(length, device=prompt.device)[None] >= torch.tensor(lengths, device=prompt.device)[:, None]
    return SamplerOutput(
        sequences=state.canvas[:, width:].masked_fill(beyond, fill_token_id),
        lengths=lengths,
        forwards=state.forwards.tolist(),
        seconds=time.perf_counter() - started,
        finish_reason=reasons,
        trace=Trace(tuple(state.commits), length, mask_token_id),
    )


def _fill_block(denoise: Denoiser, state: _State, config: SamplerConfig, block: int, width: int) -> None:
    """Run the forwards of one block until its masks are gone or every row has stopped."""
    start, end = block * config.block_length, (block + 1) * config.block_length
    for count in transfer_counts(config.block_length, config.steps // config.blocks):
        still_open = state.masked[:, start:end].any(dim=1) & state.open_rows  # [B]
        if count == 0 or not still_open.any():
            break
        logits = _guided_logits(denoise, state.canvas, slice(width + start, width + end), config)  # [B, K, V]
        if config.suppress_tokens:
            never = torch.tensor(config.suppress_tokens, device=logits.device)
            logits = logits.index_fill(-1, never, -torch.inf)  # a copy: the denoiser's own tensor is left as it is
        tokens, score = _predict(logits, state, config)  # [B, K] each
        candidates = _candidates(state, config, start, end, width)
        chosen = top_positions(score.masked_fill(~candidates, -torch.inf), count) & candidates  # [B, K]
        _commit(state, chosen, tokens, score.exp(), start, width)
        state.forwards += still_open * (2 if config.cfg_scale else 1)
        state.step += 1
        state.open_rows &= ~_finished(state.canvas[:, width:], state.masked, config.stop_tokens or ())


def _candidates(state: _State, config: SamplerConfig, start: int, end: int, width: int) -> torch.Tensor:
    """Positions of the block [B, K] that may be written: masked, in an open row, before the row's stop token."""
    stop = _first_stop(state.canvas[:, width:], state.masked, config.stop_tokens or ())
    positions = torch.arange(start, end, device=stop.device)[None]
    return state.masked[:, start:end] & state.open_rows[:, None] & (positions < stop[:, None])


def _guided_logits(denoise: Denoiser, canvas: torch.Tensor, columns: slice, config: SamplerConfig) -> torch.Tensor:
    """Float32 logits [B, K, V], with classifier-free guidance where asked."""
    logits = denoise(canvas, columns).float()
    if not config.cfg_scale:
        return logits
    unguided = denoise(canvas, columns, unconditional=True).float()
    return unguided + (config.cfg_scale + 1) * (logits - unguided)


def _predict(logits: torch.Tensor, state: _State, config: SamplerConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The predicted token and the logarithm of its confidence at each position of the block, [B, K] each.

    Confidence is the probability without temperature; for random remasking it is a uniform draw.
    """
    if config.temperature > 0:
        # float64 on purpose: rounding in float32 Gumbel noise changes the distribution that is sampled (LLaDA's remark)
        shape = logits.shape[1:]
        uniform = torch.stack([torch.rand(shape, generator=g, dtype=torch.float64) for g in state.generators])
        gumbel = -torch.log(-torch.log(uniform.to(logits.device)))
        tokens = (logits.double() / config.temperature + gumbel).argmax(dim=-1)
    else:
        tokens = logits.argmax(dim=-1)
    if config.remasking == "random":
        draws = torch.stack([torch.rand(logits.shape[1], generator=g) for g in state.generators])
        return tokens, draws.to(logits.device).clamp_min(LEAST_DRAW).log()
    return log_confidence(logits.clone(), tokens)


def top_positions(confidence: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` most confident positions of each row [B, K] bool; of equals the leftmost."""
    order = confidence.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(confidence, dtype=torch.bool).scatter(1, order, True)


def _commit(
    state: _State, chosen: torch.Tensor, tokens: torch.Tensor, confidence: torch.Tensor, start: int, width: int
) -> None:
    """Write the chosen tokens [B, K] into the canvas and note them in the trace."""
    end = start + chosen.shape[1]
    block = state.canvas[:, width + start : width + end]
    block[chosen] = tokens[chosen]
    state.masked[:, start:end] &= ~chosen
    rows, columns = chosen.nonzero(as_tuple=True)
    written = zip(rows.tolist(), columns.tolist(), tokens[chosen].tolist(), confidence[chosen].tolist(), strict=True)
    state.commits += [Commit(state.step, row, start + column, token, conf) for row, column, token, conf in written]


def _first_stop(response: torch.Tensor, masked: torch.Tensor, stop_tokens: Sequence[int]) -> torch.Tensor:
    """The first position of a written stop token, or L where there is none, [B]."""
    is_stop = torch.isin(response, torch.tensor(stop_tokens, device=response.device, dtype=response.dtype)) & ~masked
    positions = torch.arange(response.shape[1], device=response.device).expand_as(response)
    return positions.masked_fill(~is_stop, response.shape[1]).amin(dim=1)


def _finished(response: torch.Tensor, masked: torch.Tensor, stop_tokens: Sequence[int]) -> torch.Tensor:
    """Rows [B] whose text is final: no mask is left before their first stop token (or before the end)."""
    before = (
        torch.arange(response.shape[1], device=response.device)[None]
        < _first_stop(response, masked, stop_tokens)[:, None]
    )
    return ~(masked & before).any(dim=1)


def _endings(response: torch.Tensor, masked: torch.Tensor, stop_tokens: Sequence[int]) -> tuple[list[int], list[str]]:
    """Length and finish reason of each row."""
    lengths = _first_stop(response, masked, stop_tokens).tolist()
    return lengths, ["stop" if length < response.shape[1] else "length" for length in lengths]
