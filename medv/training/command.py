"""`medv train STAGE`: which examples, which starting weights, then `medv.training.stages.train_stage`."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from medv.data import phantom_sets
from medv.data.example import Example
from medv.data.readers import read_dataset
from medv.model.assembly import assemble, new_processor
from medv.model.bundled import bundled, load_model
from medv.model.modeling import MedVForMaskedDiffusion
from medv.model.processing import MedVProcessor
from medv.profiles import STAGES, Profile
from medv.training.lora import LoraRecipe
from medv.training.stages import train_stage, training_steps

PHANTOM_SETS = {
    "align": phantom_sets.alignment_set,
    "instruct": phantom_sets.instruct_set,
    "vqa": phantom_sets.vqa_set,
}
VALIDATION_EXAMPLES = 64


def stage_examples(
    stage: str, profile: Profile, *, data: str = "phantoms", data_dir: Path | None = None
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples of a stage. Real data sets without a validation split give none."""
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}: use pretrain, {', '.join(STAGES)}")
    recipe = profile.stages[stage]
    if data == "phantoms":
        if not profile.synthetic:
            raise ValueError(f"profile {profile.name} trains on real data: name it with --data and --data-dir")
        maker, size = PHANTOM_SETS[stage], profile.model.image_size
        count = min(VALIDATION_EXAMPLES, recipe.samples)
        return maker("train", recipe.samples, image_size=size), maker("validation", count, image_size=size)
    if data_dir is None:
        raise ValueError(f"--data {data} needs the folder of the data set: give --data-dir")
    return read_dataset(data, data_dir, "train"), []


def starting_point(profile: Profile, init: Path | None, *, seed: int) -> tuple[MedVForMaskedDiffusion, MedVProcessor]:
    """The model to train and its processor: from a folder, or the bundled towers with a new projector."""
    if init is not None:
        return load_model(init)
    if profile.name not in ("tiny", "smoke"):
        raise ValueError(f"profile {profile.name} has no bundled towers: give the weights to start from with --init")
    language = bundled("language_tower")
    model = assemble(language, bundled("vision_tower"), seed=seed, image_pool=profile.model.image_pool)
    return model, new_processor(AutoTokenizer.from_pretrained(language), model.config, system=profile.system)


def run_stage(
    stage: str,
    profile: Profile,
    out: Path,
    *,
    data: str = "phantoms",
    data_dir: Path | None = None,
    init: Path | None = None,
    lora: LoraRecipe | None = None,
    seed: int = 0,
    accumulation: int = 1,
    examples: Sequence[Example] | None = None,
    checkpoints: bool = True,
    quiet: bool = False,
) -> dict:
    """Train one stage into `out` and return its facts; a finished stage is not trained again."""
    if not (out / "training.json").exists():
        train, validation = (
            (examples, ()) if examples is not None else stage_examples(stage, profile, data=data, data_dir=data_dir)
        )
        model, processor = starting_point(profile, init, seed=seed)
        started = time.perf_counter()
        train_stage(
            model,
            processor,
            profile.stages[stage],
            train,
            out,
            validation=validation,
            seed=seed,
            lora=lora,
            accumulation=accumulation,
            checkpoints=checkpoints,
            quiet=quiet,
        )
        return summary(out) | {"seconds": time.perf_counter() - started}
    return summary(out)


def summary(out: Path) -> dict:
    """Steps, trainable parameters and last losses of a finished stage."""
    facts = json.loads((out / "training.json").read_text(encoding="utf-8"))
    history = json.loads((out / "history.json").read_text(encoding="utf-8"))
    last = {name: [row[name] for row in history if name in row][-1:] for name in ("loss", "eval_loss")}
    losses = {name: values[0] for name, values in last.items() if values}
    return {"steps": facts["steps"], "trainable_parameters": facts["trainable_parameters"], **losses}


def steps_of(profile: Profile, stage: str) -> int:
    """Optimizer steps of a stage on phantoms."""
    recipe = profile.stages[stage]
    return training_steps(recipe, recipe.samples)
