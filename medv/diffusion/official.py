"""The samplers of the public references, step for step: `generate_with_embeds` of LLaDA-V and LLaDA-MedV, generate.py of LLaDA.

Written plainly on purpose: each step predicts every position of the canvas and looks for masks everywhere, because what the
references do with masks outside the current block changes tokens. `SamplerConfig.official` and `SamplerConfig.llada` list
these quirks; `medv.diffusion.sampler` is the one to read for the algorithm. This module knows no images and no tokenizer.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from medv.diffusion.config import Denoiser, SamplerConfig, SamplerOutput, transfer_counts
from medv.diffusion.trace import Commit, Trace

# The uniform draws of a shape and a dtype.
Uniform = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


@dataclass
class _Run:
    """One sampling call: canvas [B, P + L + S] int64, the prompt's width P, where the text stops (P + L while unknown)."""

    denoise: Denoiser
    config: SamplerConfig
    mask: int
    uniform: Uniform
    canvas: torch.Tensor
    width: int
    stop: int
    stopped: bool = False
    forwards: int = 0
    commits: list[Commit] = field(default_factory=list)


def sample(
    denoise: Denoiser,
    prompt: torch.Tensor,
    config: SamplerConfig,
    *,
    mask_token_id: int,
    fill_token_id: int,
    uniform: Uniform | None = None,
) -> SamplerOutput:
    """Sample as the preset of `config` does; prompt [B, P] int64, of one row for "official" (ValueError else).

    `denoise` must hide left padding without moving positions. `uniform` gives the random draws in the order in which the
    reference makes them; by default they come from a generator with config.seed. The sequences are [B, L + S]: text before
    the stop, then the suffix.
    """
    started = time.perf_counter()
    rows, width = prompt.shape
    if config.preset == "official" and rows != 1:
        raise ValueError(f"the official preset samples one row at a time, not {rows}: call it for each row")
    if uniform is None:
        generator = torch.Generator().manual_seed(config.seed)

        def uniform(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.rand(shape, generator=generator, dtype=dtype)

    answer = prompt.new_full((rows, config.gen_length), mask_token_id)
    suffix = prompt.new_tensor(config.suffix).expand(rows, -1)  # [B, S]
    canvas = torch.cat([prompt, answer, suffix], dim=1)
    run = _Run(denoise, config, mask_token_id, uniform, canvas, width, stop=width + config.gen_length)
    for block in range(config.blocks):
        start = width + block * config.block_length
        if run.stopped and run.stop <= start:
            break
        _fill_block(run, start, start + config.block_length)
    kept = torch.cat([run.canvas[:, width : run.stop], suffix], dim=1)
    sequences = kept.new_full((rows, config.gen_length + suffix.shape[1]), fill_token_id)
    sequences[:, : kept.shape[1]] = kept
    return SamplerOutput(
        sequences=sequences,
        lengths=[kept.shape[1]] * rows,
        forwards=[run.forwards] * rows,
        seconds=time.perf_counter() - started,
        finish_reason=["stop" if run.stopped else "length"] * rows,
        trace=Trace(tuple(run.commits), config.gen_length, mask_token_id),
    )


def _fill_block(run: _Run, start: int, end: int) -> None:
    """The steps of one block, columns `start` to `end` of the canvas."""
    steps = run.config.steps // run.config.blocks
    masks = (run.canvas[:, start:end] == run.mask).sum(dim=1).tolist()
    counts = [transfer_counts(count, steps) for count in masks]  # [B][steps]
    for step in range(steps):
        masked = run.canvas == run.mask  # [B, T]
        if run.config.preset == "official":
            if run.stopped and not masked[:, run.width : run.stop].any():
                break
            if not masked[:, start:end].any():
                break
        tokens, confidence = _predict(run, masked)
        limit = run.stop if run.stopped else end
        confidence[:, limit:] = -torch.inf
        _write(run, masked, tokens, confidence.masked_fill(~masked, -torch.inf), [row[step] for row in counts])
        _scan_for_stop(run)


def _predict(run: _Run, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted tokens and their confidence at every position, [B, T] each; positions without a mask mean nothing."""
    config = run.config
    logits = run.denoise(run.canvas, slice(0, None))  # [B, T, V]
    run.forwards += 1
    if config.preset == "official":
        logits = logits.float()
    if config.cfg_scale:
        hidden = run.denoise(run.canvas, slice(0, None), unconditional=True).to(logits.dtype)
        run.forwards += 1
        logits = hidden + (config.cfg_scale + 1) * (logits - hidden)
    shape = tuple(logits.shape)
    noise = run.uniform(shape, torch.float64).to(logits.device)[masked] if config.temperature else None  # [M, V]
    logits = logits[masked]
    if config.suppress_tokens:
        logits[:, list(config.suppress_tokens)] = -torch.inf
    predicted = add_gumbel_noise(logits, config.temperature, noise).argmax(dim=-1)  # [M]
    tokens = run.canvas.masked_scatter(masked, predicted)
    if config.remasking == "random":
        return tokens, run.uniform(shape[:2], torch.float32).to(logits.device)
    if config.unsure_tokens:
        # With a temperature the reference writes the first of them into the noised copy, which nobody reads again.
        logits[:, list(config.unsure_tokens[1 if config.temperature else 0 :])] = -torch.inf
    precision = torch.float64 if config.preset == "official" else logits.dtype
    chosen = logits.to(precision).softmax(dim=-1).gather(-1, predicted[:, None])[:, 0]  # [M]
    return tokens, torch.zeros(shape[:2], dtype=precision, device=logits.device).masked_scatter(masked, chosen)


def add_gumbel_noise(logits: torch.Tensor, temperature: float, uniform: torch.Tensor | None) -> torch.Tensor:
    """exp(logits) / (-log u) ** temperature in float64, whose argmax samples softmax(logits / temperature).

    uniform has the shape of the logits; at temperature 0 the logits are returned as they are.
    """
    if temperature == 0:
        return logits
    return logits.double().exp() / (-uniform.double().log()) ** temperature


def _write(run: _Run, masked: torch.Tensor, tokens: torch.Tensor, confidence: torch.Tensor, counts: list[int]) -> None:
    """Write the `counts` [B] most confident tokens; with fewer eligible positions topk takes whatever comes, as there."""
    length = run.config.gen_length
    step = run.forwards // (2 if run.config.cfg_scale else 1) - 1
    for row, count in enumerate(counts):
        chosen = torch.zeros_like(masked[row])
        chosen[confidence[row].topk(count).indices] = True
        chosen &= masked[row]
        run.canvas[row, chosen] = tokens[row, chosen]
        for column in chosen.nonzero()[:, 0].tolist():
            if 0 <= column - run.width < length:
                sure = max(confidence[row, column].item(), 0.0)
                run.commits.append(Commit(step, row, column - run.width, int(tokens[row, column]), sure))


def _scan_for_stop(run: _Run) -> None:
    """Move the stop to the first place of the first stop sequence that is there."""
    text = run.canvas[0, run.width : run.width + run.config.gen_length].tolist()
    for sequence in run.config.stop_sequences:
        place = _find(text, sequence)
        if place is not None and (not run.stopped or run.width + place < run.stop):
            run.stop, run.stopped = run.width + place, True
        if run.stopped:
            break


def _find(text: Sequence[int], part: Sequence[int]) -> int | None:
    """The first place of `part` in `text`."""
    size = len(part)
    return next((i for i in range(len(text) - size + 1) if tuple(text[i : i + size]) == tuple(part)), None)
