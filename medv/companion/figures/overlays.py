"""Where it looked, to be seen: the maps of `medv.evaluation.attribution` by word, as colors over a picture.

Orange: without this region the word becomes less probable; blue: more probable. One scale serves all words of an answer.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from medv.companion.figures.plots import draw_image
from medv.companion.figures.traces import Word
from medv.evaluation.attribution import Attribution

FOR, AGAINST = "#ff7f0e", "#1f77ff"
OPAQUE = 0.65  # of the color at the end of the scale
LEAST = 0.05  # nats: less is not shown as an effect, and the end of the scale is not below it


@dataclass(frozen=True)
class WordMap:
    """A word of an answer, the positions of its tokens, and its drops float32 [rows, columns] in nats."""

    text: str
    positions: tuple[int, ...]
    drops: np.ndarray

    @property
    def strongest(self) -> tuple[int, int] | None:
        """Row and column of the region with the largest drop; None where no drop reaches `LEAST`."""
        if self.drops.max() < LEAST:
            return None
        row, column = np.unravel_index(int(self.drops.argmax()), self.drops.shape)
        return int(row), int(column)

    @property
    def told(self) -> str:
        """The map in a sentence."""
        low, high = (f"{round(float(value), 2) + 0.0:+.2f}" for value in (self.drops.min(), self.drops.max()))
        if self.strongest is None:
            return f"{self.text}: no region matters by itself ({low} to {high} nats)"
        return f"{self.text}: most from {region_name(*self.strongest, *self.drops.shape)} ({high} nats); all regions from {low}"


def word_maps(found: Attribution, word: Word) -> list[WordMap]:
    """The words of an answer, each with the sum of the maps of its tokens; a token that begins with a space begins a word."""
    groups: list[list[int]] = []
    for place, event in enumerate(found.events):
        if not groups or word(event.token).startswith((" ", "↵")):
            groups.append([])
        groups[-1].append(place)
    return [
        WordMap(
            "".join(word(found.events[place].token) for place in group).strip(),
            tuple(found.events[place].position for place in group),
            found.drops[group].sum(dim=0).numpy(),
        )
        for group in groups
    ]


def region_name(row: int, column: int, rows: int, columns: int) -> str:
    """ "upper left", "lower middle" ... of the picture, by thirds, with row and column from 1."""
    down, across = (min(int(3 * (place + 0.5) / count), 2) for place, count in ((row, rows), (column, columns)))
    name = f"{('upper', 'middle', 'lower')[down]} {('left', 'center', 'right')[across]}"
    return f"the {name}, row {row + 1} column {column + 1}"


def limit_of(maps: Sequence[WordMap]) -> float:
    """The end of the scale in nats: the largest absolute drop, at least `LEAST`."""
    return max([LEAST, *(float(np.abs(each.drops).max()) for each in maps)])


def colored(drops: np.ndarray, limit: float) -> np.ndarray:
    """RGBA in 0 .. 1 of a map, [rows, columns, 4]; opacity grows with the absolute drop."""
    share = np.clip(drops / limit, -1, 1)[..., None]
    colors = np.where(share > 0, mpl.colors.to_rgb(FOR), mpl.colors.to_rgb(AGAINST))
    return np.concatenate([colors, OPAQUE * np.abs(share)], axis=-1)


def overlay_png(drops: np.ndarray, limit: float) -> bytes:
    """`colored` as a PNG of one pixel a region."""
    stream = io.BytesIO()
    Image.fromarray((255 * colored(drops, limit)).round().astype(np.uint8), "RGBA").save(stream, "PNG", optimize=True)
    return stream.getvalue()


def draw_overlay(ax: Axes, picture: Image.Image, drops: np.ndarray, limit: float) -> None:
    """The picture with a map [rows, columns] over it and a frame around the region with the largest drop."""
    draw_image(ax, picture)
    width, height = picture.size
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(colored(drops, limit), extent=extent, interpolation="nearest", zorder=2)
    row, column = np.unravel_index(int(drops.argmax()), drops.shape)
    step = height / drops.shape[0], width / drops.shape[1]
    corner = (column * step[1] - 0.5, row * step[0] - 0.5)
    for color, line in (("black", 2.4), ("white", 1.0)):
        ax.add_patch(mpl.patches.Rectangle(corner, step[1], step[0], fill=False, edgecolor=color, lw=line, zorder=3))
