"""`medv train STAGE`: a stage of the paper's recipe on the Hugging Face Trainer: align, instruct, vqa (Table 6, section 3).

Stage 1 (align) trains the projector alone, stages 2 (instruct) and 3 (vqa) projector and language tower. The result is a
folder: weights in safetensors (of stage 1 the projector's alone, where its base is given), processor, `history.json` (losses),
`training.json` (recipe) and `speed.json` (costs since the last start). A stopped run resumes exactly from its last checkpoint.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from medv import limits
from medv.artifacts import SPEED, default_out, write_json
from medv.checkpoints import contents as model_contents
from medv.checkpoints.assembly import assemble, new_processor
from medv.checkpoints.bundled import bundled, fetched_towers, load_model, save_projector
from medv.checkpoints.card import HISTORY_FILE, TRAINING_FILE, finish_folder, origin_of
from medv.checkpoints.loading import load_tokenizer
from medv.data.example import Example
from medv.data.example import contents as data_contents
from medv.model.devices import device_named, place, processes, rank
from medv.model.looks import Looks
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor
from medv.ownership import Run, check_folder, claim_folder, reserve
from medv.profiles import Profile, StageRecipe
from medv.training.collate import Collator, Encoder
from medv.training.costs import StagePlan, check_memory, device_capacity
from medv.training.examples import PHANTOMS, TrainingData, stage_examples
from medv.training.launch import RunOptions, clear_failures, deepspeed_config, join
from medv.training.lora import attach_lora, freeze_except, merge_lora, trainable_parameters
from medv.training.stream import TrainingStream, ValidationStream, training_steps
from medv.training.trainer import (
    Checkpoints,
    Meter,
    OneDeviceArguments,
    StageTrainer,
    find_checkpoint,
    how_to_resume,
    same_weights_on_every_process,
)

MADE_BY = "medv train"
FINISHED = TRAINING_FILE  # written last
DEFAULTS = RunOptions()
ZERO_STAGES = {None: 0, "zero2": 2, "zero3": 3}


def train_stage(
    model: MedVForMaskedDiffusion,
    processor: MedVProcessor,
    recipe: StageRecipe,
    examples: Sequence[Example],
    out: Path,
    options: RunOptions = DEFAULTS,
    *,
    validation: Sequence[Example] = (),
    base: dict[str, str] | None = None,
    about: Mapping[str, str] | None = None,
    origin: Mapping[str, Any] | None = None,
    looks: Looks | None = None,
) -> MedVForMaskedDiffusion:
    """Train `model` in place by `recipe` and save it to the folder `out`; returns the trained model (under ZeRO-3 it is whole
    on the first process alone).

    base: the model under a projector trained alone, as `save_projector` notes it; without it a whole model is saved. origin:
    what `origin_of` says of the start, and the name of stage and data, for `training.json` and the model card. `looks` spares
    images that were encoded before. A folder in which the same run was begun is continued, or, where it was finished,
    loaded; any other raises ValueError. The same run: of one recipe, seed, LoRA and `about` (names for people), with equal
    contents of starting weights and data. Raises TrainingStopped, the last checkpoint intact, where loss or gradient is not
    finite, the disk is full or another process is lost.
    """
    limits.seed("seed", options.seed)
    _check_cost(recipe, options)
    saved, lora, quiet = out / "checkpoints", options.lora, options.quiet
    run = {
        "made_by": MADE_BY,
        **(about or {}),
        "seed": options.seed,
        "recipe": recipe.settings(),
        "lora": lora and asdict(lora),
        "init": model_contents.contents(model, processor),
        "data": data_contents(examples),
        "validation": data_contents(validation),
    }
    with clear_failures(lambda: how_to_resume(saved)), same_weights_on_every_process(model), claimed(out, run):
        if (out / FINISHED).exists():
            return load_model(out)[0]
        join(options.deepspeed)
        model.config.loss_normalization = recipe.normalization
        freeze_except(model, recipe.trains)
        network = attach_lora(model, lora, seed=options.seed) if lora else model
        facts = {"seed": options.seed, "lora": run["lora"], "trainable_parameters": trainable_parameters(network)}
        encode = Encoder(processor, loss_tokens=recipe.loss_tokens, max_length=recipe.max_length, looks=looks)
        steps = training_steps(recipe, len(examples))
        stream = TrainingStream(
            examples,
            encode,
            seed=options.seed,
            batch_size=recipe.batch_size,
            steps=steps,
            times=recipe.times,
            order=recipe.order,
            skip_corrupt=options.skip_corrupt,
        )
        trainer = StageTrainer(
            recipe=recipe,
            meter=Meter(model.config, processor.special.end_of_text, "language_model" in recipe.trains and not lora),
            model=network,
            args=_arguments(recipe, saved, steps, options, evaluate=bool(validation)),
            train_dataset=stream,
            eval_dataset=ValidationStream(validation, encode) if validation else None,
            data_collator=Collator(processor.special, padding=recipe.padding, feature_dropout=recipe.feature_dropout),
        )
        trainer.add_callback(Checkpoints(trainer, options.deepspeed, options.stop_after))
        if quiet:
            trainer.remove_callback(PrinterCallback)
        if recipe.cached_vision:
            how = {"device": trainer.args.device, "skip_corrupt": options.skip_corrupt, "quiet": quiet}
            encode.looks.once(model.model, [*examples, *validation], **how)
        trainer.train(resume_from_checkpoint=find_checkpoint(saved, options.deepspeed, stream))
        unset_hf_deepspeed_config()  # under ZeRO-3 the next model would be partitioned, too
        if options.stop_after and trainer.state.global_step < steps:
            return model
        facts |= dict(about or {}) | {name: value for name, value in (origin or {}).items() if name != "data"}
        drawn = sum(example.drawn for example in examples)
        facts["data"] = {"name": (origin or {}).get("data"), "examples": len(examples), "drawn": drawn}
        facts |= {"processes": processes(), "deepspeed": options.deepspeed, "skipped": stream.gathered_skips()}
        trained = _whole_model(trainer, model, options, out)
        if rank() == 0:
            if base is not None and recipe.trains == ("projector",):
                save_projector(trained, out, base)
            else:
                trained.save_pretrained(out)
            processor.save_pretrained(out)
            history = trainer.losses()
            write_json(out / HISTORY_FILE, history)
            write_json(out / SPEED, trainer.meter.to_dict())
            training = {"recipe": asdict(recipe), "steps": trainer.state.global_step, **facts}
            for folder in (out, *([out / "adapter"] if lora else [])):
                finish_folder(folder, training=training, run=run, history=history)
            write_json(out / FINISHED, training)
        PartialState().wait_for_everyone()
    return trained


def train_stages(
    model: MedVForMaskedDiffusion,
    processor: MedVProcessor,
    stages: Mapping[str, tuple[StageRecipe, Sequence[Example], Sequence[Example]]],
    out: Path,
    options: RunOptions = DEFAULTS,
    start: Sequence[Path] = (),
) -> MedVForMaskedDiffusion:
    """Run stages, given by name as (recipe, training examples, validation examples), one after another into `out`/name.

    Each starts from the folder of the one before, so that a stopped run can be resumed. Returns the model of the last one.
    `start`: the folders whose weights the first one begins with, as far as they are known.
    """
    before = None
    for name, (recipe, examples, validation) in stages.items():
        if before is not None:
            model, processor = load_model(before)
        origin = {"stage": name} | origin_of(start if before is None else [before])
        before = out / name
        model = train_stage(model, processor, recipe, examples, before, options, validation=validation, origin=origin)
    return model


def _check_cost(recipe: StageRecipe, options: RunOptions) -> None:
    """Raises ValueError for options of cost that do not go together, before anything is loaded or written."""
    if options.deepspeed is not None:
        deepspeed_config(options.deepspeed)
    if options.lora and recipe.trains == ("projector",):  # the result is a projector alone: adapters would be lost
        raise ValueError("this stage trains the projector alone, and LoRA adapts the language tower: leave --lora out")
    if options.workers and (options.skip_corrupt or recipe.cached_vision):
        raise ValueError("workers can neither count skipped images nor cache features: leave --workers out")
    if recipe.cached_vision and "vision_end" in recipe.trains:
        raise ValueError("a vision tower that learns cannot be cached: take Profile.with_recipe(stage, cached_vision=False)")
    if recipe.cached_vision and options.deepspeed == "zero3":
        raise ValueError("cached_vision runs the whole vision tower, which ZeRO-3 has cut: give --deepspeed zero2, or none")


def claimed(out: Path, run: Run) -> AbstractContextManager:
    """The folder held for the run by the first process; the others check that it is theirs."""
    if rank() == 0:
        return claim_folder(out, run)
    check_folder(out, run)
    return nullcontext()


def _whole_model(trainer: StageTrainer, model: MedVForMaskedDiffusion, asked: RunOptions, out: Path) -> MedVForMaskedDiffusion:
    """The trained model, on the first process gathered from all processes and with its adapters merged."""
    network = trainer.model
    if asked.deepspeed == "zero3":  # each process has a part of it
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if rank():
            return model
        network = model = MedVForMaskedDiffusion(model.config)
        if asked.lora:
            network = attach_lora(model, asked.lora)
        network.load_state_dict(weights)
    return merge_lora(network, out / "adapter") if asked.lora and rank() == 0 else model


def _arguments(recipe: StageRecipe, saved: Path, steps: int, options: RunOptions, *, evaluate: bool) -> OneDeviceArguments:
    world, parts = processes(), options.accumulation
    micro_batch, rest = divmod(recipe.batch_size, world * parts)
    if rest or not micro_batch:
        raise ValueError(
            f"a batch of {recipe.batch_size} cannot be cut into {world} processes x {parts} accumulation steps: "
            "choose numbers that divide it"
        )
    often = max(1, steps // 8)
    on_gpu = device_named(options.device).type == "cuda"
    return OneDeviceArguments(
        output_dir=str(saved),
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=max(micro_batch, 32),
        gradient_accumulation_steps=parts,
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
        save_strategy="steps" if options.checkpoints else "no",
        save_steps=often,
        report_to="none",
        seed=options.seed,
        deepspeed=options.deepspeed and str(deepspeed_config(options.deepspeed)),
        use_cpu=not on_gpu,
        bf16=recipe.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported(),
        optim="adamw_torch_fused",
        activation_checkpointing=recipe.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=options.quiet,
    )


def summary(out: Path) -> dict:
    """Steps, trainable parameters and last losses of a finished stage, and how many examples were skipped, if any."""
    facts, history = (json.loads((out / name).read_text(encoding="utf-8")) for name in (FINISHED, HISTORY_FILE))
    losses = {name: row[name] for name in ("loss", "eval_loss") for row in history if name in row}  # the last of each
    skipped = {"skipped": len(facts["skipped"])} if facts.get("skipped") else {}
    return {"steps": facts["steps"], "trainable_parameters": facts["trainable_parameters"], **losses, **skipped}


def starting_point(
    profile: Profile, init: Path | None, *, seed: int, dtype: torch.dtype = torch.float32, device: str | None = None
) -> tuple[MedVForMaskedDiffusion, MedVProcessor]:
    """The model to train and its processor: from the folder `init` (in `dtype`), or the profile's `towers` with a new
    projector; on the device as `load_model` puts it.
    """
    if init is not None:
        return load_model(init, dtype=dtype, device=device)
    language, vision = towers(profile)
    model = place(assemble(language, vision, seed=seed, **profile.model.sight), device)
    return model, new_processor(load_tokenizer(language), model.config, system=profile.system)


def towers(profile: Profile, folder: Path | None = None) -> tuple[Path, Path]:
    """Folders of the language and the vision tower: the package's, or those that `medv towers` made in `folder`, by default
    `runs/<profile>/towers`.

    Raises ValueError for a profile that starts from released weights, FileNotFoundError where the towers are missing.
    """
    if profile.towers == "bundled":
        return bundled("language_tower"), bundled("vision_tower")
    if profile.towers != "packages":
        raise ValueError(f"profile {profile.name} has no towers of its own: give the weights to start from with --init")
    return fetched_towers(profile.name, folder or default_out(profile.name) / "towers")


def run_stage(
    stage: str,
    profile: Profile,
    out: Path,
    options: RunOptions = DEFAULTS,
    *,
    data: TrainingData = PHANTOMS,
    init: Path | None = None,
    examples: Sequence[Example] | None = None,
) -> dict:
    """Train one stage into `out`, on `data` or on given `examples`, and return its facts; a stage finished there is not
    trained again, and its facts have no `seconds`.

    Under a launcher every process calls this alike, see `medv.training.launch`. Raises ValueError where anything else is in
    `out`, as `train_stage` does, and where it is `init`.
    """
    recipe = profile.recipe(stage, data.name)
    _check_cost(recipe, options)
    with reserve(out, MADE_BY, inputs=[init]) if rank() == 0 else nullcontext():
        train, validation = examples, ()
        if examples is None:
            train, validation = stage_examples(stage, profile, data, skip_corrupt=options.skip_corrupt)
        # DeepSpeed keeps float32 copies of what it trains, so that each process may load half as much.
        on_gpu = device_named(options.device).type == "cuda"
        half = options.deepspeed is not None and on_gpu and torch.cuda.is_bf16_supported()
        dtype = getattr(torch, profile.dtype) if half else torch.float32
        # The Trainer and DeepSpeed place what they train.
        model, processor = starting_point(profile, init, seed=options.seed, dtype=dtype, device="cpu")
        started = time.perf_counter()
        finished = (out / FINISHED).exists()
        if not finished:
            plan = plan_run(model, processor, recipe, train, options)
            if not options.quiet and rank() == 0:
                print(plan.memory_sentence(), file=sys.stderr)
        # what a projector alone is loaded onto; None for towers that are neither a model's nor the package's
        bundled_base = {"model": "bundled"} if profile.towers == "bundled" else None
        base = bundled_base if init is None else {"model": str(init)}
        origin = origin_of(towers(profile) if init is None else [init]) | {"data": None if examples else data.name}
        more = {"validation": validation, "base": base, "about": {"stage": stage, "profile": profile.name}, "origin": origin}
        train_stage(model, processor, recipe, train, out, options, **more)
    return summary(out) | ({} if finished else {"seconds": time.perf_counter() - started})


def plan_run(
    model: MedVForMaskedDiffusion,
    processor: MedVProcessor,
    recipe: StageRecipe,
    examples: Sequence[Example],
    options: RunOptions = DEFAULTS,
) -> StagePlan:
    """The plan on this machine's devices at the longest of the examples; a ValueError where it cannot fit."""
    encode = Encoder(processor, loss_tokens=recipe.loss_tokens, max_length=recipe.max_length)
    ordered = sorted(examples, key=lambda example: -sum(len(turn.text) for turn in example.turns))
    longest = next((example for example, _ in encode.looks.readable(ordered, skip_corrupt=options.skip_corrupt)), None)
    if longest is None:
        raise ValueError("there are no training examples with an image that can be read: look at the data set")
    length = len(encode(longest)["input_ids"])
    capacity = device_capacity(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    cut = {"gpus": processes(), "zero": ZERO_STAGES[options.deepspeed], "accumulation": options.accumulation}
    return check_memory(model.config, recipe, **cut, lora=options.lora, length=length, capacity=capacity)
