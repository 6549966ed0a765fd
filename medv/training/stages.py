"""Running one stage of the paper's recipe on the Hugging Face Trainer: align, instruct, vqa (Table 6, section 3).

Stage 1 (align) trains the projector alone; stages 2 (instruct) and 3 (vqa) train projector and language tower; the vision
tower stays frozen throughout. The result is a self-contained folder: weights in safetensors, processor, `history.json` with
the loss curves and `training.json` with the recipe. A run that was stopped goes on from its last checkpoint, exactly.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from medv.artifacts import write_json
from medv.data.example import Example
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor
from medv.profiles import StageRecipe
from medv.training.collate import Collator, Encoder
from medv.training.lora import LoraRecipe, attach_lora, merge_lora
from medv.training.stream import TrainingStream, ValidationStream

PARTS = {
    "projector": ("model.projector.",),
    "language_model": ("model.language_model.", "lm_head.", "model.image_newline"),
    # all but the token embedding
    "language_layers": ("model.language_model.layers.", "model.language_model.norm.", "model.image_newline"),
}


def freeze_except(model: MedVForMaskedDiffusion, trains: Sequence[str]) -> int:
    """Let only the named parts learn; returns the number of trainable parameters. The vision tower is never among them."""
    unknown = set(trains) - set(PARTS)
    if unknown:
        raise ValueError(f"unknown part {', '.join(sorted(unknown))}: a stage trains {' or '.join(PARTS)}")
    prefixes = tuple(prefix for part in trains for prefix in PARTS[part])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def training_steps(recipe: StageRecipe, examples: int) -> int:
    """Optimizer steps of a recipe on so many examples."""
    return max(1, math.ceil(examples * recipe.epochs / recipe.batch_size))


class _StopAfter(TrainerCallback):
    """Stops the run after a number of steps, with a checkpoint, as an interrupted run would be stopped."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        """Called by the Trainer."""
        if state.global_step >= self.steps:
            control.should_save = control.should_training_stop = True
        return control


def train_stage(
    model: MedVForMaskedDiffusion,
    processor: MedVProcessor,
    recipe: StageRecipe,
    examples: Sequence[Example],
    out: Path,
    *,
    validation: Sequence[Example] = (),
    seed: int = 0,
    lora: LoraRecipe | None = None,
    accumulation: int = 1,
    stop_after: int | None = None,
    checkpoints: bool = True,
    quiet: bool = False,
) -> MedVForMaskedDiffusion:
    """Train `model` in place by `recipe` and save it to the folder `out`; returns the trained model.

    The global batch of the recipe is cut into `accumulation` parts per process; the noise does not depend on the cut.
    A folder with checkpoints of the same run is resumed; with those of another recipe, seed or number of examples it is
    refused with a ValueError. `stop_after` ends early with a checkpoint and saves no result. Without
    `checkpoints` a run that is stopped begins anew, and a short one does not spend its time on saving.
    """
    _claim(out, {"recipe": asdict(recipe), "seed": seed, "lora": lora and asdict(lora), "examples": len(examples)})
    model.config.loss_normalization = recipe.normalization
    freeze_except(model, recipe.trains)
    network = attach_lora(model, lora, seed=seed) if lora else model
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    encode = Encoder(processor, loss_tokens=recipe.loss_tokens, max_length=recipe.max_length)
    steps = training_steps(recipe, len(examples))
    stream = TrainingStream(examples, encode, seed=seed, batch_size=recipe.batch_size, steps=steps, times=recipe.times)
    trainer = Trainer(
        model=network,
        args=_arguments(
            recipe, out, steps, seed, accumulation, evaluate=bool(validation), save=checkpoints, quiet=quiet
        ),
        train_dataset=stream,
        eval_dataset=ValidationStream(validation, encode) if validation else None,
        data_collator=Collator(processor.special, padding=recipe.padding),
        callbacks=[_StopAfter(stop_after)] if stop_after else None,
    )
    if quiet:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(out / "checkpoints"))
    if stop_after and trainer.state.global_step < steps:
        return model
    trained = merge_lora(network, out / "adapter") if lora else model
    facts = {"seed": seed, "lora": asdict(lora) if lora else None, "trainable_parameters": trainable}
    _save(trained, processor, recipe, out, trainer, facts)
    return trained


def _claim(out: Path, run: dict) -> None:
    """Note what this folder trains, or check that it is the same as what was begun there."""
    note = out / "run.json"
    run = json.loads(json.dumps(run))  # tuples become lists, as in the file
    if not note.exists():
        write_json(note, run)
        return
    begun = json.loads(note.read_text(encoding="utf-8"))
    differ = [name for name in run if begun.get(name) != run[name]]
    if differ:
        raise ValueError(
            f"{out} holds another run (its {' and '.join(differ)} differ): choose another folder or delete it"
        )


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of a run. The Trainer writes its state last: a run killed while saving has none."""
    complete = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json") if state.stat().st_size]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def _arguments(
    recipe: StageRecipe, out: Path, steps: int, seed: int, accumulation: int, *, evaluate: bool, save: bool, quiet: bool
) -> TrainingArguments:
    """The Trainer's arguments for a recipe."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch, rest = divmod(recipe.batch_size, world * accumulation)
    if rest or not micro_batch:
        raise ValueError(
            f"a batch of {recipe.batch_size} cannot be cut into {world} processes x {accumulation} accumulation steps: "
            "choose numbers that divide it"
        )
    often = max(1, steps // 8)
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=max(micro_batch, 32),
        gradient_accumulation_steps=accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        train_sampling_strategy="sequential",  # the stream is already in order
        remove_unused_columns=False,
        prediction_loss_only=True,
        label_names=["labels"],
        eval_strategy="steps" if evaluate else "no",
        eval_steps=often,
        logging_steps=max(1, steps // 40),
        save_strategy="steps" if save else "no",
        save_steps=often,
        save_total_limit=1,
        report_to="none",
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=quiet,
    )


def _save(model, processor, recipe, out: Path, trainer: Trainer, facts: dict) -> None:
    """Weights, processor, loss curves and recipe."""
    if not trainer.is_world_process_zero():
        return
    model.save_pretrained(out)
    processor.save_pretrained(out)
    write_json(out / "history.json", trainer.state.log_history)
    facts = {"recipe": asdict(recipe), "steps": trainer.state.global_step, **facts}
    write_json(out / "training.json", facts)
