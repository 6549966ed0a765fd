"""The Hugging Face Trainer where a batch is one batch, however many processes and accumulation steps cut it.

Added to it: padding and loss averages over the whole global batch, a stop before a loss or gradient that is not finite can
reach the weights, and checkpoints that count only when every process has written its part. It knows no stage.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from medv.artifacts import write_json
from medv.diffusion.corruption import masking_probability
from medv.model.modeling import IGNORED_LABEL, MedVForMaskedDiffusion
from medv.training.launch import TrainingStopped, gather, processes, rank, wait_for_all
from medv.training.stream import TrainingStream

COUNTED = ("token", "masked")  # normalizations whose divisor is a count over the batch
COMPLETE = "complete.json"


class OneDeviceArguments(TrainingArguments):
    """A process trains on one device, also where it sees more: theirs are the processes of a launcher."""

    @property
    def n_gpu(self) -> int:
        """0 on a CPU, else 1; more would make the Trainer cut batches behind our back."""
        return min(super().n_gpu, 1)


class StageTrainer(Trainer):
    """A Trainer over a `TrainingStream` with a `Collator`; `normalization` is the one of the model's loss.

    `going_on` says in words how the run can be continued. The projector learns `projector_rate` times as fast as the rest.
    """

    def __init__(self, *, normalization: str, going_on: Callable[[], str], projector_rate: float = 1.0, **options):
        super().__init__(**options)
        self.normalization, self.going_on, self.projector_rate = normalization, going_on, projector_rate

    def create_optimizer(self, model=None):
        """The Trainer's optimizer, with groups of their own for the projector where its rate is another."""
        optimizer = super().create_optimizer(model)
        if self.projector_rate != 1:
            projector = {id(p) for name, p in self.model.named_parameters() if "projector." in name}
            for group in list(optimizer.param_groups):
                apart = [p for p in group["params"] if id(p) in projector]
                group["params"] = [p for p in group["params"] if id(p) not in projector]
                if apart:
                    optimizer.add_param_group(group | {"params": apart, "lr": group["lr"] * self.projector_rate})
        return optimizer

    def get_train_dataloader(self):
        """Lists of items: they become tensors when the width of the global batch is known."""
        collate, self.data_collator = self.data_collator, list
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step, padded and weighed alike on all processes."""
        drawn, failure = [], None
        try:
            drawn = [next(epoch_iterator) for _ in range(num_batches)]
        except (ValueError, OSError) as error:  # an example that cannot be read: every process has to stop
            failure = error
        width = max((self.data_collator.width(items) for items in drawn), default=0)
        facts = gather(torch.tensor([failure is not None, width], device=device, dtype=torch.long))  # [processes, 2]
        if failure is not None:
            raise failure
        if facts[:, 0].any():
            raise TrainingStopped("")
        wide = int(facts[:, 1].max()) if self.data_collator.padding == "batch" else None
        batches = [self.data_collator(items, width=wide) for items in drawn]
        for batch, share in zip(batches, self._shares(batches, device), strict=True):
            batch["share"] = share
        return batches, None

    def _shares(self, batches: list[dict], device: torch.device) -> list[float]:
        """What the loss of each micro-batch is multiplied with, so that their mean is the loss of the global batch."""
        if self.normalization not in COUNTED:
            return [1.0] * len(batches)
        counts = torch.stack([self._count(batch) for batch in batches])  # [micro-batches]
        total = int(gather(counts.sum()[None].to(device)).sum())
        parts = len(batches) * processes()
        return [int(count) * parts / max(total, 1) for count in counts]

    def _count(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The divisor that the loss of this micro-batch uses: its target tokens, or the masked ones."""
        targets = batch["labels"] != IGNORED_LABEL
        if self.normalization == "token":
            return targets.sum()
        p_mask = masking_probability(batch["t"], eps=self.model.config.noise_eps)
        return ((batch["u"] < p_mask[:, None]) & targets).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; while training its share of the global batch, and a stop where it is not finite anywhere."""
        share = inputs.pop("share", None)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if share is None:
            return result
        loss = result * share
        losses = gather(loss.detach()[None])  # [processes, 1]
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
        step, stream = self.state.global_step, self.train_dataset
        names = stream.names(step)[:8] if isinstance(stream, TrainingStream) else []
        raise TrainingStopped(
            f"the {what} is {value} at step {step + 1}: lower the learning rate, or look at the examples of this batch "
            f"({', '.join(names)}); {self.going_on()}"
        )


@contextmanager
def looking_always(model: MedVForMaskedDiffusion) -> Iterator[None]:
    """Let a batch without images use vision tower and projector too, for nothing, while several processes train.

    They share the work on every weight, so one process that skipped some of them would wait for the others forever.
    """
    if processes() == 1:
        yield
        return
    inner, size = model.model, model.config.vision_config.image_size
    embed = inner.embed

    def look_and_embed(input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        if image_features is not None:
            return embed(input_ids, image_features)
        # Before the embedding, as with an image: ZeRO-3 collects the weights of all processes in one order.
        unused = inner.get_image_features(torch.zeros(1, 3, size, size, device=input_ids.device))
        embeds = embed(input_ids, None)
        return embeds + 0 * unused.sum().to(embeds.dtype)

    inner.embed = look_and_embed
    try:
        yield
    finally:
        del inner.embed


class Checkpoints(TrainerCallback):
    """Keeps the newest complete checkpoint: marked when every process has written its part, the older ones removed then."""

    def __init__(self, deepspeed: str | None, stream: TrainingStream):
        self.deepspeed, self.stream = deepspeed, stream

    def on_save(self, args, state, control, **_):
        """Called by the Trainer on every process when its part is written."""
        skipped = self.stream.gathered_skips()  # also waits for all
        if rank() == 0:
            folder = Path(args.output_dir)
            newest = folder / f"checkpoint-{state.global_step}"
            facts = {"step": state.global_step, "processes": processes(), "deepspeed": self.deepspeed}
            write_json(newest / COMPLETE, facts | {"skipped": skipped})
            for old in folder.glob("checkpoint-*"):
                if old != newest:
                    shutil.rmtree(old)


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of a run."""
    complete = [mark.parent for mark in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def find_checkpoint(folder: Path, deepspeed: str | None, stream: TrainingStream) -> str | None:
    """The checkpoint to go on from; what a killed run left half-written is removed.

    Raises ValueError where the parts of the checkpoint do not fit the processes there are now.
    """
    found = last_checkpoint(folder)
    wait_for_all()
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


def going_on(folder: Path) -> str:
    """How a stopped run goes on, in words."""
    found = last_checkpoint(folder)
    if found is None:
        return "there is no checkpoint yet, so the same command begins again"
    return f"the same command goes on from {found}"
