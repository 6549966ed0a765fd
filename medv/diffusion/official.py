"""The samplers of the public references, step for step: `generate_with_embeds` of LLaDA-V and LLaDA-MedV, generate.py of LLaDA.

Deliberately plain: each step predicts every position of the canvas and looks for masks everywhere, because what the references
do with masks outside the current block changes tokens. The configurations list these quirks; read `medv.diffusion.algorithm`
for the algorithm.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from medv.diffusion.blockwise import BlockwiseConfig, Denoiser, SamplerOutput
from medv.diffusion.schedules import transfer_counts
from medv.diffusion.trace import Event, Trace

# The uniform draws of a shape and a dtype.
Uniform = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class OfficialConfig(BlockwiseConfig):
    """The sampler of LLaDA-V and LLaDA-MedV (`generate_with_embeds`), token for token; defaults are its demo's.

    stop_sequences: ids of the stop strings; the demo's is the end of turn, ((126348,),). suffix: ids after the canvas,
    seen by every forward, never overwritten, and part of the returned sequence. Differences from `SamplerConfig`:

    * mask ids in the prompt are open: they are filled from the block's budget, so the answer may keep masks;
    * masks left in earlier blocks stay eligible, and before a known stop so do those of later blocks;
    * a forward may write more positions than there are eligible ones: the rest is arbitrary (masks behind the stop);
    * suppressed ids are suppressed at masks only, and the mask itself is not suppressed: a predicted mask stays open;
    * the confidence is a float64 softmax of the guided and suppressed logits without temperature;
    * the stop scan covers the whole canvas after each forward, later hits may move the stop to the left, and the first
      sequence found ends the scan: once a stop is known only the first sequence is looked for;
    * guidance hides the whole prompt, the image too, but not the suffix;
    * rows are sampled one by one without padding; all draws come from one generator seeded with `seed`, over the whole
      canvas, as torch.manual_seed(seed) before a call of the reference on a CPU would give them;
    * `prefix_refresh_interval` and `threshold`, which its demo passes, have no effect there and are not settings here.
    """

    preset: ClassVar[str] = "official"
    block_length: int = 128
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    suffix: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not all(self.stop_sequences):
            raise ValueError("a stop sequence is empty: each needs at least one id")


@dataclass(frozen=True)
class LladaConfig(BlockwiseConfig):
    """The text sampler of LLaDA (its generate.py), token for token; nothing ends a response early.

    suppress_tokens: never predicted; (126081,) is its logits_eos_inf. unsure_tokens: (end of text, end of turn), its
    confidence_eos_eot_inf: predicted, but with confidence 0. Quirks: masks in the prompt and in earlier blocks are open
    as in `OfficialConfig`; padding on the left is hidden but shifts no position; the softmax is in the logits' own dtype;
    with a temperature only the last of unsure_tokens loses its confidence.
    """

    preset: ClassVar[str] = "llada"
    block_length: int = 128
    suppress_tokens: tuple[int, ...] | None = ()
    unsure_tokens: tuple[int, ...] = ()


def sample(
    denoise: Denoiser,
    prompt: torch.Tensor,
    config: OfficialConfig | LladaConfig,
    *,
    mask_token_id: int,
    fill_token_id: int,
    uniform: Uniform | None = None,
) -> SamplerOutput:
    """Sample as `config` says; prompt [B, P] int64, of one row for an `OfficialConfig` (ValueError otherwise).

    `denoise` must hide left padding without moving positions. `uniform` gives the random draws in the order in which the
    reference makes them; by default they come from a generator with config.seed. The sequences are [B, L + S]: text before
    the stop, then the suffix.
    """
    started, official = time.perf_counter(), isinstance(config, OfficialConfig)
    rows, width = prompt.shape
    if official and rows != 1:
        raise ValueError(f"the official preset samples one row at a time, not {rows}: call it for each row")
    if uniform is None:
        generator = torch.Generator().manual_seed(config.seed)

        def uniform(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.rand(shape, generator=generator, dtype=dtype)

    answer = prompt.new_full((rows, config.gen_length), mask_token_id)
    suffix = prompt.new_tensor(config.suffix if official else ()).expand(rows, -1)  # [B, S]
    canvas = torch.cat([prompt, answer, suffix], dim=1)  # [B, T]
    stop, stopped, steps, events = width + config.gen_length, False, 0, []
    for start in range(width, width + config.gen_length, config.block_length):
        end = start + config.block_length
        if stopped and stop <= start:
            break
        masks = (canvas[:, start:end] == mask_token_id).sum(dim=1).tolist()
        for counts in zip(*(transfer_counts(count, config.steps // config.blocks) for count in masks), strict=True):
            masked = canvas == mask_token_id  # [B, T]
            text_done = stopped and not masked[:, width:stop].any()
            if official and (text_done or not masked[:, start:end].any()):
                break
            tokens, confidence = _predict(denoise, canvas, masked, config, uniform)
            confidence[:, stop if stopped else end :] = -torch.inf
            confidence = confidence.masked_fill(~masked, -torch.inf)
            for row, count in enumerate(counts):
                chosen = torch.zeros_like(masked[row])
                chosen[confidence[row].topk(count).indices] = True  # takes any position where too few are eligible
                chosen &= masked[row]
                canvas[row, chosen] = tokens[row, chosen]
                for column in chosen.nonzero()[:, 0].tolist():
                    if 0 <= column - width < config.gen_length:
                        sure = max(confidence[row, column].item(), 0.0)
                        events.append(Event(steps, row, column - width, int(tokens[row, column]), sure))
            steps += 1
            text = canvas[0, width : width + config.gen_length].tolist()
            for sequence in config.stop_sequences if official else ():
                size = len(sequence)
                place = next((i for i in range(len(text) - size + 1) if tuple(text[i : i + size]) == tuple(sequence)), None)
                if place is not None and (not stopped or width + place < stop):
                    stop, stopped = width + place, True
                if stopped:
                    break
    kept = torch.cat([canvas[:, width:stop], suffix], dim=1)
    sequences = kept.new_full((rows, config.gen_length + suffix.shape[1]), fill_token_id)
    sequences[:, : kept.shape[1]] = kept
    return SamplerOutput(
        sequences=sequences,
        lengths=[kept.shape[1]] * rows,
        forwards=[steps * (2 if config.cfg_scale else 1)] * rows,
        seconds=time.perf_counter() - started,
        finish_reason=["stop" if stopped else "length"] * rows,
        trace=Trace(tuple(events), config.gen_length, mask_token_id),
    )


def _predict(
    denoise: Denoiser, canvas: torch.Tensor, masked: torch.Tensor, config: OfficialConfig | LladaConfig, uniform: Uniform
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted tokens and their confidence, [B, T] each; meaningless at positions without a mask."""
    official = isinstance(config, OfficialConfig)
    logits = denoise(canvas, slice(0, None))  # [B, T, V]
    if official:
        logits = logits.float()
    if config.cfg_scale:
        unguided = denoise(canvas, slice(0, None), unconditional=True).to(logits.dtype)
        logits = unguided + (config.cfg_scale + 1) * (logits - unguided)
    shape = tuple(logits.shape)
    noise = uniform(shape, torch.float64).to(logits.device)[masked] if config.temperature else None  # [M, V]
    logits = logits[masked]
    if config.suppress_tokens:
        logits[:, list(config.suppress_tokens)] = -torch.inf
    predicted = add_gumbel_noise(logits, config.temperature, noise).argmax(dim=-1)  # [M]
    tokens = canvas.masked_scatter(masked, predicted)
    if config.remasking == "random":
        return tokens, uniform(shape[:2], torch.float32).to(logits.device)
    if not official and config.unsure_tokens:
        # With a temperature the reference writes the first of them into the noised copy, which is not read again.
        logits[:, list(config.unsure_tokens[1 if config.temperature else 0 :])] = -torch.inf
    precision = torch.float64 if official else logits.dtype
    chosen = logits.to(precision).softmax(dim=-1).gather(-1, predicted[:, None])[:, 0]  # [M]
    return tokens, torch.zeros(shape[:2], dtype=precision, device=logits.device).masked_scatter(masked, chosen)


def add_gumbel_noise(logits: torch.Tensor, temperature: float, uniform: torch.Tensor | None) -> torch.Tensor:
    """exp(logits) / (-log u) ** temperature in float64, whose argmax samples softmax(logits / temperature).

    uniform has the shape of the logits; at temperature 0 the logits are returned as they are.
    """
    if temperature == 0:
        return logits
    return logits.double().exp() / (-uniform.double().log()) ** temperature


def join_outputs(outputs: Sequence[SamplerOutput]) -> SamplerOutput:
    """The rows of several calls with one config as one output, numbered in order."""
    first, events, rows = outputs[0], [], 0
    for output in outputs:
        events += [event._replace(row=event.row + rows) for event in output.trace.events]
        rows += len(output.lengths)
    events.sort(key=lambda event: (event.step, event.row, event.position))
    return SamplerOutput(
        sequences=torch.cat([output.sequences for output in outputs]),
        lengths=[length for output in outputs for length in output.lengths],
        forwards=[count for output in outputs for count in output.forwards],
        seconds=sum(output.seconds for output in outputs),
        finish_reason=[reason for output in outputs for reason in output.finish_reason],
        trace=Trace(tuple(events), first.trace.gen_length, first.trace.mask_token_id),
    )
