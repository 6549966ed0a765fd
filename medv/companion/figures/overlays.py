"""Where it looked, to be seen: the maps of `medv.evaluation.attribution` by word, as colors over a picture.

Orange: without this region the word becomes less probable; blue: more probable. One scale serves all words of an answer.
"""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from medv.companion.figures.plots import MUTED, draw_bars, draw_image, drawing
from medv.companion.figures.traces import Word
from medv.diffusion.trace import Events
from medv.evaluation.attribution import Attribution
from medv.intervals import NOT_MEASURED

FOR, AGAINST = "#ff7f0e", "#1f77ff"
OPAQUE = 0.65  # of the color at the end of the scale
LEAST = 0.05  # nats: less is not shown as an effect, and the end of the scale is not below it


@dataclass(frozen=True)
class WordMap:
    """A word of an answer, the positions of its tokens, and its drops float32 [rows, columns] in nats; None if it was given."""

    text: str
    positions: tuple[int, ...]
    drops: np.ndarray | None

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


def word_maps(found: Attribution, word: Word, fixed: Events = ()) -> list[WordMap]:
    """The words of an answer, each with the sum of the maps of its tokens; a token that begins with a space begins a word.

    fixed: tokens that were given and not written; a word of these alone has no map.
    """
    maps = {event.position: (event.token, drops.numpy()) for event, drops in zip(found.events, found.drops, strict=True)}
    maps |= {event.position: (event.token, None) for event in fixed}
    groups: list[list[int]] = []
    for position in sorted(maps):
        starts = word(maps[position][0]).startswith((" ", "↵"))
        if starts or not groups or groups[-1][-1] != position - 1:
            groups.append([])
        groups[-1].append(position)
    words = []
    for group in groups:
        text = "".join(word(maps[position][0]) for position in group).strip()
        known = [drops for position in group if (drops := maps[position][1]) is not None]
        words.append(WordMap(text, tuple(group), np.sum(known, axis=0) if known else None))
    return words


def region_name(row: int, column: int, rows: int, columns: int) -> str:
    """ "upper left", "lower middle" ... of the picture, by thirds, with row and column from 1."""
    down, across = (min(int(3 * (place + 0.5) / count), 2) for place, count in ((row, rows), (column, columns)))
    name = f"{('upper', 'middle', 'lower')[down]} {('left', 'center', 'right')[across]}"
    return f"the {name}, row {row + 1} column {column + 1}"


def limit_of(maps: Sequence[WordMap]) -> float:
    """The end of the scale in nats: the largest absolute drop, at least `LEAST`."""
    return max([LEAST, *(float(np.abs(each.drops).max()) for each in maps if each.drops is not None)])


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
    """The picture with a map [rows, columns] over it; a frame around the region with the largest drop if it reaches `LEAST`."""
    draw_image(ax, picture)
    width, height = picture.size
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(colored(drops, limit), extent=extent, interpolation="nearest", zorder=2)
    if drops.max() < LEAST:
        return
    row, column = np.unravel_index(int(drops.argmax()), drops.shape)
    step = height / drops.shape[0], width / drops.shape[1]
    corner = (column * step[1] - 0.5, row * step[0] - 0.5)
    for color, line in (("black", 2.4), ("white", 1.0)):
        ax.add_patch(mpl.patches.Rectangle(corner, step[1], step[0], fill=False, edgecolor=color, lw=line, zorder=3))


def overlay_figure(shown: Sequence[tuple[Image.Image, np.ndarray, str, np.ndarray | None]], title: str) -> Figure:
    """Pictures with a map over each, its caption, and the outline of a mask where there is one; three in a row.

    shown: (picture, drops [rows, columns] in nats, caption, mask bool [H, W] or None). Each map has its own scale, which ends
    at its largest absolute drop.
    """
    columns, rows = min(3, max(1, len(shown))), max(1, -(-len(shown) // 3))
    with drawing(3.2 * columns, 3.6 * rows, title, nrows=rows, ncols=columns, squeeze=False) as (fig, axes):
        for ax in axes.flat:
            ax.set_axis_off()
        if not shown:
            axes.flat[0].text(0.5, 0.5, "no answer names anything", ha="center", color=MUTED)
        for ax, (picture, drops, caption, mask) in zip(axes.flat, shown, strict=False):
            draw_overlay(ax, picture, drops, max(LEAST, float(np.abs(drops).max())))
            if mask is not None:
                ax.contour(mask, levels=[0.5], colors="white", linewidths=1.6, zorder=4)
                ax.contour(mask, levels=[0.5], colors="black", linewidths=0.8, linestyles="dashed", zorder=5)
            text = f"{textwrap.fill(caption, 44)}\nlargest drop {drops.max():+.2g} nats"
            style = {"ha": "center", "va": "top", "fontsize": 8, "parse_math": False}
            ax.text(0.5, -0.03, text, transform=ax.transAxes, **style)
    return fig


def pointing_figure(rates: pd.DataFrame, title: str) -> Figure:
    """Grouped bars of hit rates and their baselines. rates: words, system, value, low, high (percent)."""
    frame = rates.rename(columns={"words": "metric"})
    with drawing(10.5, 4.0) as (fig, ax):
        if frame["value"].isna().all():
            ax.text(0.5, 0.5, NOT_MEASURED, transform=ax.transAxes, ha="center", color=MUTED)
        draw_bars(ax, frame)
        ax.set(title=title, ylabel="regions on the lesion (%)", ylim=(0, 105))
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=5)
    return fig
