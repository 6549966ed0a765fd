"""The training loss at the real vocabulary: medv's way against float32 logits at every position, side by side in one process.

Both get the same hidden states, the same masked positions and the same head, and give the loss and its gradients. Two cases:
the head is frozen (stage 1 of the paper, LoRA), and the head learns (stages 2 and 3); there both versions must hold the
gradient of the head's weights, vocabulary x hidden numbers, so memory is given with and without it.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from rich.table import Table
from torch import nn

from medv.companion.bench.machine import bench_device, machine, peak_memory, timed
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
    """Full logits and medv's way for a head that learns or not. seconds: forward and backward, the best of the repeats.

    bytes: the most that tensors held above what was there before; of it head_gradient_bytes are the gradient of the head's
    weights in both. resident_bytes: by how much the process grew on a CPU, with the buffers of its matrix library.
    gradient_error: the largest difference of a gradient, as a share of its largest value; loss_error: of the loss.
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

    @property
    def time_ratio(self) -> float:
        """Seconds of full logits over ours."""
        return self.full_seconds / self.seconds

    @property
    def whole_memory_ratio(self) -> float:
        """Peak memory of full logits over ours, the gradient of the head included."""
        return self.full_bytes / max(self.bytes, 1)

    @property
    def memory_ratio(self) -> float:
        """The same without the gradient of the head."""
        return (self.full_bytes - self.head_gradient_bytes) / max(self.bytes - self.head_gradient_bytes, 1)


@dataclass(frozen=True)
class LossBench:
    """Both cases, and where they were measured."""

    device: str
    threads: int
    shape: LossShape
    seed: int
    cases: list[LossCase]
    machine: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """A JSON-able copy, ratios included."""
        names = ("time_ratio", "memory_ratio", "whole_memory_ratio")
        return asdict(self) | {"cases": [asdict(c) | {name: getattr(c, name) for name in names} for c in self.cases]}

    def table(self) -> Table:
        """The same as a table for a terminal."""
        s = self.shape
        title = f"loss, forward and backward: {s.positions} positions, {s.masked} masked, V = {s.vocab_size}, hidden "
        table = Table(title=f"{title}{s.hidden_size}, {s.dtype}\n{self.device}")
        for column in ("head", "version", "seconds", "less", "memory", "less", "without its gradient", "gradients"):
            table.add_column(column, justify="left" if column in ("head", "version") else "right")
        for case in self.cases:
            head = "learns" if case.head_learns else "frozen"
            table.add_row(head, "full logits", f"{case.full_seconds:.3f}", "", _megabytes(case.full_bytes), "", "", "")
            table.add_row(
                "",
                "medv",
                f"{case.seconds:.3f}",
                f"{case.time_ratio:.1f}x",
                _megabytes(case.bytes),
                f"{case.whole_memory_ratio:.1f}x",
                f"{case.memory_ratio:.1f}x",
                f"differ by {case.gradient_error:.1e}",
            )
        return table


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.0f} MB"


def bench_loss(
    shape: LossShape,
    *,
    device: str | torch.device | None = None,
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> LossBench:
    """Measure both cases; `progress` hears what is measured next. More masked positions than there are is a ValueError."""
    if not 0 < shape.masked <= shape.positions:
        raise ValueError(f"{shape.masked} of {shape.positions} positions cannot be masked: choose between 1 and all")
    device = bench_device(device)
    cases = []
    for head_learns in (False, True):
        progress("head learns" if head_learns else "head frozen")
        cases.append(_case(shape, device, head_learns, repeats, seed))
    where = machine(device)
    return LossBench(where["device"], torch.get_num_threads(), shape, seed, cases, where)


def _case(shape: LossShape, device: torch.device, head_learns: bool, repeats: int, seed: int) -> LossCase:
    generator, dtype = torch.Generator(device).manual_seed(seed), getattr(torch, shape.dtype)
    here = {"generator": generator, "device": device}
    head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        head.weight.normal_(std=shape.hidden_size**-0.5, generator=generator)
    head.requires_grad_(head_learns)
    states = torch.randn(1, shape.positions, shape.hidden_size, **here).to(dtype).requires_grad_()
    labels = torch.randint(shape.vocab_size, (1, shape.positions), **here)
    masked = torch.zeros(1, shape.positions, dtype=torch.bool, device=device)
    masked[0, torch.randperm(shape.positions, **here)[: shape.masked]] = True
    weights = torch.full((shape.masked,), 1.0 / shape.masked, device=device)
    learns = [states, head.weight] if head_learns else [states]

    def full() -> list[torch.Tensor]:
        loss = full_cross_entropy(states, head, labels, masked, weights)
        return [loss.detach(), *torch.autograd.grad(loss, learns)]

    def ours() -> list[torch.Tensor]:
        loss = masked_cross_entropy(states[masked], head, labels[masked], weights)
        return [loss.detach(), *torch.autograd.grad(loss, learns)]

    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours(), full(), strict=True)]  # warm
    # Turn about, so that a busy machine slows both.
    runs = [(_measure(full, device), _measure(ours, device)) for _ in range(repeats)]
    (full_seconds, full_resident), (seconds, resident) = (_best([run[i] for run in runs]) for i in (0, 1))
    on_gpu = device.type == "cuda"
    return LossCase(
        head_learns=head_learns,
        full_seconds=full_seconds,
        seconds=seconds,
        full_bytes=full_resident if on_gpu else tensor_peak(full),
        bytes=resident if on_gpu else tensor_peak(ours),
        full_resident_bytes=None if on_gpu else full_resident,
        resident_bytes=None if on_gpu else resident,
        head_gradient_bytes=head.weight.nbytes if head_learns else 0,
        loss_error=errors[0],
        gradient_error=max(errors[1:]),
    )


def _measure(call: Callable, device: torch.device) -> tuple[float, int | None]:
    """Seconds of a call, and by how much memory grew: of the allocator on CUDA, resident in the process elsewhere."""
    with peak_memory(device) as peak:
        seconds, _ = timed(call, device)
    return seconds, peak.bytes


def _best(runs: list[tuple[float, int | None]]) -> tuple[float, int | None]:
    """The least seconds and the least peak: what other work of the process adds is no part of the loss."""
    peaks = [peak for _, peak in runs if peak is not None]
    return min(seconds for seconds, _ in runs), min(peaks, default=None)


def tensor_peak(call: Callable) -> int:
    """The most bytes that tensors of a call held at once, counted allocation by allocation on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    steps = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(steps), default=0)
