"""One type for every training and test example, whatever file it came from: an image (or none) and a dialogue about it."""

from collections.abc import Callable
from dataclasses import dataclass, field
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
    `answer_type` is "OPEN" or "CLOSED" for question answering, else None. `meta` keeps what a data set says beyond that.
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


def load_image(example: Example) -> Image.Image:
    """The RGB picture of an example, drawn or read; raises ValueError where it has none or cannot be read."""
    if example.image is None:
        raise ValueError(f"example {example.id} has no image: give the folder with the images of this data set")
    if callable(example.image):
        return example.image()
    from medv.data.images import open_image  # here, so that phantoms do not load the readers of file formats

    return open_image(example.image)


def picture_of(example: Example) -> Image.Image | None:
    """As `load_image`, and None where the example has no image."""
    return None if example.image is None else load_image(example)
