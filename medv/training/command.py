"""`medv train STAGE`: which examples, which starting weights, then `medv.training.stages.train_stage`."""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from medv.artifacts import default_out
from medv.checkpoints.assembly import assemble, new_processor
from medv.checkpoints.bundled import bundled, fetched_towers, load_model
from medv.checkpoints.loading import load_tokenizer
from medv.data.example import Example
from medv.model.devices import device_named, place
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor
from medv.ownership import reserve
from medv.profiles import Profile, StageRecipe
from medv.training.collate import Encoder
from medv.training.examples import stage_examples
from medv.training.launch import deepspeed_config, rank
from medv.training.lora import LoraRecipe
from medv.training.memory import MemoryPlan, check_memory, device_capacity
from medv.training.stages import FINISHED, MADE_BY, summary, train_stage, training_steps

ZERO_STAGES = {None: 0, "zero2": 2, "zero3": 3}


def starting_point(
    profile: Profile,
    init: Path | None,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    folder: Path | None = None,
) -> tuple[MedVForMaskedDiffusion, MedVProcessor]:
    """The model to train and its processor: from a folder (in `dtype`), or the profile's towers with a new projector; on
    the device as `load_model` puts it. `folder` is that of `towers`.
    """
    if init is not None:
        return load_model(init, dtype=dtype, device=device)
    language, vision = towers(profile, folder)
    model = place(assemble(language, vision, seed=seed, **profile.model.sight), device)
    return model, new_processor(load_tokenizer(language), model.config, system=profile.system)


def towers(profile: Profile, folder: Path | None = None) -> tuple[Path, Path]:
    """Folders of the language and the vision tower: the package's for `tiny`; for `small` those that `medv towers` made in
    `folder`, by default `runs/small/towers`.

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
    *,
    data: str = "phantoms",
    data_dir: Path | None = None,
    roots: Sequence[Path] = (),
    protocol: str = "official",
    init: Path | None = None,
    lora: LoraRecipe | None = None,
    seed: int = 0,
    accumulation: int = 1,
    deepspeed: str | None = None,
    skip_corrupt: bool = False,
    examples: Sequence[Example] | None = None,
    checkpoints: bool = True,
    quiet: bool = False,
    device: str | None = None,
) -> dict:
    """Train one stage into `out` and return its facts; a stage finished there is not trained again, and its facts have no
    `seconds`.

    Under a launcher every process calls this alike; `medv.training.launch` says how they are started. Raises ValueError
    where anything else is in `out`, as `train_stage` does, and where it is `init`.
    """
    if deepspeed is not None:
        deepspeed_config(deepspeed)
    with reserve(out, MADE_BY, inputs=[init]) if rank() == 0 else nullcontext():
        train, validation = examples, ()
        if examples is None:
            options = {"data": data, "data_dir": data_dir, "protocol": protocol}
            options |= {"roots": roots, "skip_corrupt": skip_corrupt}
            train, validation = stage_examples(stage, profile, **options)
        # DeepSpeed keeps float32 copies of what it trains, so that each process may load half as much.
        on_gpu = device_named(device).type == "cuda"
        half = deepspeed is not None and on_gpu and torch.cuda.is_bf16_supported()
        dtype = getattr(torch, profile.dtype) if half else torch.float32
        # The Trainer and DeepSpeed place what they train.
        model, processor = starting_point(profile, init, seed=seed, dtype=dtype, device="cpu")
        recipe, started = profile.recipe(stage, data), time.perf_counter()
        finished = (out / FINISHED).exists()
        if not finished:
            cut = {"accumulation": accumulation, "zero": ZERO_STAGES[deepspeed]}
            plan = plan_stage(model, processor, recipe, train, lora=lora, **cut)
            if not quiet and rank() == 0:
                print(plan.sentence(), file=sys.stderr)
        train_stage(
            model,
            processor,
            recipe,
            train,
            out,
            validation=validation,
            seed=seed,
            lora=lora,
            accumulation=accumulation,
            deepspeed=deepspeed,
            base=_base(profile, init),
            about={"stage": stage, "profile": profile.name},
            skip_corrupt=skip_corrupt,
            checkpoints=checkpoints,
            quiet=quiet,
            device=device,
        )
    return summary(out) | ({} if finished else {"seconds": time.perf_counter() - started})


def _base(profile: Profile, init: Path | None) -> dict[str, str] | None:
    """What a projector alone is put on when it is loaded; None for towers that are neither a model's nor the package's."""
    if init is not None:
        return {"model": str(init)}
    return {"model": "bundled"} if profile.towers == "bundled" else None


def plan_stage(
    model: MedVForMaskedDiffusion,
    processor: MedVProcessor,
    recipe: StageRecipe,
    examples: Sequence[Example],
    *,
    lora: LoraRecipe | None = None,
    accumulation: int = 1,
    zero: int = 0,
) -> MemoryPlan:
    """The memory plan on this machine's devices at the longest of the examples; a ValueError where it cannot fit."""
    if not examples:
        raise ValueError("there are no training examples: look at the data set, or at `samples` of the recipe")
    longest = max(examples, key=lambda example: sum(len(turn.text) for turn in example.turns))
    encode = Encoder(processor, loss_tokens=recipe.loss_tokens, max_length=recipe.max_length)
    return check_memory(
        model.config,
        recipe,
        gpus=int(os.environ.get("WORLD_SIZE", "1")),
        zero=zero,
        lora=lora,
        accumulation=accumulation,
        length=len(encode(longest)["input_ids"]),
        capacity=device_capacity(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
    )


def steps_of(profile: Profile, stage: str) -> int:
    """Optimizer steps of a stage on phantoms."""
    recipe = profile.stages[stage]
    return training_steps(recipe, recipe.samples)
