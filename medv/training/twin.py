"""Training the autoregressive twin: the recipes of stages 1 and 2 on the same examples, with the next token as the target.

Steps, batch, learning rates, examples and their order are the diffusion model's own; only what the loss asks for differs, and
the padding that teaches a diffusion model where to end is left out. The recipes were chosen for the diffusion model: no
setting was searched for the twin.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from medv.data.example import Example
from medv.model.bundled import bundled, load_model
from medv.model.twin import causal_twin
from medv.profiles import Profile, StageRecipe
from medv.training.command import stage_examples, starting_point, summary
from medv.training.stages import train_stage


def causal_recipe(recipe: StageRecipe) -> StageRecipe:
    """The recipe without what belongs to masking: padding is invisible, times are not read."""
    return replace(recipe, padding="none", times="iid")
