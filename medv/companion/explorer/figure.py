"""The static twin of the explorer: a sweep over Z of one question as a figure, for papermill, print and the index page.

Outcomes in, figure and frame out; nothing is asked here. Each point is one answer, so there is no interval to draw.
"""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from medv.companion.explorer.session import MEASURES, Outcome, cells
from medv.companion.figures.plots import MUTED, PALETTE, theme
from medv.companion.figures.traces import Word
from medv.companion.figures.tutorial import flow

WIDTH = 142  # characters of a strip
OPEN, MARK = "#c9cdd2", "#ffd54d"
CONFIDENCE = mpl.colors.LinearSegmentedColormap.from_list("confidence", ["#f6a97a", "#8fc3ea"])

Strip = tuple[str, list[tuple[str, str, str]]]  # label, (token, ground, edge) of each box


def explorer_figure(picture: Image.Image, outcomes: Sequence[Outcome], word: Word) -> tuple[Figure, pd.DataFrame]:
    """A picture, how one answer to it was unmasked, three answers with their repetitions marked, and all runs against Z.

    `outcomes` differ in Z. Returns the figure and the runs, one row each. Raises ValueError where there is no outcome.
    """
    if not outcomes:
        raise ValueError("there is no run to draw: give at least one outcome")
    runs = sorted(outcomes, key=lambda outcome: outcome.setting.steps)
    shown = runs[len(runs) // 2]
    moments = sorted({max(1, round(shown.frames * share)) for share in (0.25, 0.5, 1.0)})
    strips = [_canvas_strip(shown, moment, word) for moment in moments]
    strips += [_answer_strip(runs[place]) for place in sorted({0, len(runs) // 2, len(runs) - 1})]
    lines = sum(flow([token for token, *_ in boxes], WIDTH)[1] + 1.5 for _, boxes in strips)
    with theme():
        fig = Figure(figsize=(12, 2.6 + 0.2 * lines), layout="constrained")
        upper, lower = fig.subfigures(2, 1, height_ratios=[0.2 * lines, 2.6])
        places = [["picture", "strips"], ["scale", "strips"], ["nothing", "strips"]]
        tall = 0.2 * lines / 12 * 5.6  # the height of the strips in widths of the left column
        ratios = {"width_ratios": [1, 4.6], "height_ratios": [1.15, 0.05, max(tall - 1.2, 0.05)]}
        axes = upper.subplot_mosaic(places, gridspec_kw=ratios)
        axes["nothing"].set_axis_off()
        axes["picture"].imshow(np.asarray(picture), interpolation="nearest")
        axes["picture"].set_axis_off()
        axes["picture"].set_title(shown.answer.question[:60], fontsize=9, wrap=True, parse_math=False)
        scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), CONFIDENCE)
        upper.colorbar(scale, cax=axes["scale"], orientation="horizontal", ticks=[0, 0.5, 1])
        axes["scale"].set_title("confidence when written", fontsize=8, weight="normal")
        _draw_strips(axes["strips"], strips)
        frame = pd.DataFrame([outcome.row() for outcome in runs])
        for ax, (measure, label) in zip(lower.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
            ax.plot(frame["steps"], frame[measure], marker="o", ms=4, lw=1.5, color=PALETTE[0])
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
            ax.set(xlabel="Z, steps", ylabel=label)
            ax.set_ylim(bottom=0)
    return fig, frame


def _canvas_strip(outcome: Outcome, moment: int, word: Word) -> Strip:
    final = [word(token).strip() or "·" for token in outcome.trace.replay(10**9)[: max(outcome.answer.tokens, 1)]]
    boxes = []
    for token, cell in zip(final, cells(outcome.trace, moment), strict=False):
        masked = cell.state in ("open", "lost")
        ground = OPEN if masked else mpl.colors.to_hex(CONFIDENCE(cell.confidence))
        boxes.append((" " * len(token) if masked else token, ground, "#1b1b1b" if cell.state == "fresh" else "none"))
    return f"Z = {outcome.setting.steps}: the canvas after {moment} of {outcome.frames} forwards", boxes


def _answer_strip(outcome: Outcome) -> Strip:
    words = [(text, MARK if again else "none", "none") for part, again in outcome.parts for text in part.split()]
    numbers = f"{outcome.answer.forwards} forwards, {outcome.repetition:.0f} % of the words repeated (marked)"
    return f"The answer at Z = {outcome.setting.steps}: {numbers}", words or [("(an empty answer)", "none", "none")]


def _draw_strips(ax: Axes, strips: Sequence[Strip]) -> None:
    """Label and boxes of each strip, one below the other."""
    top = 0.0
    for label, boxes in strips:
        places, lines = flow([token for token, *_ in boxes], WIDTH)
        ax.text(0, top + 0.15, label, fontsize=8.5, color=MUTED, va="bottom", weight="bold", parse_math=False)
        for (x, line), (token, ground, edge) in zip(places, boxes, strict=True):
            y, size = top + line + 0.7, len(token) + 0.6
            ax.barh(y, size, left=x, height=0.84, color=ground, edgecolor=edge, lw=0.8)
            style = {"fontsize": 7.4, "family": "DejaVu Sans Mono", "parse_math": False}
            ax.text(x + size / 2, y, token, ha="center", va="center", **style)
        top += lines + 1.5
    ax.set(xlim=(0, WIDTH), ylim=(top, -0.4))
    ax.set_axis_off()
