"""What a set of examples is, by its contents: the identity of data, wherever its files lie and whatever they are called."""

import dataclasses
import hashlib
import json
import stat
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

from PIL import Image

from medv.data.example import Example


def contents(examples: Iterable[Example]) -> dict[str, str]:
    """The sha256 of the `rows` (ids and turns, in order) and of the `images` (the bytes of each file, in order).

    A picture that a function draws counts as that function with its arguments, or, of a function of unknown arguments, as
    its pixels. A file that cannot be read is a content of its own: whoever opens it says what is wrong.
    """
    rows, images = hashlib.sha256(), hashlib.sha256()
    file = cache(_file)  # for this call alone, so that a file that was changed since is read anew
    for example in examples:
        turns = [[turn.role, turn.text] for turn in example.turns]
        rows.update(json.dumps([example.id, turns]).encode() + b"\n")
        images.update((file(example.image) if isinstance(example.image, Path) else _drawn(example.image)) + b"\n")
    return {"rows": rows.hexdigest(), "images": images.hexdigest()}


def _file(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
            return b"no file"
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError:
        return b"unreadable"


def _drawn(image: Callable[[], Image.Image] | None) -> bytes:
    if image is None:
        return b"none"
    if isinstance(image, partial) and not image.keywords:
        drawn = [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in image.args]
        return json.dumps([image.func.__qualname__, drawn]).encode()
    picture = image()
    return hashlib.sha256(repr((picture.mode, picture.size)).encode() + picture.tobytes()).digest()
