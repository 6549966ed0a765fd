"""Which examples a stage learns from: the phantoms' own sets, or a real data set in a folder. It trains nothing."""

from collections.abc import Sequence
from pathlib import Path

from medv.data import phantom_sets
from medv.data.example import Example
from medv.data.readers import read_dataset
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
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples of a stage. Real data sets without a validation split give none.

    Their images may be links into the folders `roots`.
    """
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
    return read_dataset(data, data_dir, "train", roots=roots), []
