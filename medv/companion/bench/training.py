"""A whole training step, medv's way against the reference's (float32 logits at every position), side by side in one process.

The model is a slice of a language tower with random weights and learns in full; the rows hold random tokens in the place of
image, question and answer, so that nothing is said about learning. Forward, backward and AdamW are in the time.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch
from rich.table import Table

from medv.companion.bench.machine import bench_device, machine, matmul_speed, peak_memory, timed
from medv.companion.bench.sampler import BenchShape, random_network
from medv.diffusion.corruption import corrupt, draw_noise
from medv.diffusion.loss import full_cross_entropy, token_weights
from medv.model.modeling import IGNORED_LABEL, MedVForMaskedDiffusion
from medv.training.costs import mfu, training_flops

TRAINING_PRESETS = {
    "cpu": BenchShape(512, 1536, 4, 8, prompt_length=844, gen_length=256),
    "gpu": BenchShape(4096, 12288, 8, 32, prompt_length=844, gen_length=256, dtype="bfloat16"),
}
"""One sample of LLaDA-MedV: 729 visual tokens, a question, an answer of 256. "gpu" is an 8-layer slice of LLaDA-8B."""


@dataclass(frozen=True)
class StepMeasurement:
    """One way to train. seconds: of a step, the best of the repeats; bytes: the step's own, above weights, gradients and
    optimizer; utilization: the model's operations as a share of this device's own matrix products; mfu: of its data sheet.
    """

    name: str
    seconds: float
    tokens_per_second: float
    bytes: int | None
    utilization: float
    mfu: float | None
    loss: float
    gradient_norm: float
    time_ratio: float = 1.0
    memory_ratio: float | None = None


@dataclass(frozen=True)
class TrainingBench:
    """All ways, and where they were measured. flops: operations of a step that no way can avoid."""

    device: str
    threads: int
    shape: BenchShape
    rows: int
    masked: int
    seed: int
    flops: float
    matmul_tflops: float
    measurements: list[StepMeasurement]
    machine: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """A JSON-able copy."""
        return asdict(self)

    def table(self) -> Table:
        """The same as a table for a terminal."""
        s = self.shape
        what = f"{self.rows} x {s.length} tokens, {self.masked} masked, V = {s.vocab_size}"
        title = f"training step: {what}, hidden {s.hidden_size} x {s.layers} layers, {s.dtype}\n{self.device}"
        caption = f"{self.flops / 1e12:.2f} TFLOP a step; {self.matmul_tflops:.2f} TFLOP/s of this device's own products"
        table = Table(title=title, caption=caption)
        for column in ("step", "seconds", "less", "tokens/s", "memory", "less", "of own products", "MFU", "loss"):
            table.add_column(column, justify="left" if column == "step" else "right")
        for m in self.measurements:
            table.add_row(
                m.name,
                f"{m.seconds:.3f}",
                f"{m.time_ratio:.2f}x",
                f"{m.tokens_per_second:.0f}",
                "?" if m.bytes is None else f"{m.bytes / 2**20:.0f} MB",
                "?" if m.memory_ratio is None else f"{m.memory_ratio:.1f}x",
                f"{100 * m.utilization:.0f} %",
                "" if m.mfu is None else f"{100 * m.mfu:.0f} %",
                f"{m.loss:.5f}",
            )
        return table


def bench_training(
    shape: BenchShape,
    *,
    device: str | torch.device | None = None,
    rows: int = 1,
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> TrainingBench:
    """Measure every way once; `progress` hears what is measured next."""
    device = bench_device(device)
    progress("matrix products")
    speed = matmul_speed(device, getattr(torch, shape.dtype))
    network = random_network(shape, device, seed).train()
    network.model.vision_tower.requires_grad_(False)
    batch = _batch(network, shape, rows, seed)
    masked = int(network(**batch).masked.sum())
    flops = training_flops(network.config, rows=rows, length=shape.length, masked=masked)
    found = []
    for name, loss in (("full logits, as the reference", _reference_loss), ("medv", _loss), ("medv, checkpointing", _loss)):
        progress(name)
        if name.endswith("checkpointing"):
            network.gradient_checkpointing_enable({"use_reentrant": False})
        seconds, peak, value, norm = _steps(network, batch, loss, repeats)
        rates = {"tokens_per_second": rows * shape.length / seconds, "utilization": flops / seconds / speed}
        share = mfu(flops, seconds) if device.type == "cuda" else None
        found.append(StepMeasurement(name, seconds, bytes=peak, mfu=share, loss=value, gradient_norm=norm, **rates))
    first = found[0]
    found = [
        replace(
            m,
            time_ratio=first.seconds / m.seconds,
            memory_ratio=first.bytes / max(m.bytes, 1) if m.bytes and first.bytes else None,
        )
        for m in found
    ]
    where = machine(device)
    facts = (where["device"], torch.get_num_threads(), shape, rows, masked, seed, flops, speed / 1e12)
    return TrainingBench(*facts, found, where)


def _batch(network: MedVForMaskedDiffusion, shape: BenchShape, rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Random clean tokens; the last `gen_length` of each row are the answer, hidden at t = 1/2."""
    top = shape.vocab_size - 400  # below all special ids
    ids = torch.randint(0, top, (rows, shape.length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : shape.prompt_length] = IGNORED_LABEL
    _, u = draw_noise(seed, 0, range(rows), shape.length)
    batch = {"input_ids": ids, "labels": labels, "t": torch.full((rows,), 0.5), "u": u}
    return {name: value.to(network.device) for name, value in batch.items()}


def _loss(network: MedVForMaskedDiffusion, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return network(**batch).loss


def _reference_loss(network: MedVForMaskedDiffusion, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same loss by float32 logits of every position."""
    targets = batch["labels"] != IGNORED_LABEL
    noise = corrupt(batch["input_ids"], targets, batch["t"], batch["u"], network.config.mask_token_id)
    weights = token_weights(noise.masked, targets, noise.p_mask, network.config.loss_normalization)
    return full_cross_entropy(network.model(noise.ids), network.lm_head, batch["labels"], noise.masked, weights)


def _steps(
    network: MedVForMaskedDiffusion, batch: dict[str, torch.Tensor], loss: Callable, repeats: int
) -> tuple[float, int | None, float, float]:
    """Best seconds, least peak bytes, and loss and gradient norm at the first weights; weights are as before afterwards."""
    learns = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=0.0, weight_decay=0.0, fused=True)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        value = loss(network, batch)
        value.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in learns if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return value.detach(), norm

    value, norm = step()  # warm; from here on gradients and moments are held
    seconds, peaks = [], []
    for _ in range(repeats):
        with peak_memory(network.device) as peak:
            seconds.append(timed(step, network.device)[0])
        peaks.append(peak.bytes)
    least = None if peaks[0] is None else min(peaks)
    return min(seconds), least, float(value), float(norm)
