"""The training examples of a published data set: no row of another split among them, and all with their images.

What is refused here would otherwise train silently on test questions, or on texts alone. The split of a row follows from its
file's name, from its marks and numbers (`DataSet.split_of`) and from the test file beside it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from medv.data.example import Example
from medv.data.readers import DataSet, data_set, read_dataset
from medv.reading import DataError


def read_training_set(
    name: str, folder: str | Path, *, roots: Sequence[Path] = (), skip_corrupt: bool = False
) -> list[Example]:
    """The training examples in `folder` (or one of its files), with their images, which may be links into the folders `roots`.

    Raises DataError for rows of another split, and for missing images: all of them, or, unless `skip_corrupt`, some.
    """
    dataset = data_set(name)
    path, examples = dataset.find(folder, "train"), read_dataset(name, folder, "train", roots=roots)
    named = [split for split, patterns in dataset.files.items() if any(path.match(pattern) for pattern in patterns)]
    if named and "train" not in named:
        raise DataError(f"{path} is the {named[0]} file of {dataset.name}: train on {dataset.files['train'][0]}")
    if dataset.split_of:
        claims = {dataset.split_of(example): example.id for example in reversed(examples)}
        others = sorted(set(claims) - {None, "train"})
        if "test" in others or (others and "train" not in claims):
            first = f"(id {claims[others[-1]]})"
            raise DataError(f"{path} holds questions of the {others[-1]} split {first}: train on the training file alone")
    ids = hashlib.sha256(",".join(sorted(example.id for example in examples)).encode()).hexdigest()
    if ids == dataset.test_ids:
        raise DataError(f"{path} holds the questions of {dataset.title}'s test set: train on the training file")
    if "test" in dataset.files:
        try:
            beside = dataset.find(Path(folder) if Path(folder).is_dir() else path.parent, "test")
        except DataError:  # there is no test file
            beside = None
        if beside:
            asked = {_key(example, dataset) for example in read_dataset(name, beside, "test", roots=roots)}
            if shared := [example.id for example in examples if _key(example, dataset) in asked]:
                raise DataError(
                    f"{path} and {beside} share {len(shared)} questions (id {shared[0]}): train on none of the test's"
                )
    check_pictures(examples, path, skip_corrupt=skip_corrupt)
    return examples


def _key(example: Example, dataset: DataSet) -> tuple:
    """When two rows ask the same; where the published files share questions, only with the same id."""
    return (example.meta.get("image"), example.question, example.id if dataset.repeats else None)


def check_pictures(examples: Sequence[Example], path: Path, *, skip_corrupt: bool = False) -> None:
    """Raises DataError where examples that name an image have none: no folder for any, or files that are not there."""
    named = [example for example in examples if "image" in example.meta]
    if any(example.image is None for example in named):
        raise DataError(f"{path} names images, but there is no folder images or imgs beside it: put them there")
    there = {image: image.is_file() for image in {example.image for example in named}}
    lost = sorted(str(image) for image, found in there.items() if not found)
    if lost and (len(lost) == len(there) or not skip_corrupt):
        way = "look at the folder" if len(lost) == len(there) else "add them, or leave them out with --skip-corrupt"
        raise DataError(f"{len(lost)} of the {len(there)} images of {path} are missing ({lost[0]}): {way}")
