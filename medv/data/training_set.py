"""The examples to train on: a data set's training rows, none of another split among them, all with their pictures.

Nothing here trains. What is refused would otherwise train in silence on test questions, or on texts alone. Which split a row
belongs to is told by the published files: the name of the file, the marks in `phrase_type` (VQA-RAD in one file), the folder
of the image (PathVQA), the number of the question (SLAKE), the same question in the test file that lies beside it, and, for a
VQA-RAD test file under another name, its question numbers.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from medv.data.example import Example
from medv.data.readers import FILES, find_file, read_dataset, root_of, same_name
from medv.reading import DataError

_SLAKE_SPLITS = {"train": range(9835), "validation": range(9835, 11934), "test": range(11934, 14028)}
"""Question numbers of the published SLAKE."""
_SLAKE_IMAGE = re.compile(r"xmlab\d+/")
_RAD_TEST = "fbe3a5480ce22d6d1843bbe9aea3f7a0c3be2aecd73988cf44b7d6e77a171ac7"
"""The sha256 of the sorted question numbers of VQA-RAD's test set, joined by commas."""


def read_training_set(
    name: str, folder: str | Path, *, roots: Sequence[Path] = (), skip_corrupt: bool = False
) -> list[Example]:
    """The training examples of a published data set in `folder` (or one of its files), with their images, which may be links
    into the folders `roots`.

    Raises DataError where rows of another split are among them, and where pictures are missing: all of them, or, unless
    `skip_corrupt`, some.
    """
    name = same_name(name)
    path, examples = find_file(name, folder, "train"), read_dataset(name, folder, "train", roots=roots)
    _check_name(name, path)
    marks = {example.id: _mark(name, example) for example in examples}
    others = sorted({mark for mark in marks.values() if mark not in (None, "train")})
    if "test" in others or (others and "train" not in marks.values()):
        first = next(number for number, mark in marks.items() if mark == others[-1])
        raise DataError(f"{path} holds questions of the {others[-1]} split (id {first}): train on the training file alone")
    if name == "vqa_rad" and _numbers(examples) == _RAD_TEST:
        raise DataError(f"{path} holds the questions of VQA-RAD's test set: train on the training file")
    _check_beside(name, path, folder, examples, roots)
    check_pictures(examples, path, skip_corrupt=skip_corrupt)
    return examples


def _check_name(name: str, path: Path) -> None:
    splits = [split for split, patterns in FILES[name].items() if any(path.match(pattern) for pattern in patterns)]
    if splits and "train" not in splits:
        raise DataError(f"{path} is the {splits[0]} file of {name}: train on {FILES[name]['train'][0]}")


def _mark(name: str, example: Example) -> str | None:
    """The split that a row says it belongs to, if it says so."""
    image = str(example.meta.get("image", ""))
    if name == "pathvqa":
        return {"train": "train", "val": "validation", "test": "test"}.get(image.partition("/")[0])
    if name == "slake" and example.id.isdigit() and _SLAKE_IMAGE.match(image):
        return next((split for split, ids in _SLAKE_SPLITS.items() if int(example.id) in ids), None)
    return None


def _numbers(examples: Sequence[Example]) -> str:
    return hashlib.sha256(",".join(sorted(example.id for example in examples)).encode()).hexdigest()


def _check_beside(name: str, path: Path, folder: str | Path, examples: Sequence[Example], roots: Sequence[Path]) -> None:
    """No question of the test file that lies beside the training file."""
    if "test" not in FILES[name]:
        return
    root = root_of(folder, path)
    try:
        beside = find_file(name, root, "test")
    except DataError:  # there is none
        return
    asked = {_key(name, example) for example in read_dataset(name, beside, "test", roots=roots)}
    if shared := [example.id for example in examples if _key(name, example) in asked]:
        raise DataError(f"{path} and {beside} share {len(shared)} questions (id {shared[0]}): train on none of the test's")


def _key(name: str, example: Example) -> tuple[str, ...]:
    asked = (str(example.meta.get("image")), example.question)
    return asked if name in ("slake", "pathvqa") else (example.id, *asked)  # VQA-RAD's files share one under two ids


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
