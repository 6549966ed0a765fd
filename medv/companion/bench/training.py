"""A whole training step, medv's against the reference's (float32 logits at every position), side by side in one process.

The model is a slice of a language tower with random weights, all of which learn; the rows hold random tokens in place of image,
question and answer. Forward, backward and AdamW are in the time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from medv.companion.bench.machine import Report, bench_device, best, here, matmul_speed, megabytes, percent, times
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
    """One training step. seconds: the best of the repeats; bytes: above weights, gradients and optimizer; utilization: the
    model's operations as a share of this device's own matrix products; mfu: of its data sheet. Ratios are the reference's
    number over this one.
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
class TrainingBench(Report):
    """All steps, and where they were measured. flops: operations of a step that no implementation can avoid."""

    shape: BenchShape
    rows: int
    masked: int
    seed: int
    flops: float
    matmul_tflops: float
    measurements: list[StepMeasurement]

    def table(self) -> Table:
        """The same as a table for a terminal."""
        s = self.shape
        what = f"{self.rows} x {s.length} tokens, {self.masked} masked, V = {s.vocab_size}"
        rows = []
        for m in self.measurements:
            measured = (f"{m.seconds:.3f}", times(m.time_ratio, 2), megabytes(m.bytes), times(m.memory_ratio))
            rows.append((m.name, *measured, percent(m.utilization), percent(m.mfu), f"{m.loss:.5f}"))
        return self.comparison(
            f"training step: {what}, hidden {s.hidden_size} x {s.layers} layers, {s.dtype}",
            f"{self.flops / 1e12:.2f} TFLOP a step; share: of {self.matmul_tflops:.2f} TFLOP/s, this device's own products",
            "step seconds faster memory less share MFU loss",
            rows,
        )


def bench_training(
    shape: BenchShape,
    *,
    device: str | torch.device | None = None,
    rows: int = 1,
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> TrainingBench:
    """Measure every step once; `progress` is called with the name of the next."""
    device = bench_device(device)
    progress("matrix products")
    speed = matmul_speed(device, getattr(torch, shape.dtype))
    network = random_network(shape, device, seed).train()
    network.model.vision_tower.requires_grad_(False)
    top = shape.vocab_size - 400  # below all special ids
    ids = torch.randint(0, top, (rows, shape.length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : shape.prompt_length] = IGNORED_LABEL  # the last `gen_length` of each row are the answer
    _, u = draw_noise(seed, 0, range(rows), shape.length)
    batch = {"input_ids": ids, "labels": labels, "t": torch.full((rows,), 0.5), "u": u}
    batch = {name: value.to(network.device) for name, value in batch.items()}
    masked = int(network(**batch).masked.sum())
    flops = training_flops(network.config, rows=rows, length=shape.length, masked=masked)
    found: list[StepMeasurement] = []
    for name in ("full logits, as the reference", "medv", "medv, checkpointing"):
        progress(name)
        if name.endswith("checkpointing"):
            network.activation_checkpointing_enable()
        step = _step(network, batch, reference=not name.startswith("medv"))
        value, norm = step()  # warm: from here on gradients and moments are held
        ((seconds, peak),) = best([step], device, repeats)
        one = StepMeasurement(
            name=name,
            seconds=seconds,
            tokens_per_second=rows * shape.length / seconds,
            bytes=peak,
            utilization=flops / seconds / speed,
            mfu=mfu(flops, seconds) if device.type == "cuda" else None,
            loss=float(value),
            gradient_norm=float(norm),
        )
        first = found[0] if found else one
        memory_ratio = first.bytes / max(peak, 1) if peak and first.bytes else None
        found.append(replace(one, time_ratio=first.seconds / seconds, memory_ratio=memory_ratio))
    facts = {"rows": rows, "masked": masked, "flops": flops, "matmul_tflops": speed / 1e12}
    return TrainingBench(shape=shape, seed=seed, measurements=found, **facts, **here(device))


def _step(network: MedVForMaskedDiffusion, batch: dict[str, torch.Tensor], *, reference: bool) -> Callable:
    """A step that changes no weight: loss and gradient norm. reference: the loss from float32 logits of all positions."""
    learns = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=0.0, weight_decay=0.0, fused=True)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        if reference:
            targets = batch["labels"] != IGNORED_LABEL
            noise = corrupt(batch["input_ids"], targets, batch["t"], batch["u"], network.config.mask_token_id)
            weights = token_weights(noise.masked, targets, noise.p_mask, network.config.loss_normalization)
            value = full_cross_entropy(network.model(noise.ids), network.lm_head, batch["labels"], noise.masked, weights)
        else:
            value = network(**batch).loss
        value.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in learns if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return value.detach(), norm

    return step
