"""Which examples a stage learns from: the phantoms' own sets, or a real data set in a folder. It trains nothing."""

from collections.abc import Sequence
from pathlib import Path

from medv.data import phantom_sets
from medv.data.example import Example
from medv.data.training_set import read_training_set
from medv.profiles import STAGES, Profile

PHANTOM_SETS = {
    "align": phantom_sets.alignment_set,
    "instruct": phantom_sets.instruct_set,
    "vqa": phantom_sets.vqa_set,
}
VALIDATION_EXAMPLES = 64


def stage_examples(
    stage: str,
    profile: Profile,
    *,
    data: str = "phantoms",
    data_dir: Path | None = None,
    roots: Sequence[Path] = (),
    skip_corrupt: bool = False,
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples of a stage. Real data sets give none to validate on.

    roots: folders into which their images may be links. skip_corrupt: images that are missing are left to the training, which
    counts them. Raises ValueError for what cannot be trained on, `medv.data.training_set`.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}: use pretrain, {', '.join(STAGES)}")
    recipe = profile.stages[stage]
    if data == "phantoms":
        if data_dir is not None:
            raise ValueError(f"--data-dir {data_dir} is for a real data set: name that with --data, or leave it out")
        if not profile.synthetic:
            raise ValueError(f"profile {profile.name} trains on real data: name it with --data and --data-dir")
        maker, size = PHANTOM_SETS[stage], profile.model.image_size
        count = min(VALIDATION_EXAMPLES, recipe.samples)
        return maker("train", recipe.samples, image_size=size), maker("validation", count, image_size=size)
    if data_dir is None:
        raise ValueError(f"--data {data} needs the folder of the data set: give --data-dir")
    return read_training_set(data, data_dir, roots=roots, skip_corrupt=skip_corrupt), []
