"""Figures of answers as texts: facts colored, repetitions marked, side by side; and curves of what settings change.

Frames and marked texts in, figures out. What is true and what is repeated is decided by `medv.evaluation`; here it is drawn.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from medv.companion.figures.plots import INK, MUTED, PALETTE, new_figure, theme
from medv.evaluation.repetition import repeated_parts
from medv.intervals import NOT_MEASURED
from medv.phantoms.facts import fact_spans
from medv.phantoms.scene import Scene

TRUE, FALSE, AGAIN = "#0b6b3a", "#b3261e", "#ffe08a"
FACTS, REPEATED = "bold green: a true fact   bold red: a false one", "yellow: said before"
FONT, LINE, WIDTH = 7.2, 0.135, 0.0605
"""Monospaced text: size in points, height of a line and width of a character in inches."""


@dataclass(frozen=True)
class Word:
    """One word to draw. fact: True, False or None where it states none; again: part of a repetition."""

    text: str
    fact: bool | None = None
    again: bool = False


def marked_words(text: str, scene: Scene | None) -> list[Word]:
    """The words of an answer with their marks; without a scene only repetitions are marked."""
    facts = [] if scene is None else fact_spans(text, scene)
    words, place = [], 0
    for part, again in repeated_parts(text):
        for word in part.split():
            start = text.index(word, place)
            place = start + len(word)
            states = [true for first, last, true in facts if first < place and start < last]
            words.append(Word(word, all(states) if states else None, again))
    return words


def _lines(words: Sequence[Word], columns: int) -> list[list[Word]]:
    lines: list[list[Word]] = [[]]
    used = 0
    for word in words:
        shown = Word(word.text if len(word.text) <= columns else word.text[: columns - 1] + "…", word.fact, word.again)
        if used and used + 1 + len(shown.text) > columns:
            lines.append([])
            used = 0
        used += len(shown.text) + (used > 0)
        lines[-1].append(shown)
    return lines


def _draw_words(ax, lines: Sequence[Sequence[Word]], top: float) -> None:
    """Text in an axes whose units are characters and lines."""
    for row, line in enumerate(lines):
        x = 0.0
        for number, word in enumerate(line):
            if word.again:
                follows = number + 1 < len(line) and line[number + 1].again
                size = (len(word.text) + follows, 0.92)
                ax.add_patch(Rectangle((x, top + row + 0.02), *size, color=AGAIN, lw=0))
            color = INK if word.fact is None else TRUE if word.fact else FALSE
            weight = "normal" if word.fact is None else "bold"
            style = {"family": "DejaVu Sans Mono", "fontsize": FONT, "color": color, "weight": weight}
            ax.text(x, top + row + 0.5, word.text, va="center", ha="left", parse_math=False, **style)
            x += len(word.text) + 1


def answers_side_by_side(
    columns: Sequence[tuple[str, str, Scene | None]],
    title: str = "",
    *,
    image: object = None,
    question: str = "",
    per_row: int = 3,
    characters: int = 44,
) -> Figure:
    """Answers in a grid of texts, each under its name: (name, answer, scene). The image and the question stand first."""
    cells = [(name, _lines(marked_words(text, scene) or [Word("(nothing)")], characters)) for name, text, scene in columns]
    rows = [cells[start : start + per_row] for start in range(0, len(cells), per_row)]
    heights = [max(len(lines) for _, lines in row) + 2.2 for row in rows]
    left = 1.7 if image is not None else 0.0
    inches = max(sum(heights) * LINE + 0.1, 1.6 if image is not None else 0)
    with theme():
        width = left + min(per_row, len(cells)) * (characters + 3) * WIDTH
        fig = Figure(figsize=(width, inches + 0.75), layout="none")  # axes are placed by hand
        ax = fig.add_axes((left / width, 0.0, 1 - left / width, inches / (inches + 0.75)))
        ax.set(xlim=(0, (width - left) / WIDTH), ylim=(inches / LINE, 0))
        ax.set_axis_off()
        for row, top in zip(rows, np.concatenate([[0], np.cumsum(heights)]), strict=False):
            for number, (name, lines) in enumerate(row):
                cell = fig.add_axes(ax.get_position(), label=f"{top}-{number}")
                cell.set(xlim=(-number * (characters + 3), (width - left) / WIDTH - number * (characters + 3)))
                cell.set(ylim=ax.get_ylim())
                cell.set_axis_off()
                cell.text(0, top + 0.5, name, fontsize=8, weight="bold", va="center", parse_math=False)
                _draw_words(cell, lines, top + 1.2)
        known = any(scene is not None for _, _, scene in columns)  # real images come without a list of facts
        _head(fig, title, question, width, f"{FACTS}   {REPEATED}" if known else REPEATED)
        if image is not None:
            shown = fig.add_axes((0.01, (inches - 1.55) / (inches + 0.75), 1.5 / width, 1.5 / (inches + 0.75)))
            shown.imshow(np.asarray(image), interpolation="nearest")
            shown.set_axis_off()
    return fig


def _head(fig: Figure, title: str, question: str, width: float, legend: str) -> None:
    """Title, question and legend above the texts."""
    tall = fig.get_figheight()
    wide = max(30, int(width / 0.085))
    fig.text(0.01, 1 - 0.04 / tall, textwrap.shorten(title, wide), fontsize=11, weight="bold", va="top", parse_math=False)
    asked = textwrap.shorten(f"asked: {question}", int(wide * 1.25)) if question else ""
    fig.text(0.01, 1 - 0.27 / tall, asked, fontsize=8, va="top", parse_math=False)
    fig.text(0.01, 1 - 0.45 / tall, legend, fontsize=7.5, color=MUTED, va="top")


def setting_curves(
    frame: pd.DataFrame, x: str, title: str = "", *, xlabel: str, names: dict[str, str], hue: str | None = None
) -> Figure:
    """One panel per metric against a setting, with 95 % intervals as bars. frame: x, metric, value, low, high (and hue).

    names: metric -> the label of its axis.
    """
    groups = [(None, frame)] if hue is None else list(frame.groupby(hue, sort=False))
    with theme():
        fig, axes = new_figure(2.9 * len(names), 3.1, ncols=len(names), squeeze=False)
        for ax, (metric, label) in zip(axes.flat, names.items(), strict=True):
            for color, (name, rows) in zip(PALETTE, groups, strict=False):
                part = rows[rows["metric"] == metric].sort_values(x)
                around = np.abs(part[["low", "high"]].to_numpy(float).T - part["value"].to_numpy(float))
                ax.errorbar(part[x], part["value"], yerr=around, marker="o", ms=4, lw=1.6, capsize=3, color=color, label=name)
            if frame[frame["metric"] == metric]["value"].isna().all():
                ax.text(0.5, 0.5, NOT_MEASURED, transform=ax.transAxes, ha="center", color=MUTED)
            ax.set_xscale("log", base=2)
            ticks = sorted(frame[x].unique())
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.minorticks_off()
            ax.set(xlabel=xlabel, title=label, ylim=(0, None))
        if hue is not None:
            handles, labels = axes.flat[-1].get_legend_handles_labels()
            fig.legend(handles, labels, loc="outside right center", title=hue)
        fig.suptitle(title, fontsize=11, fontweight="bold")
    return fig
