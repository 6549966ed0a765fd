"""The Hugging Face Trainer where a batch is one batch, however many processes and accumulation steps cut it.

Added: padding and loss averages over the whole global batch, a stop before a loss or gradient that is not finite can reach the
weights, checkpoints that count only when every process has written its part, and measurements of speed. These go to a file of
their own, `speed.json`, which no fingerprint reads: loss curves and weights of two equal runs are equal, their times are not.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import Trainer, TrainerCallback, TrainingArguments

from medv.artifacts import write_json
from medv.diffusion.corruption import masking_probability
from medv.model.configuration import MedVConfig
from medv.model.devices import processes, rank
from medv.model.modeling import IGNORED_LABEL, MedVForMaskedDiffusion
from medv.profiles import StageRecipe
from medv.training.costs import mfu, peak_bytes, training_flops
from medv.training.launch import TrainingStopped
from medv.training.stream import TrainingStream

COMPLETE = "complete.json"


class Meter:
    """Counts of this process between two rows of the log; `rows` holds what was logged."""

    def __init__(self, config: MedVConfig, pad: int, language_learns: bool):
        self.config, self.pad, self.language_learns = config, pad, language_learns
        self.rows: list[dict] = []
        self._begin_row()

    def _begin_row(self) -> None:
        self.tokens = self.samples = self.padding = 0
        self.flops = self.waited = 0.0
        self.since = time.perf_counter()

    def count(self, batch: dict[str, torch.Tensor], *, masked: int, waited: float) -> None:
        """Count a micro-batch with so many masked tokens that took so many seconds to come."""
        ids = batch["input_ids"]
        behind = (ids == self.pad).flip(1).cumprod(dim=1).sum(dim=1)  # [B]: the run of pads at the end of each row
        self.waited += waited
        self.samples += len(ids)
        self.tokens += ids.numel()
        self.padding += int((behind - 1).clamp_min(0).sum())  # the first one ends the answer
        sizes = {"rows": len(ids), "length": ids.shape[1], "masked": masked, "views": len(batch.get("pixel_values", ()))}
        self.flops += training_flops(self.config, **sizes, language_learns=self.language_learns)

    def close_row(self, step: int, processes: int = 1) -> None:
        """Write a row up to `step` and begin the next; all processes are taken to be as fast as this one."""
        seconds = time.perf_counter() - self.since
        if self.tokens:
            rates = {"tokens_per_second": self.tokens, "samples_per_second": self.samples}
            row = {"step": step, "seconds": seconds} | {name: processes * n / seconds for name, n in rates.items()}
            row |= {"data_wait_seconds": self.waited, "padding_share": self.padding / self.tokens}
            self.rows.append(row | {"peak_bytes": peak_bytes(), "mfu": mfu(self.flops, seconds)})
        self._begin_row()

    def to_dict(self) -> dict:
        """The rows, and in `total` the rates over all their seconds and the largest peak (empty for no rows)."""
        total = {}
        if rows := self.rows:
            seconds = [row["seconds"] for row in rows]
            for name in ("tokens_per_second", "samples_per_second", "padding_share", "mfu"):
                values = [row[name] for row in rows]
                total[name] = None if None in values else float(np.average(values, weights=seconds))
            total["data_wait_share"] = sum(row["data_wait_seconds"] for row in rows) / sum(seconds)
            total["peak_bytes"] = max(row["peak_bytes"] for row in rows)
        return {"total": total, "rows": self.rows}


class OneDeviceArguments(TrainingArguments):
    """A process trains on one device, also where it sees more: the others belong to the other processes of a launcher."""

    @property
    def n_gpu(self) -> int:
        """0 on a CPU, else 1; with more, the Trainer would split batches itself."""
        return min(super().n_gpu, 1)


class StageTrainer(Trainer):
    """A Trainer over a `TrainingStream` with a `Collator`, for the normalization and rates of a recipe."""

    def __init__(self, *, recipe: StageRecipe, meter: Meter, **options):
        super().__init__(**options)
        self.recipe, self.meter = recipe, meter

    def create_optimizer(self, model=None):
        """The Trainer's optimizer, with groups of their own for the projector where its rate differs."""
        optimizer = super().create_optimizer(model)
        if self.recipe.projector_rate != 1:
            projector = {id(p) for name, p in self.model.named_parameters() if "projector." in name}
            for group in list(optimizer.param_groups):
                apart = [p for p in group["params"] if id(p) in projector]
                group["params"] = [p for p in group["params"] if id(p) not in projector]
                if apart:
                    optimizer.add_param_group(group | {"params": apart, "lr": group["lr"] * self.recipe.projector_rate})
        return optimizer

    def get_train_dataloader(self):
        """Lists of items: they become tensors when the width of the global batch is known."""
        collate, self.data_collator = self.data_collator, list
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step, padded and weighted alike on all processes."""
        started = time.perf_counter()
        drawn, failure = [], None
        try:
            drawn = [next(epoch_iterator) for _ in range(num_batches)]
        except (ValueError, OSError) as error:  # an example that cannot be read: every process has to stop
            failure = error
        width = max((self.data_collator.width(items) for items in drawn), default=0)
        state = gather(torch.tensor([failure is not None, width], device=device, dtype=torch.long)).view(-1, 2)
        if failure is not None:
            raise failure
        if state[:, 0].any():
            raise TrainingStopped("")
        wide = int(state[:, 1].max()) if self.data_collator.padding == "batch" else None
        batches = [self.data_collator(items, width=wide) for items in drawn]
        targets, masked, shares = [], [], [1.0] * len(batches)
        causal = self.meter.config.text_config.is_causal  # the twin, whose loss is a mean over labels that follow a token
        for batch in batches:
            own = batch["labels"] != IGNORED_LABEL
            own[:, 0] &= not causal
            p_mask = masking_probability(batch["t"], eps=self.meter.config.noise_eps)
            targets.append(int(own.sum()))
            masked.append(int(((batch["u"] < p_mask[:, None]) & own).sum()))
        counted = {"token": targets, "masked": masked}  # the divisors are those of the global batch
        if counts := targets if causal else counted.get(self.recipe.normalization):
            total = int(gather(torch.tensor([sum(counts)], device=device)).sum())
            shares = [count * len(batches) * processes() / max(total, 1) for count in counts]
        waited = (time.perf_counter() - started) / len(batches)
        for batch, share, count in zip(batches, shares, masked, strict=True):
            batch["share"] = share
            self.meter.count(batch, masked=count, waited=waited)
        return batches, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; in training its share of the global batch, and a stop where it is not finite on any process.

        The mean of the micro-batches' shares is the loss of the global batch.
        """
        share = inputs.pop("share", None)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if share is None:
            return result
        loss = result * share
        losses = gather(loss.detach()[None])  # [processes]
        if not losses.isfinite().all():
            self._stop_at("loss", float(losses[~losses.isfinite()][0]))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm):
            self._stop_at("gradient's norm", float(norm))
        return norm

    def _stop_at(self, what: str, value: float) -> None:
        if rank():
            raise TrainingStopped("")
        step = self.state.global_step
        names = self.train_dataset.names(step)[:8]
        raise TrainingStopped(
            f"the {what} is {value} at step {step + 1}: lower the learning rate, or look at the examples of this batch "
            f"({', '.join(names)}); {how_to_resume(Path(self.args.output_dir))}"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and close the row of the meter with that of the loss; validation time belongs to no row."""
        super().log(logs, start_time)
        if "loss" in logs:
            self.meter.close_row(self.state.global_step, self.args.world_size)
        elif "eval_loss" in logs:
            self.meter.since = time.perf_counter()

    def losses(self) -> list[dict]:
        """The rows of the log that hold a loss, without what differs between two equal runs."""
        timed = ("_runtime", "_per_second")
        rows = [{name: value for name, value in row.items() if not name.endswith(timed)} for row in self.state.log_history]
        return [row for row in rows if {"loss", "eval_loss", "train_loss"} & set(row)]


@contextmanager
def same_weights_on_every_process(model: MedVForMaskedDiffusion) -> Iterator[None]:
    """Run the vision path on a dummy image for a batch without images, while several processes train.

    The processes share the work on every weight: one that skipped the vision weights would wait for the others forever.
    """
    if processes() == 1:
        yield
        return
    inner, size = model.model, model.config.vision_config.image_size
    embed = inner.embed

    def look_and_embed(input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        if image_features is not None:
            return embed(input_ids, image_features)
        # Before the embedding, as with an image: ZeRO-3 gathers the weights of all processes in one order.
        unused = inner.get_image_features(torch.zeros(1, 3, size, size, device=input_ids.device))
        embeds = embed(input_ids, None)
        return embeds + 0 * unused.sum().to(embeds.dtype)

    inner.embed = look_and_embed
    try:
        yield
    finally:
        del inner.embed


class Checkpoints(TrainerCallback):
    """Keeps the newest complete checkpoint: it is marked when every process has written its part, then older ones are removed.

    The mark also holds the sums of the losses since the last log, so that a resumed run logs the same as an uninterrupted
    one. After `stop_after` steps the run ends with a checkpoint, as an interrupted run would.
    """

    def __init__(self, trainer: StageTrainer, deepspeed: str | None, stop_after: int | None = None):
        self.trainer, self.deepspeed, self.stop_after = trainer, deepspeed, stop_after

    def on_train_begin(self, args, state, control, **_):
        """Called by the Trainer when it has read a checkpoint and reset its sums."""
        if state.global_step:
            mark = Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE
            losses = json.loads(mark.read_text(encoding="utf-8")).get("losses")
            if losses is None:  # of an earlier version: the next log is over the steps since the resume
                return
            self.trainer._tr_loss.fill_(losses["since_log"])
            self.trainer._total_loss_scalar, self.trainer._globalstep_last_logged = losses["logged"], losses["logged_step"]
            self.trainer._initial_global_step = 0  # the mean loss of the run is over all of its steps

    def on_step_end(self, args, state, control, **_):
        """Called by the Trainer."""
        if self.stop_after and state.global_step >= self.stop_after:
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args, state, control, **_):
        """Called by the Trainer on every process when its part is written."""
        trainer = self.trainer
        since_log = float(gather(trainer._tr_loss.detach()[None]).mean())
        losses = {"since_log": since_log, "logged": trainer._total_loss_scalar, "logged_step": trainer._globalstep_last_logged}
        skipped = trainer.train_dataset.gathered_skips()  # also waits for all
        if rank() == 0:
            folder = Path(args.output_dir)
            newest = folder / f"checkpoint-{state.global_step}"
            facts = {"step": state.global_step, "processes": processes(), "deepspeed": self.deepspeed}
            write_json(newest / COMPLETE, facts | {"skipped": skipped, "losses": losses})
            for old in folder.glob("checkpoint-*"):
                if old != newest:
                    shutil.rmtree(old)


def last_checkpoint(folder: Path, mark: str = COMPLETE) -> str | None:
    """The newest checkpoint of a run that holds the file `mark`, which is written last."""
    complete = [file.parent for file in folder.glob(f"checkpoint-*/{mark}") if file.stat().st_size]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def find_checkpoint(folder: Path, deepspeed: str | None, stream: TrainingStream) -> str | None:
    """The checkpoint to resume from; what a killed run left half-written is removed.

    Raises ValueError where the parts of the checkpoint do not fit the present processes.
    """
    found = last_checkpoint(folder)
    PartialState().wait_for_everyone()
    if rank() == 0:
        for half in folder.glob("checkpoint-*"):
            if not (half / COMPLETE).exists():
                shutil.rmtree(half)
    if found is None:
        return None
    facts = json.loads((Path(found) / COMPLETE).read_text(encoding="utf-8"))
    stream.skipped.update(facts["skipped"])
    then, now = (facts["deepspeed"], facts["processes"]), (deepspeed, processes())
    # Without DeepSpeed every process holds everything, so that their number may change.
    if then != now and (then[0] or now[0]):
        words = ["{1} processes with {0}".format(*way) if way[0] else f"{way[1]} without DeepSpeed" for way in (then, now)]
        raise ValueError(f"{found} was written by {words[0]}, not {words[1]}: go on as the run began")
    return found


def how_to_resume(folder: Path) -> str:
    """The end of the message of a stopped run."""
    found = last_checkpoint(folder)
    if found is None:
        return "there is no checkpoint yet, so the same command begins again"
    return f"the same command goes on from {found}"
