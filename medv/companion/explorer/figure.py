"""The static twin of the explorer: a sweep over Z of one question as a figure, for papermill, print and the index page.

Outcomes in, figure and frame out. Each point is one answer, so there is no interval to draw.
"""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from medv.companion.explorer.session import MEASURES, Outcome
from medv.companion.figures import traces
from medv.companion.figures.plots import INK, PALETTE, theme
from medv.companion.figures.words import AGAIN, Strip, Word, draw_strips, strips_height, token_box

COLUMNS = 142  # characters of a strip
OPEN = "#c9cdd2"
CONFIDENCE = mpl.colors.LinearSegmentedColormap.from_list("confidence", ["#f6a97a", "#8fc3ea"])


def explorer_figure(picture: Image.Image, outcomes: Sequence[Outcome], word: traces.Word) -> tuple[Figure, pd.DataFrame]:
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
    height = strips_height(strips, COLUMNS)
    with theme():
        fig = Figure(figsize=(12, 2.6 + height), layout="constrained")
        upper, lower = fig.subfigures(2, 1, height_ratios=[height, 2.6])
        tall = height / 12 * 5.6  # the height of the strips in widths of the left column
        ratios = {"width_ratios": [1, 4.6], "height_ratios": [1.15, 0.05, max(tall - 1.2, 0.05)]}
        axes = upper.subplot_mosaic([["picture", "strips"], ["scale", "strips"], ["nothing", "strips"]], gridspec_kw=ratios)
        axes["nothing"].set_axis_off()
        axes["picture"].imshow(np.asarray(picture), interpolation="nearest")
        axes["picture"].set_axis_off()
        axes["picture"].set_title(shown.answer.question[:60], fontsize=9, wrap=True, parse_math=False)
        scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), CONFIDENCE)
        upper.colorbar(scale, cax=axes["scale"], orientation="horizontal", ticks=[0, 0.5, 1])
        axes["scale"].set_title("confidence when written", fontsize=8, weight="normal")
        draw_strips(axes["strips"], strips, COLUMNS)
        frame = pd.DataFrame([outcome.row() for outcome in runs])
        for ax, (measure, label) in zip(lower.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
            ax.plot(frame["steps"], frame[measure], marker="o", ms=4, lw=1.5, color=PALETTE[0])
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
            ax.set(xlabel="Z, steps", ylabel=label)
            ax.set_ylim(bottom=0)
    return fig, frame


def _canvas_strip(outcome: Outcome, moment: int, word: traces.Word) -> Strip:
    final = [word(token).strip() or "·" for token in outcome.trace.replay(10**9)[: max(outcome.answer.tokens, 1)]]
    boxes = []
    for token, cell in zip(final, outcome.canvas(moment), strict=False):
        color = mpl.colors.to_hex(CONFIDENCE(cell.confidence))
        box = token_box(token, cell.state in ("open", "lost"), color, OPEN)
        boxes.append(box._replace(edge=INK if cell.state == "fresh" else "none"))
    return f"Z = {outcome.setting.steps}: the canvas after {moment} of {outcome.frames} forwards", boxes


def _answer_strip(outcome: Outcome) -> Strip:
    words = [Word(text, AGAIN if again else "none") for part, again in outcome.parts for text in part.split()]
    numbers = f"{outcome.answer.forwards} forwards, {outcome.repetition:.0f} % of the words repeated (marked)"
    return f"The answer at Z = {outcome.setting.steps}: {numbers}", words or [Word("(an empty answer)")]
