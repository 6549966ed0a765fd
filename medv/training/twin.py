"""Training the autoregressive twin: the recipes of stages 1 and 2 on the same examples, with the next token as the target.

Steps, batch, learning rates, examples and their order are the diffusion model's own; only what the loss asks for differs, and
the padding that teaches a diffusion model where to end is left out. The recipes were chosen for the diffusion model: no
setting was searched for the twin.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

from medv.artifacts import write_json
from medv.checkpoints.assembly import assemble, new_processor
from medv.checkpoints.bundled import bundled, load_model
from medv.checkpoints.loading import load_tokenizer
from medv.model.twin import MedVForCausalLM, causal_twin
from medv.profiles import Profile, StageRecipe
from medv.training.examples import stage_examples
from medv.training.stages import summary, train_stage

TWIN_STAGES = ("align", "instruct")


def causal_recipe(recipe: StageRecipe) -> StageRecipe:
    """The recipe without what belongs to masking: padding is invisible, times are not read."""
    return replace(recipe, padding="none", times="iid")


def train_twin(profile: Profile, out: Path, *, seed: int = 0, quiet: bool = False) -> dict:
    """Stages 1 and 2 of the twin, from its bundled tower, into the folder `out`; finished stages are kept.

    Returns the facts of each stage as `medv.training.command.summary` gives them. Raises ValueError for a profile without
    bundled towers.
    """
    if profile.towers != "bundled":
        raise ValueError(f"profile {profile.name} has no bundled towers to train an autoregressive twin from")
    tower = bundled("twin_tower")
    facts, start = {}, None
    for stage in TWIN_STAGES:
        folder = out / stage
        if start is None:
            model = assemble(tower, bundled("vision_tower"), seed=seed, **profile.model.sight)
            model = causal_twin(model)
            processor = new_processor(load_tokenizer(tower), model.config, system=profile.system)
        else:
            model, processor = load_model(start)
        train, validation = stage_examples(stage, profile)
        recipe = causal_recipe(profile.stages[stage])
        train_stage(model.train(), processor, recipe, train, folder, validation=validation, seed=seed, quiet=quiet)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        facts[stage] = summary(folder)
        start = folder
    shutil.copytree(start, out, dirs_exist_ok=True)
    return facts


def obtain_twin(profile: Profile, out: Path, *, source: Path | None = None, seed: int = 0) -> dict:
    """Train the twin into `out`, or copy a finished one (any model folder) from `source`; `out`/twin.json says which.

    Returns what it says: the facts of the stages and the seconds of training, or the source's name, or why there is none: a
    profile without a bundled tower has no twin of its own, and then `out` holds no model. Raises ValueError for a `source`
    that is no autoregressive model.
    """
    started = time.perf_counter()
    if source is None and profile.towers != "bundled":
        out.mkdir(parents=True, exist_ok=True)
        facts = {"none": f"profile {profile.name} has no bundled tower to train a twin from: give notebook 13 a model as init"}
    elif source is None:
        facts = dict(train_twin(profile, out, seed=seed))
        facts["seconds"] = round(time.perf_counter() - started, 1)
    else:
        if not isinstance(load_model(source)[0], MedVForCausalLM):
            raise ValueError(f"{source} holds a diffusion model: a twin writes from left to right, give a MedVForCausalLM")
        shutil.copytree(source, out, dirs_exist_ok=True)
        facts = {"copied from": source.name}
    write_json(out / "twin.json", facts)
    return facts
