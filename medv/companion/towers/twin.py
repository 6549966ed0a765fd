"""Training the autoregressive twin: the recipes of stages 1 and 2 on the same examples, with the next token as the target.

Steps, batch, learning rates, examples and their order are those of the diffusion model. Only the target differs, and there is
no padding that teaches where to end. No setting was searched for the twin.
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
from medv.training.launch import RunOptions
from medv.training.stages import summary, train_stages

TWIN_STAGES = ("align", "instruct")


def causal_recipe(recipe: StageRecipe) -> StageRecipe:
    """The recipe without what belongs to masking: padding is invisible, times are not read."""
    return replace(recipe, padding="none", times="iid")


def obtain_twin(profile: Profile, out: Path, *, source: Path | None = None, seed: int = 0) -> dict:
    """Train stages 1 and 2 of the twin from its bundled tower into `out`, or copy a finished one from the folder `source`.

    Returns what `out`/twin.json says: the facts of each stage as `medv.training.stages.summary` gives them and the seconds of
    training, or the source's name, or why there is none: a profile without a bundled tower has no twin of its own, and then
    `out` holds no model. Finished stages are kept. Raises ValueError for a `source` that is no autoregressive model.
    """
    started = time.perf_counter()
    if source is not None:
        if not isinstance(load_model(source)[0], MedVForCausalLM):
            raise ValueError(f"{source} holds a diffusion model: a twin writes from left to right, give a MedVForCausalLM")
        shutil.copytree(source, out, dirs_exist_ok=True)
        facts = {"copied from": source.name}
    elif profile.towers != "bundled":
        out.mkdir(parents=True, exist_ok=True)
        facts = {"none": f"profile {profile.name} has no bundled tower to train a twin from: give notebook 13 a model as init"}
    else:
        tower = bundled("twin_tower")
        model = causal_twin(assemble(tower, bundled("vision_tower"), seed=seed, **profile.model.sight))
        processor = new_processor(load_tokenizer(tower), model.config, system=profile.system)
        recipes = {stage: causal_recipe(profile.stages[stage]) for stage in TWIN_STAGES}
        stages = {stage: (recipe, *stage_examples(stage, profile)) for stage, recipe in recipes.items()}
        train_stages(model, processor, stages, out, RunOptions(seed=seed), (tower, bundled("vision_tower")))
        for stage in TWIN_STAGES:
            shutil.rmtree(out / stage / "checkpoints", ignore_errors=True)
        facts = {stage: summary(out / stage) for stage in TWIN_STAGES}
        facts["seconds"] = round(time.perf_counter() - started, 1)
        shutil.copytree(out / TWIN_STAGES[-1], out, dirs_exist_ok=True)
    write_json(out / "twin.json", facts)
    return facts
