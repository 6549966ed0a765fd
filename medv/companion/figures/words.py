"""Tokens and words in a figure: a canvas while it is unmasked, a sentence while it is masked, answers with their marks."""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from medv.companion.figures.plots import INK, MUTED, draw_image, drawing, theme
from medv.companion.figures.traces import word_of
from medv.data.example import Example, picture_of
from medv.diffusion.trace import Trace
from medv.evaluation.text import repeated_parts
from medv.model.processing import MedVProcessor
from medv.phantoms.facts import fact_spans
from medv.phantoms.scene import Scene

TRUE, FALSE, AGAIN = "#0b6b3a", "#b3261e", "#ffe08a"
FACTS, REPEATED = "bold green: a true fact   bold red: a false one", "yellow: said before"
LEGENDS = {True: "true facts green, false red, repetitions yellow", False: "repetitions yellow"}
"""For captions: with the known facts of a phantom, and without."""
WRITTEN, FRESH = "#dcebf7", "#fbd9a6"
LINE, CHARACTER = 0.135, 0.0605
"""Height of a line and width of a character of an answer, in inches."""
ANSWER_COLUMNS, CANVAS_COLUMNS = 58, 92

State = tuple[str, list[str], list[bool], list[bool]]  # of a canvas: label, tokens, masked, just written


class Word(NamedTuple):
    """A word or token to draw, with the colors of its box, its edge and its letters."""

    text: str
    fill: str = "none"
    edge: str = "none"
    ink: str = INK
    bold: bool = False


Strip = tuple[str, list[Word]]


def token_box(token: str, masked: bool, fill: str = WRITTEN, cover: str = INK) -> Word:
    """A token in a box of `fill`, or covered where it is masked."""
    return Word(" " * len(token), cover) if masked else Word(token, fill)


def flow(words: Sequence[Word], columns: float) -> tuple[list[tuple[int, int]], int]:
    """Break words into lines of `columns` characters: (first character, line) of each, and the number of lines."""
    places, x, line = [], 0, 0
    for word in words:
        if x and x + len(word.text) > columns:
            x, line = 0, line + 1
        places.append((x, line))
        x += len(word.text) + 1
    return places, line + 1


def draw_words(
    ax: Axes, words: Sequence[Word], columns: float, *, left: float = 0, top: float = 0, size: float = 7.4, pad: float = 0.7
) -> int:
    """Draw monospaced words on axes in units of characters and lines (y downwards), a word that is longer than a line cut;
    returns the number of lines.

    size: of the letters, in points; pad: how much wider than its text a box is, in characters (1 joins neighbors).
    """
    words = [w._replace(text=w.text[: int(columns) - 1] + "…") if len(w.text) > columns else w for w in words]
    places, lines = flow(words, columns)
    for (x, line), word in zip(places, words, strict=True):
        x, y, width = left + x, top + line, len(word.text)
        ax.add_patch(Rectangle((x - pad / 2, y + 0.07), width + pad, 0.86, facecolor=word.fill, edgecolor=word.edge, lw=0.8))
        style = {"family": "DejaVu Sans Mono", "fontsize": size, "weight": "bold" if word.bold else "normal"}
        ax.text(x + width / 2, y + 0.5, word.text, color=word.ink, ha="center", va="center", parse_math=False, **style)
    return lines


def draw_strips(ax: Axes, strips: Sequence[Strip], columns: int) -> None:
    """Draw strips of words below each other, each under its label; `strips_height` is the height that they need."""
    top = 0.0
    for label, words in strips:
        ax.text(0, top + 0.15, label, fontsize=8.5, color=MUTED, va="bottom", weight="bold", parse_math=False)
        top += draw_words(ax, words, columns, top=top + 0.2) + 1.5
    ax.set(xlim=(-0.5, columns + 0.5), ylim=(top, -0.4))
    ax.set_axis_off()


def strips_height(strips: Sequence[Strip], columns: int) -> float:
    """The height of strips in inches."""
    return 0.2 * sum(flow(words, columns)[1] + 1.5 for _, words in strips)


def tokens_of(processor: MedVProcessor, ids: Sequence[int]) -> list[str]:
    """The texts of tokens without their spaces."""
    return [word.strip() or "·" for word in map(word_of(processor.tokenizer), ids)]


# --- Masked text ---


def masked_strip(rows: Sequence[tuple[str, Sequence[str], Sequence[bool]]], title: str = "") -> Figure:
    """The same tokens at several times, one line each. rows: (label, tokens, masked); a masked token is covered."""
    counts = {len(tokens) for _, tokens, _ in rows} | {len(masked) for _, _, masked in rows}
    if len(counts) != 1:
        raise ValueError(f"the rows of a strip differ in length: {sorted(counts)}")
    width = sum(len(token) + 1 for token in rows[0][1])
    with drawing(max(6.0, width * 0.1 + 1), 0.3 * len(rows) + 0.5) as (fig, ax):
        for line, (_, tokens, masked) in enumerate(rows):
            words = [token_box(token, hidden) for token, hidden in zip(tokens, masked, strict=True)]
            draw_words(ax, words, math.inf, top=line - 0.5)
        ax.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        ax.set(ylim=(len(rows) - 0.4, -0.6), xlim=(-0.5, width), xticks=[], title=title)
        ax.grid(False)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    return fig


def canvas_states(trace: Trace, processor: MedVProcessor, length: int, forwards: Sequence[int]) -> list[State]:
    """The first `length` positions of the canvas after so many forwards: (label, tokens, masked, written since the last)."""
    final = tokens_of(processor, trace.replay(10**9)[:length])
    states, before = [], [True] * length
    for number in forwards:
        masked = [token == trace.mask_token_id for token in trace.replay(number - 1)[:length]]
        fresh = [was and not now for was, now in zip(before, masked, strict=True)]
        states.append((f"{number} forwards: {length - sum(masked)} of {length} tokens", final, masked, fresh))
        before = masked
    return states


def canvas_figure(image, question: str, states: Sequence[State]) -> Figure:
    """The image beside its canvas at several moments: dark = masked, blue = written, orange = just written."""
    strips = []
    for label, *columns in states:
        boxes = [token_box(token, masked, FRESH if new else WRITTEN) for token, masked, new in zip(*columns, strict=True)]
        strips.append((label, boxes))
    tall = max(2.6, strips_height(strips, CANVAS_COLUMNS))
    with drawing(11.5, tall, ncols=2, gridspec_kw={"width_ratios": [1, 3.6]}) as (fig, (left, right)):
        draw_image(left, image)
        left.set_anchor("N")
        left.set_title(question, fontsize=9, wrap=True, parse_math=False)
        draw_strips(right, strips, CANVAS_COLUMNS)
    return fig


def canvas_frame(states: Sequence[State]) -> pd.DataFrame:
    """What `canvas_figure` draws: state, position, token, masked, just_written."""
    columns = ("token", "masked", "just_written")
    frames = [pd.DataFrame({"state": label} | dict(zip(columns, state, strict=True))) for label, *state in states]
    frame = pd.concat(frames)
    frame.insert(1, "position", frame.index)
    return frame


# --- Answers ---


def marked_words(text: str, scene: Scene | None) -> list[Word]:
    """The words of an answer: facts in bold, green or red; repetitions on yellow. Without a scene no fact is known."""
    facts = [] if scene is None else fact_spans(text, scene)
    words, place = [], 0
    for part, again in repeated_parts(text):
        for word in part.split():
            start = text.index(word, place)
            place = start + len(word)
            states = [true for first, last, true in facts if first < place and start < last]
            ink = INK if not states else TRUE if all(states) else FALSE
            words.append(Word(word, AGAIN if again else "none", ink=ink, bold=bool(states)))
    return words


def compared_answers(rows: pd.DataFrame, example: Example, title: str) -> Figure:
    """Answers to one request, two in a row, with its image and question. rows: name, text, score (percent or empty), words."""
    scene, picture = example.meta.get("scene"), picture_of(example)
    cells, unit = [], "score" if scene is None else "facts"
    for row in rows.itertuples(index=False):
        name = f"{row.name}: {row.words} words" + ("" if np.isnan(row.score) else f", {unit} {row.score:.0f}")
        words = marked_words(row.text, scene) or [Word("(nothing)")]
        cells.append((name, words))
    grid = [cells[start : start + 2] for start in range(0, len(cells), 2)]
    heights = [max(flow(words, ANSWER_COLUMNS)[1] for _, words in line) + 2.2 for line in grid]
    left = 1.7 if picture is not None else 0.0
    inches = max(sum(heights) * LINE + 0.1, 1.6 if picture is not None else 0)
    width, tall = left + len(grid[0]) * (ANSWER_COLUMNS + 3) * CHARACTER, inches + 0.75
    with theme():
        fig = Figure(figsize=(width, tall), layout="none")  # axes are placed by hand
        ax = fig.add_axes((left / width, 0.0, 1 - left / width, inches / tall))
        ax.set(xlim=(-0.5, (width - left) / CHARACTER - 0.5), ylim=(inches / LINE, 0))
        ax.set_axis_off()
        top = 0.0
        for line, height in zip(grid, heights, strict=True):
            for start, (name, words) in zip((0, ANSWER_COLUMNS + 3), line, strict=False):
                ax.text(start, top + 0.5, name, fontsize=8, weight="bold", va="center", parse_math=False)
                draw_words(ax, words, ANSWER_COLUMNS, left=start, top=top + 1.2, size=7.2, pad=1)
            top += height
        head = {"va": "top", "parse_math": False}
        wide = max(30, int(width / 0.085))
        fig.text(0.01, 1 - 0.04 / tall, textwrap.shorten(title, wide), fontsize=11, weight="bold", **head)
        asked = textwrap.shorten(f"asked: {example.question}", int(wide * 1.25))
        fig.text(0.01, 1 - 0.27 / tall, asked, fontsize=8, **head)
        legend = REPEATED if scene is None else f"{FACTS}   {REPEATED}"
        fig.text(0.01, 1 - 0.45 / tall, legend, fontsize=7.5, color=MUTED, **head)
        if picture is not None:
            draw_image(fig.add_axes((0.01, (inches - 1.55) / tall, 1.5 / width, 1.5 / tall)), picture)
    return fig


def setting_answers(
    items: pd.DataFrame, settings: pd.DataFrame, group: str, example: Example, title: str
) -> tuple[Figure, pd.DataFrame]:
    """One image as the settings of a group of Table 5 describe it, and its rows. items: rows of `generation.ask_all`."""
    wanted = settings[settings["group"] == group]["setting"]
    rows = items[items["id"] == example.id].set_index("setting").loc[list(wanted)].reset_index()
    rows = rows[["setting", "question", "text", "score", "words", "repeated_share"]]
    return compared_answers(rows.rename(columns={"setting": "name"}), example, title), rows
