"""Running one stage of the paper's recipe on the Hugging Face Trainer: align, instruct, vqa (Table 6, section 3).

Stage 1 (align) trains the projector alone; stages 2 (instruct) and 3 (vqa) train projector and language tower; the vision
tower stays frozen throughout. The result is a folder: weights in safetensors (of stage 1 the projector's alone, where it is
told what lies under it), processor, `history.json` with the loss curves, `training.json` with the recipe and `speed.json` with
what the steps cost since the last start. A run that was stopped goes on from its last checkpoint, exactly. Order, noise and
averages do not depend on how many processes share a batch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from medv import limits
from medv.artifacts import SPEED, write_json
from medv.checkpoints import contents as model_contents
from medv.checkpoints.bundled import load_model, save_projector
from medv.data.example import Example
from medv.data.example import contents as data_contents
from medv.model.devices import device_named
from medv.model.looks import Looks
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor
from medv.ownership import Run, check_folder, claim_folder
from medv.profiles import StageRecipe
from medv.training.collate import Collator, Encoder
from medv.training.launch import deepspeed_config, join, processes, rank, stopping_in_words, wait_for_all
from medv.training.lora import LoraRecipe, attach_lora, merge_lora
from medv.training.meter import Meter, MeteredTrainer, totals, without_times
from medv.training.stream import TrainingStream, ValidationStream
from medv.training.trainer import Checkpoints, OneDeviceArguments, StageTrainer, find_checkpoint, going_on, looking_always

MADE_BY = "medv train"
FINISHED = "training.json"  # written last
PARTS = {
    "projector": ("model.projector.",),
    "language_model": ("model.language_model.", "lm_head.", "model.image_newline"),
    # all but the token embedding
    "language_layers": ("model.language_model.layers.", "model.language_model.norm.", "model.image_newline"),
    # a deviation from the paper: the last block and the head convolution of an EfficientNet-Lite0
    "vision_end": ("model.vision_tower.encoder.blocks.15.", "model.vision_tower.encoder.top_"),
}


def freeze_except(model: MedVForMaskedDiffusion, trains: Sequence[str]) -> int:
    """Let only the named parts learn; returns the number of trainable parameters.

    Raises ValueError for a part that is unknown or that this model does not have.
    """
    unknown = set(trains) - set(PARTS)
    if unknown:
        raise ValueError(f"unknown part {', '.join(sorted(unknown))}: a stage trains {' or '.join(PARTS)}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for part in trains:
        found = [parameter for name, parameter in model.named_parameters() if name.startswith(PARTS[part])]
        if not found:
            raise ValueError(f"this model has no part {part}: only an EfficientNet-Lite0 has one of that name")
        for parameter in found:
            parameter.requires_grad_(True)
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
    deepspeed: str | None = None,
    base: dict[str, str] | None = None,
    about: Mapping[str, str] | None = None,
    skip_corrupt: bool = False,
    stop_after: int | None = None,
    checkpoints: bool = True,
    looks: Looks | None = None,
    quiet: bool = False,
    device: str | None = None,
) -> MedVForMaskedDiffusion:
    """Train `model` in place by `recipe` and save it to the folder `out`; returns the trained model.

    The global batch of the recipe is cut into `accumulation` parts for each process that a launcher started; what is learned
    does not depend on the cut. deepspeed: None, "zero2" or "zero3" (the returned model is then whole on the first process
    alone). base: what a projector trained alone was put on, as `save_projector` notes it; without it a whole model is saved.
    A folder in which the same run was begun is continued, or, where it was finished, loaded; any other is refused with a
    ValueError. The same run: of one recipe, seed, LoRA and `about` (names that a person knows it by), with equal contents of
    starting weights and data. `stop_after` ends early with a checkpoint and saves no result. Raises TrainingStopped, the
    last checkpoint intact, where loss or gradient is not finite, the disk is full or another process is lost. Without
    `checkpoints` a run that is stopped begins anew, and a short one does not spend its time on saving. `looks` spare images
    that were looked at before.
    """
    saved = out / "checkpoints"
    with (
        stopping_in_words(lambda: going_on(saved)),
        looking_always(model),
        claimed(out, made_of(model, processor, recipe, examples, validation, seed, lora, about or {})),
    ):
        if (out / FINISHED).exists():
            return load_model(out)[0]
        join(deepspeed)
        model.config.loss_normalization = recipe.normalization
        freeze_except(model, recipe.trains)
        network = attach_lora(model, lora, seed=seed) if lora else model
        trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
        encode = Encoder(processor, loss_tokens=recipe.loss_tokens, max_length=recipe.max_length, looks=looks)
        steps = training_steps(recipe, len(examples))
        order = {"seed": seed, "batch_size": recipe.batch_size, "steps": steps, "times": recipe.times}
        stream = TrainingStream(examples, encode, skip_corrupt=skip_corrupt, order=recipe.order, **order)
        shown = {"evaluate": bool(validation), "save": checkpoints, "quiet": quiet}
        trainer = MeteredTrainer(
            normalization=recipe.normalization,
            projector_rate=recipe.projector_rate,
            going_on=lambda: going_on(saved),
            model=network,
            args=_arguments(recipe, out, steps, seed, accumulation, deepspeed, device=device, **shown),
            train_dataset=stream,
            eval_dataset=ValidationStream(validation, encode) if validation else None,
            data_collator=Collator(processor.special, padding=recipe.padding, feature_dropout=recipe.feature_dropout),
            callbacks=[Checkpoints(deepspeed, stream), *([_StopAfter(stop_after)] if stop_after else [])],
            meter=Meter(model.config, processor.special.end_of_text, "language_model" in recipe.trains and not lora),
        )
        if quiet:
            trainer.remove_callback(PrinterCallback)
        if recipe.cached_vision:
            if "vision_end" in recipe.trains:
                raise ValueError("a vision tower that learns cannot be cached: set cached_vision=False in the recipe")
            _look_once(model, encode, [*examples, *validation], trainer.args.device, quiet)
        trainer.train(resume_from_checkpoint=find_checkpoint(saved, deepspeed, stream))
        unset_hf_deepspeed_config()  # under ZeRO-3 the next model that is made would be cut to parts, too
        if stop_after and trainer.state.global_step < steps:
            return model
        facts = {"seed": seed, "lora": asdict(lora) if lora else None, "trainable_parameters": trainable}
        facts |= {"processes": processes(), "deepspeed": deepspeed, "skipped": stream.gathered_skips()}
        trained = _whole(trainer, model, lora, out, zero3=deepspeed == "zero3")
        if rank() == 0:
            _save(trained, processor, recipe, out, trainer, facts, base)
        wait_for_all()
    return trained


def _look_once(model, encode: Encoder, examples: Sequence[Example], device: torch.device, quiet: bool) -> None:
    """Run the frozen tower over all images now."""
    if is_deepspeed_zero3_enabled():
        raise ValueError("cached_vision runs the whole vision tower, which ZeRO-3 has cut: use ZeRO-2 or leave it off")
    encode.looks.once(model.model, examples, device=device, quiet=quiet)


def _whole(
    trainer: StageTrainer, model: MedVForMaskedDiffusion, lora: LoraRecipe | None, out: Path, *, zero3: bool
) -> MedVForMaskedDiffusion:
    """The trained model, put together from the processes and with its adapters folded in, on the first process."""
    network = trainer.model
    if zero3:  # each process has a part of it
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if rank():
            return model
        network = model = MedVForMaskedDiffusion(model.config)
        if lora:
            network = attach_lora(model, lora)
        network.load_state_dict(weights)
    if lora and rank() == 0:
        return merge_lora(network, out / "adapter")
    return model


def made_of(
    model: MedVForMaskedDiffusion,
    processor: MedVProcessor,
    recipe: StageRecipe,
    examples: Sequence[Example],
    validation: Sequence[Example],
    seed: int,
    lora: LoraRecipe | None,
    about: Mapping[str, str],
) -> Run:
    """The identity of a training, as `medv.ownership` keeps it. How a batch is cut or shared is no part of it."""
    limits.seed("seed", seed)
    return {
        "made_by": MADE_BY,
        **about,
        "seed": seed,
        "recipe": recipe.settings(),
        "lora": lora and asdict(lora),
        "init": model_contents.contents(model, processor),
        "data": data_contents(examples),
        "validation": data_contents(validation),
    }


def claimed(out: Path, run: Run) -> AbstractContextManager:
    """The folder held for the run by the first process; the others look whether it is theirs."""
    if rank() == 0:
        return claim_folder(out, run)
    check_folder(out, run)
    return nullcontext()


def _arguments(
    recipe: StageRecipe,
    out: Path,
    steps: int,
    seed: int,
    accumulation: int,
    deepspeed: str | None,
    *,
    evaluate: bool,
    save: bool,
    quiet: bool,
    device: str | None = None,
) -> OneDeviceArguments:
    """The Trainer's arguments for a recipe."""
    world = processes()
    micro_batch, rest = divmod(recipe.batch_size, world * accumulation)
    if rest or not micro_batch:
        raise ValueError(
            f"a batch of {recipe.batch_size} cannot be cut into {world} processes x {accumulation} accumulation steps: "
            "choose numbers that divide it"
        )
    often = max(1, steps // 8)
    on_gpu = device_named(device).type == "cuda"
    return OneDeviceArguments(
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
        report_to="none",
        seed=seed,
        deepspeed=None if deepspeed is None else str(deepspeed_config(deepspeed)),
        use_cpu=not on_gpu,
        bf16=recipe.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported(),
        optim="adamw_torch_fused",
        activation_checkpointing=recipe.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        dataloader_num_workers=0,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=quiet,
    )


def _save(model, processor, recipe, out: Path, trainer: MeteredTrainer, facts: dict, base: dict[str, str] | None) -> None:
    """Weights, processor, loss curves and recipe."""
    if base is not None and recipe.trains == ("projector",):
        save_projector(model, out, base)
    else:
        model.save_pretrained(out)
    processor.save_pretrained(out)
    write_json(out / "history.json", without_times(trainer.state.log_history))
    write_json(out / SPEED, {"total": totals(trainer.meter.rows), "rows": trainer.meter.rows})
    facts = {"recipe": asdict(recipe), "steps": trainer.state.global_step, **facts}
    write_json(out / FINISHED, facts)


def summary(out: Path) -> dict:
    """Steps, trainable parameters and last losses of a finished stage, and how many examples were left out, if any were; its
    speed and memory are in speed.json.
    """
    facts = json.loads((out / FINISHED).read_text(encoding="utf-8"))
    history = json.loads((out / "history.json").read_text(encoding="utf-8"))
    last = {name: [row[name] for row in history if name in row][-1:] for name in ("loss", "eval_loss")}
    losses = {name: values[0] for name, values in last.items() if values}
    skipped = {"skipped": len(facts["skipped"])} if facts.get("skipped") else {}
    return {"steps": facts["steps"], "trainable_parameters": facts["trainable_parameters"], **losses, **skipped}
