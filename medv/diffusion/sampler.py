"""The reverse process: unmask a fully masked response block by block (Algorithm 1 of the paper).

A canvas [B, P + L] holds the prompt and L masks. Blocks of `block_length` are filled from left to right; each forward
predicts every masked position of the current block, and the most confident predictions are committed. This is the plain
sampler: clear first. It knows token ids and a function `denoise` that returns logits; it knows no images and no tokenizer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from medv.diffusion import official
from medv.diffusion.confidence import log_confidence
from medv.diffusion.corruption import noise_generator
from medv.diffusion.settings import Denoiser, SamplerConfig, SamplerOutput, transfer_counts
from medv.diffusion.trace import Commit, Trace

LEAST_DRAW = 2.0**-25  # below every other float32 draw: a drawn 0 is still above what may not be chosen


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
    uniform: official.Uniform | None = None,
) -> SamplerOutput:
    """Sample one response per row of `prompt` [B, P] int64 (left-padded; padding is the denoiser's affair).

    `row_indices` names the rows for the random draws (default 0 .. B-1), so that a row draws the same alone and in a batch.
    `uniform` replaces the random draws of the presets "official" and "llada" (see `medv.diffusion.official`).
    """
    if config.preset != "medv":
        return official.sample(
            denoise, prompt, config, mask_token_id=mask_token_id, fill_token_id=fill_token_id, uniform=uniform
        )
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
