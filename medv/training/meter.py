"""What a training step costs: operations by arithmetic, and tokens, waiting, padding and memory as they are counted.

The measurements go to a file of their own, `speed.json`, that no fingerprint looks at: loss curves and weights of two equal
runs are equal, their times are not. MFU is the share of a GPU's peak (dense, bfloat16) that the model's own operations make up;
what checkpointing computes again does not count as work, padding tokens do.
"""

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from medv.diffusion.corruption import masking_probability
from medv.model.configuration import MedVConfig
from medv.model.vision import feature_width, view_flops
from medv.training.trainer import StageTrainer

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIE": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Dense bfloat16 TFLOP/s from NVIDIA's data sheets, by a part of the name; the first that fits counts."""


def peak_flops(name: str) -> float | None:
    """Operations a second that a GPU of that name can do in bfloat16, None where this table does not know it."""
    found = (peak for part, peak in PEAK_TFLOPS.items() if part in name.upper().replace("-", " "))
    return next((1e12 * peak for peak in found), None)


def training_flops(
    config: MedVConfig, *, rows: int, length: int, masked: int, views: int = 0, language_learns: bool = True
) -> float:
    """Multiplications and additions of forward and backward pass over `rows` sequences of `length` tokens.

    `masked` positions reach the head; `views` images pass the frozen vision tower, forward alone. A frozen language tower
    costs a forward pass and the gradient of its states, as the projector lies below it, and no gradient of its weights.
    """
    text, eye = config.text_config, config.vision_config
    heads = text.num_key_value_heads / text.num_attention_heads
    d, tokens = text.hidden_size, rows * length
    layer = (2 + 2 * heads) * d * d + 3 * d * text.intermediate_size
    linear = 2 * tokens * layer * text.num_hidden_layers + 2 * masked * d * text.vocab_size
    attention = 4 * tokens * length * d * text.num_hidden_layers
    look = views * view_flops(eye) if views else 0
    project = 6 * views * config.image_tokens * (feature_width(eye) * d + d * d)
    return linear * (3 if language_learns else 2) + 3 * attention + look + project


@dataclass
class Meter:
    """Counts between two rows of the log, of this process; `rows` holds what was logged."""

    config: MedVConfig
    pad: int
    language_learns: bool
    rows: list[dict] = field(default_factory=list)
    tokens: int = 0
    padding: torch.Tensor | int = 0
    masked: torch.Tensor | int = 0
    samples: int = 0
    flops: float = 0.0
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def saw(self, batch: dict[str, torch.Tensor], waited: float) -> None:
        """Count a micro-batch that took so many seconds to come."""
        ids, labels = batch["input_ids"], batch["labels"]
        behind = (ids == self.pad).flip(1).cumprod(dim=1).sum(dim=1)  # [B]: the run of pads at the end of each row
        masked = (batch["u"] < masking_probability(batch["t"], self.config.noise_eps)[:, None]) & (labels >= 0)
        self.waited += waited
        self.samples += len(ids)
        self.tokens += ids.numel()
        # Sums stay where the batch is: a GPU is not made to wait for them before the row is written.
        self.padding = self.padding + (behind - 1).clamp_min(0).sum()  # the first one ends the answer
        self.masked = self.masked + masked.sum()
        self.flops += self._flops(len(ids), ids.shape[1], 0, len(batch.get("pixel_values", ())))

    def _flops(self, rows: int, length: int, masked: int, views: int) -> float:
        sizes = {"rows": rows, "length": length, "masked": masked, "views": views}
        return training_flops(self.config, **sizes, language_learns=self.language_learns)

    def close(self, step: int, processes: int = 1) -> None:
        """Write a row up to `step` and begin the next; all processes are taken to be as fast as this one."""
        flops = self.flops + self._flops(0, 0, int(self.masked), 0)
        now = time.perf_counter()
        seconds = now - self.since
        if self.tokens:
            self.rows.append(
                {
                    "step": step,
                    "seconds": seconds,
                    "tokens_per_second": processes * self.tokens / seconds,
                    "samples_per_second": processes * self.samples / seconds,
                    "data_wait_seconds": self.waited,
                    "padding_share": int(self.padding) / self.tokens,
                    "peak_bytes": peak_bytes(),
                    "mfu": mfu(flops, seconds),
                }
            )
        self.tokens = self.padding = self.masked = self.samples = 0
        self.flops = self.waited = 0.0
        self.since = now


def mfu(flops: float, seconds: float) -> float | None:
    """The share of this GPU's peak; None on a CPU or a GPU that is not in the table."""
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if peak is None else flops / seconds / peak


def peak_bytes() -> int:
    """The most memory so far: of the allocator on CUDA, resident in this process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def totals(rows: Sequence[dict]) -> dict[str, float | None]:
    """The rows of a run in one: rates over all its seconds, the largest peak. Empty for no rows."""
    if not rows:
        return {}
    seconds = sum(row["seconds"] for row in rows)

    def mean(name: str) -> float:
        return math.fsum(row[name] * row["seconds"] for row in rows) / seconds

    return {
        "tokens_per_second": mean("tokens_per_second"),
        "samples_per_second": mean("samples_per_second"),
        "data_wait_share": sum(row["data_wait_seconds"] for row in rows) / seconds,
        "padding_share": mean("padding_share"),
        "peak_bytes": max(row["peak_bytes"] for row in rows),
        "mfu": None if rows[0]["mfu"] is None else mean("mfu"),
    }


class MeteredTrainer(StageTrainer):
    """The trainer of a stage with a meter: what it waits for, and a row of speed beside every row of loss."""

    def __init__(self, *args, meter: Meter, **options):
        super().__init__(*args, **options)
        self.meter = meter

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch the micro-batches of a step, with a look at the clock."""
        started = time.perf_counter()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        waited = time.perf_counter() - started
        for batch in batches:
            self.meter.saw(batch, waited / len(batches))
        return batches, items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and close the row of the meter with that of the loss; validation time belongs to no row."""
        super().log(logs, start_time)
        if "loss" in logs:
            self.meter.close(self.state.global_step, self.args.world_size)
        elif "eval_loss" in logs:
            self.meter.since = time.perf_counter()


def without_times(history: Sequence[dict]) -> list[dict]:
    """The Trainer's log without what differs between two equal runs."""
    timed = ("_runtime", "_per_second")
    kept = [{name: value for name, value in row.items() if not name.endswith(timed)} for row in history]
    return [row for row in kept if {"loss", "eval_loss", "train_loss"} & set(row)]
