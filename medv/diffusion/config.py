"""How a response is sampled, what sampling returns, and how many tokens each forward commits.

These are the words that the samplers share: `medv.diffusion.sampler` (Algorithm 1 of the paper, clear) and
`medv.diffusion.official` (the public reference, step for step). Nothing here runs a network.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from medv import limits
from medv.diffusion.caching import NO_CACHE, CachePolicy
from medv.diffusion.revision import Revision
from medv.diffusion.schedules import LINEAR, Filter, Schedule, transfer_counts
from medv.diffusion.trace import Trace

__all__ = ["Denoiser", "SamplerConfig", "SamplerOutput", "join_outputs", "transfer_counts"]

PRESETS = ("medv", "official", "llada")
LONGEST = 2**20
"""Tokens, or forwards, of a response: more than any model has positions for."""
TEMPERATURES = (1e-6, 100.0)
"""Between these, and at 0, the noisy logits are finite in float64."""


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
    stop_tokens: ids that end the response; None leaves it to the model, () never stops. min_length: no stop token before so
    many tokens. seed: of all random draws. schedule: how many predictions a forward commits and which; filters: what waits
    for a later forward; revision: what is taken back (`medv.diffusion.schedules`, `filters`, `revision`). cache: which keys
    and values a forward may keep from earlier ones (`medv.diffusion.caching`); the denoiser's affair.
    preset: "medv" is the plain sampler; "official" and "llada" repeat the public references (see `official` and `llada`,
    which also explain stop_sequences, suffix and unsure_tokens).
    """

    gen_length: int = 128
    block_length: int = 32
    steps: int = 128
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    suppress_tokens: tuple[int, ...] | None = None
    stop_tokens: tuple[int, ...] | None = None
    min_length: int = 0
    seed: int = 0
    schedule: Schedule = LINEAR
    filters: tuple[Filter, ...] = ()
    revision: Revision | None = None
    cache: CachePolicy = NO_CACHE
    preset: str = "medv"
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    suffix: tuple[int, ...] = ()
    unsure_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}: use one of {', '.join(PRESETS)}")
        for name, preset in (("stop_sequences", "official"), ("suffix", "official"), ("unsure_tokens", "llada")):
            if getattr(self, name) and self.preset != preset:
                raise ValueError(f"{name} {getattr(self, name)} belongs to SamplerConfig.{preset}(), not {self.preset!r}")
        if self.preset != "medv" and self.stop_tokens:
            raise ValueError(
                f"stop_tokens {self.stop_tokens} are not read by the preset {self.preset!r}: "
                "give stop_sequences to SamplerConfig.official(), for example ((126348,),)"
            )
        own = {name: getattr(self, name) for name in ("min_length", "filters", "revision")}
        changed = any(own.values()) or self.schedule != LINEAR or self.cache != NO_CACHE
        if self.preset != "medv" and changed:
            raise ValueError(
                f"the preset {self.preset!r} has no schedule, filters, revision, cache or min_length: leave them out"
            )
        if not all(self.stop_sequences):
            raise ValueError("a stop sequence is empty: each needs at least one id")
        for name in ("gen_length", "block_length", "steps"):
            limits.whole(name, getattr(self, name), 1, LONGEST)
        if self.gen_length % self.block_length:
            raise ValueError(
                f"block_length {self.block_length} does not divide gen_length {self.gen_length}: "
                f"choose a divisor, for example {_nearest_divisor(self.gen_length, self.block_length)}"
            )
        if self.steps % self.blocks:
            low = max(self.blocks, self.steps // self.blocks * self.blocks)
            raise ValueError(f"steps {self.steps} is not a multiple of the {self.blocks} blocks: use {low}, for example")
        limits.whole("min_length", self.min_length, 0, self.gen_length)
        if self.temperature != 0:
            limits.real("temperature", self.temperature, *TEMPERATURES)
        limits.real("cfg_scale", self.cfg_scale, 0)
        limits.seed("seed", self.seed)
        if self.remasking not in ("low_confidence", "random"):
            raise ValueError(f"unknown remasking {self.remasking!r}: use 'low_confidence' or 'random'")

    @classmethod
    def official(
        cls,
        *,
        gen_length: int = 128,
        block_length: int = 128,
        steps: int = 128,
        temperature: float = 0.0,
        cfg_scale: float = 0.0,
        remasking: str = "low_confidence",
        suppress_tokens: tuple[int, ...] | None = None,
        stop_sequences: tuple[tuple[int, ...], ...] = (),
        suffix: tuple[int, ...] = (),
        seed: int = 0,
    ) -> "SamplerConfig":
        """The sampler of LLaDA-V and LLaDA-MedV (`generate_with_embeds`), token for token; defaults are its demo's.

        stop_sequences: ids of the stop strings; the demo's is the end of turn, ((126348,),). suffix: ids after the canvas,
        seen by every forward, never overwritten, and part of the returned sequence. What it does that the plain sampler
        does not (all of it changes tokens, all of it is off elsewhere):

        * mask ids in the prompt are open: they are filled from the block's budget, so the answer may keep masks;
        * masks left in earlier blocks stay eligible, and before a known stop so do those of later blocks;
        * a forward may write more positions than there are eligible ones: the rest is arbitrary (masks behind the stop);
        * suppressed ids are suppressed at masks only, and the mask itself is not suppressed: a predicted mask stays open;
        * the confidence is a float64 softmax of the guided and suppressed logits without temperature;
        * the stop scan looks through the whole canvas after each forward, later hits may move the stop to the left, and the
          first sequence found ends the scan: once a stop is known only the first sequence is looked for;
        * guidance hides the whole prompt, the image too, but not the suffix;
        * rows are sampled one by one without padding; all draws come from one generator seeded with `seed`, over the whole
          canvas, as torch.manual_seed(seed) before a call of the reference on a CPU would give them;
        * `prefix_refresh_interval` and `threshold`, which its demo passes, have no effect there and are not settings here.
        """
        return cls(
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            temperature=temperature,
            cfg_scale=cfg_scale,
            remasking=remasking,
            suppress_tokens=suppress_tokens,
            stop_tokens=(),
            seed=seed,
            preset="official",
            stop_sequences=stop_sequences,
            suffix=suffix,
        )

    @classmethod
    def llada(
        cls,
        *,
        gen_length: int = 128,
        block_length: int = 128,
        steps: int = 128,
        temperature: float = 0.0,
        cfg_scale: float = 0.0,
        remasking: str = "low_confidence",
        suppress_tokens: tuple[int, ...] = (),
        unsure_tokens: tuple[int, ...] = (),
        seed: int = 0,
    ) -> "SamplerConfig":
        """The text sampler of LLaDA (its generate.py), token for token; nothing ends a response early.

        suppress_tokens: never predicted; (126081,) is its logits_eos_inf. unsure_tokens: (end of text, end of turn), its
        confidence_eos_eot_inf: predicted, but with confidence 0. Quirks: masks in the prompt and in earlier blocks are open
        as in `official`; padding on the left is hidden but shifts no position; the softmax is in the logits' own dtype;
        with a temperature only the last of unsure_tokens loses its confidence.
        """
        return cls(
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            temperature=temperature,
            cfg_scale=cfg_scale,
            remasking=remasking,
            suppress_tokens=suppress_tokens,
            stop_tokens=(),
            seed=seed,
            preset="llada",
            unsure_tokens=unsure_tokens,
        )

    @property
    def blocks(self) -> int:
        """Number of blocks, L / B."""
        return self.gen_length // self.block_length


def _nearest_divisor(length: int, wanted: int) -> int:
    divisors = [d for d in range(1, length + 1) if length % d == 0]  # length is at most LONGEST
    return min(divisors, key=lambda d: abs(d - wanted))


@dataclass(frozen=True)
class SamplerOutput:
    """What a sampling call returns; B rows.

    sequences [B, L] int64: the responses, `fill_token_id` from each row's end on. lengths [B]: tokens before the stop
    token. forwards [B]: network calls while the row was open (guidance counts two). seconds: wall time of the call.
    finish_reason [B]: "stop" or "length". trace: the events. refreshes: forwards of the call that filled a cache.
    """

    sequences: torch.Tensor
    lengths: list[int]
    forwards: list[int]
    seconds: float
    finish_reason: list[str]
    trace: Trace
    refreshes: int = 0


def join_outputs(outputs: list[SamplerOutput]) -> SamplerOutput:
    """The rows of several calls of one config as one output, numbered in order."""
    first, events, rows = outputs[0], [], 0
    for output in outputs:
        events += [event._replace(row=event.row + rows) for event in output.trace.events]
        rows += len(output.lengths)
    return SamplerOutput(
        sequences=torch.cat([output.sequences for output in outputs]),
        lengths=[length for output in outputs for length in output.lengths],
        forwards=[count for output in outputs for count in output.forwards],
        seconds=sum(output.seconds for output in outputs),
        finish_reason=[reason for output in outputs for reason in output.finish_reason],
        trace=Trace(
            tuple(sorted(events, key=lambda c: (c.step, c.row, c.position))), first.trace.gen_length, first.trace.mask_token_id
        ),
    )
