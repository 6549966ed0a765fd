"""The training loss at the real vocabulary: medv's against float32 logits at every position, side by side in one process.

Both get the same hidden states, masked positions and head, and return the loss and its gradients. Two cases: the head is frozen
(stage 1 of the paper, LoRA), and the head learns (stages 2 and 3). There both versions must hold the gradient of the head's
weights, vocabulary x hidden numbers, so memory is given with and without it.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

from medv.companion.bench.machine import Report, bench_device, best, here, megabytes, times
from medv.diffusion.loss import full_cross_entropy, masked_cross_entropy


@dataclass(frozen=True)
class LossShape:
    """The problem; by default one sample of LLaDA-MedV: 729 visual tokens, a question, an answer of 256 half masked."""

    hidden_size: int = 512
    vocab_size: int = 126464
    positions: int = 1100
    masked: int = 128
    dtype: str = "float32"


LOSS_PRESETS = {"cpu": LossShape(), "gpu": LossShape(hidden_size=4096, dtype="bfloat16")}


@dataclass(frozen=True)
class LossCase:
    """Full logits and medv's loss for a head that learns or not. seconds: forward and backward, the best of the repeats.

    bytes: the most that tensors held above what was there before; head_gradient_bytes of it are the gradient of the head's
    weights in both. resident_bytes: by how much the process grew on a CPU, with the buffers of its matrix library.
    gradient_error: the largest difference of a gradient, as a share of its largest value; loss_error: of the loss.
    Ratios are full logits over ours: time_ratio, whole_memory_ratio, and memory_ratio without the gradient of the head.
    """

    head_learns: bool
    full_seconds: float
    seconds: float
    full_bytes: int
    bytes: int
    full_resident_bytes: int | None
    resident_bytes: int | None
    head_gradient_bytes: int
    loss_error: float
    gradient_error: float
    time_ratio: float
    memory_ratio: float
    whole_memory_ratio: float


@dataclass(frozen=True)
class LossBench(Report):
    """Both cases, and where they were measured."""

    shape: LossShape
    seed: int
    cases: list[LossCase]

    def table(self) -> Table:
        """The same as a table for a terminal."""
        s = self.shape
        what = f"{s.positions} positions, {s.masked} masked, V = {s.vocab_size}, hidden {s.hidden_size}, {s.dtype}"
        rows = []
        for case in self.cases:
            head = "learns" if case.head_learns else "frozen"
            rows.append((head, "full logits", f"{case.full_seconds:.3f}", "", megabytes(case.full_bytes), "", "", ""))
            measured = (f"{case.seconds:.3f}", times(case.time_ratio), megabytes(case.bytes), times(case.whole_memory_ratio))
            rows.append(("", "medv", *measured, times(case.memory_ratio), f"{case.gradient_error:.1e}"))
        caption = "* without the gradient of the head's weights, which both hold; error: of the gradients"
        columns = "head loss seconds faster memory less less* error"
        return self.comparison(f"loss, forward and backward: {what}", caption, columns, rows)


def bench_loss(
    shape: LossShape,
    *,
    device: str | torch.device | None = None,
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> LossBench:
    """Measure both cases; `progress` is called with the name of the next. Raises ValueError for too many masked positions."""
    if not 0 < shape.masked <= shape.positions:
        raise ValueError(f"{shape.masked} of {shape.positions} positions cannot be masked: choose between 1 and all")
    device, cases = bench_device(device), []
    for head_learns in (False, True):
        progress("head learns" if head_learns else "head frozen")
        cases.append(_case(shape, device, head_learns, repeats, seed))
    return LossBench(shape=shape, seed=seed, cases=cases, **here(device))


def _case(shape: LossShape, device: torch.device, head_learns: bool, repeats: int, seed: int) -> LossCase:
    generator, dtype = torch.Generator(device).manual_seed(seed), getattr(torch, shape.dtype)
    drawn = {"generator": generator, "device": device}
    head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        head.weight.normal_(std=shape.hidden_size**-0.5, generator=generator)
    head.requires_grad_(head_learns)
    states = torch.randn(1, shape.positions, shape.hidden_size, **drawn).to(dtype).requires_grad_()
    labels = torch.randint(shape.vocab_size, (1, shape.positions), **drawn)
    masked = torch.zeros(1, shape.positions, dtype=torch.bool, device=device)
    masked[0, torch.randperm(shape.positions, **drawn)[: shape.masked]] = True
    weights = torch.full((shape.masked,), 1.0 / shape.masked, device=device)
    learns = [states, head.weight] if head_learns else [states]

    def full() -> list[torch.Tensor]:
        loss = full_cross_entropy(states, head, labels, masked, weights)
        return [loss.detach(), *torch.autograd.grad(loss, learns)]

    def ours() -> list[torch.Tensor]:
        loss = masked_cross_entropy(states[masked], head, labels[masked], weights)
        return [loss.detach(), *torch.autograd.grad(loss, learns)]

    loss_error, *errors = (float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours(), full(), strict=True))  # warm
    (full_seconds, full_grown), (seconds, grown) = best((full, ours), device, repeats)
    on_gpu, head_gradient = device.type == "cuda", head.weight.nbytes if head_learns else 0
    full_bytes, own_bytes = (full_grown, grown) if on_gpu else (tensor_peak(full), tensor_peak(ours))
    return LossCase(
        head_learns=head_learns,
        full_seconds=full_seconds,
        seconds=seconds,
        full_bytes=full_bytes,
        bytes=own_bytes,
        full_resident_bytes=None if on_gpu else full_grown,
        resident_bytes=None if on_gpu else grown,
        head_gradient_bytes=head_gradient,
        loss_error=loss_error,
        gradient_error=max(errors),
        time_ratio=full_seconds / seconds,
        memory_ratio=(full_bytes - head_gradient) / max(own_bytes - head_gradient, 1),
        whole_memory_ratio=full_bytes / max(own_bytes, 1),
    )


def tensor_peak(call: Callable) -> int:
    """The most bytes that tensors of a call held at once, counted allocation by allocation on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    steps = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(steps), default=0)
