"""One type for every training and test example of any data set: an image (or none) and a dialogue about it."""

import dataclasses
import hashlib
import json
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Turn:
    """One message: `role` is "user" or "assistant"; `text` never contains the image placeholder."""

    role: str
    text: str

    def __post_init__(self):
        if self.role not in ("user", "assistant"):
            raise ValueError(f"unknown role {self.role!r}: a turn is by the user or by the assistant")


@dataclass(frozen=True)
class Example:
    """An image and the turns about it.

    `image` is None (text only), a path, or a function that draws a PIL image when called (phantoms are drawn, not stored).
    `answer_type` is "OPEN" or "CLOSED" for question answering, else None. `meta` keeps the other fields of the data set.
    """

    id: str
    image: Path | Callable[[], Image.Image] | None
    turns: tuple[Turn, ...]
    answer_type: str | None = None
    meta: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def question(self) -> str:
        """The first user turn."""
        return next(turn.text for turn in self.turns if turn.role == "user")

    @property
    def answer(self) -> str:
        """The last assistant turn."""
        return next(turn.text for turn in reversed(self.turns) if turn.role == "assistant")

    @property
    def drawn(self) -> bool:
        """Whether the image is a phantom, whatever the data set is called."""
        return callable(self.image) or "scene" in self.meta

    @property
    def domain(self) -> str:
        """The domain of the image, as a phantom's scene or its data set names it; "" where neither does."""
        return self.meta["scene"].domain if "scene" in self.meta else str(self.meta.get("domain", ""))


def load_image(example: Example) -> Image.Image:
    """The RGB image of an example, drawn or read; raises ValueError where it has none or cannot be read."""
    if example.image is None:
        raise ValueError(f"example {example.id} has no image: give the folder with the images of this data set")
    if callable(example.image):
        return example.image()
    from medv.data.images import open_image  # here, so that phantoms do not load the readers of file formats

    return open_image(example.image)


def picture_of(example: Example) -> Image.Image | None:
    """As `load_image`, and None where the example has no image."""
    return None if example.image is None else load_image(example)


def contents(examples: Iterable[Example]) -> dict[str, str]:
    """The identity of data, independent of paths: the sha256 of the `rows` (ids and turns) and of the `images`, in order.

    A drawn image counts as its function with the arguments, or as its pixels where the arguments are unknown. A file that
    cannot be read is a content of its own; opening it raises the error.
    """
    rows, images = hashlib.sha256(), hashlib.sha256()
    file = cache(_file_digest)  # for this call alone, so that a changed file is read anew
    for example in examples:
        turns = [[turn.role, turn.text] for turn in example.turns]
        rows.update(json.dumps([example.id, turns]).encode() + b"\n")
        images.update((file(example.image) if isinstance(example.image, Path) else _drawn_digest(example.image)) + b"\n")
    return {"rows": rows.hexdigest(), "images": images.hexdigest()}


def _file_digest(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
            return b"no file"
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError:
        return b"unreadable"


def _drawn_digest(image: Callable[[], Image.Image] | None) -> bytes:
    if image is None:
        return b"none"
    if isinstance(image, partial) and not image.keywords:
        drawn = [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in image.args]
        return json.dumps([image.func.__qualname__, drawn]).encode()
    picture = image()
    return hashlib.sha256(repr((picture.mode, picture.size)).encode() + picture.tobytes()).digest()
