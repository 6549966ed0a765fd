"""The display of the explorer: answers with their repetitions marked, a canvas at one moment, and the runs against Z.

As HTML for the widgets, whose template escapes every word of a model, a question and a file name; and as a static figure for
papermill, print and the index page. Each point is one answer, so there is no interval to draw.
"""

import contextvars
import io
import math
import threading
from collections.abc import Sequence
from importlib import resources
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from medv.companion.explorer.session import MEASURES, Outcome
from medv.companion.figures import traces
from medv.companion.figures.plots import INK, PALETTE, draw_image, theme
from medv.companion.figures.templates import template
from medv.companion.figures.words import AGAIN, Strip, Word, draw_strips, strips_height, token_box

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 250, 150, 38, 14, 24, 22  # one panel of the chart and its margins, in pixels
COLUMNS = 142  # characters of a strip of the figure
OPEN = "#c9cdd2"
CONFIDENCE = mpl.colors.LinearSegmentedColormap.from_list("confidence", ["#f6a97a", "#8fc3ea"])
HTML = template(__package__, "view.html.jinja").module


class Background:
    """A thread for the work of a widget: one at a time."""

    _thread: threading.Thread | None = None

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _begin(self, *work: Any) -> None:
        """Start a function with its arguments."""
        run = contextvars.copy_context().run  # the context knows to which cell the widgets belong
        self._thread = threading.Thread(target=run, args=work, daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Block until the work that was begun has ended."""
        if self._thread is not None:
            self._thread.join(seconds)


def style() -> str:
    """The style sheet of the explorer."""
    return f"<style>{resources.files(__package__).joinpath('explorer.css').read_text('utf-8')}</style>"


def message(text: str, kind: str = "note") -> str:
    """A line to the user: kind "note" or "error"."""
    return str(HTML.message(text, kind)).strip()


def answer_html(outcome: Outcome, title: str = "") -> str:
    """The answer with its repeated parts marked, and its numbers."""
    return str(HTML.answer(outcome, title))


def canvas_html(outcome: Outcome, frame: int, word: traces.Word) -> str:
    """The canvas after `frame` forwards; color is the confidence with which each token was written."""
    widest = [""] * outcome.trace.gen_length  # each position is as wide as its longest word, so that nothing moves
    for event in (*outcome.trace.fixed, *outcome.trace.events):
        widest[event.position] = max(widest[event.position], word(event.token), key=len)
    canvas = outcome.canvas(frame)
    written = sum(cell.state in ("written", "fresh") for cell in canvas)
    taken = sum(cell.taken for cell in canvas)
    status = f"forward {min(frame, outcome.frames)} of {outcome.frames}: {written} of {len(canvas)} positions written"
    status += f", {len(outcome.kept)} kept" if outcome.kept else ""
    status += f", {taken} taken back so far" if taken else ""
    texts = ["" if cell.token is None else word(cell.token) for cell in canvas]
    return str(HTML.canvas(status, list(zip(canvas, texts, widest, strict=True))))


def chart_html(outcomes: Sequence[Outcome], current: Outcome | None = None) -> str:
    """Repetition, words, forwards and seconds of all runs against Z, a line a family; the current run is ringed."""
    families: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        name = f"{outcome.picture}: {outcome.answer.question} ({outcome.setting.family()})"
        families.setdefault(name, []).append(outcome)
    for runs in families.values():
        runs.sort(key=lambda outcome: outcome.setting.steps)
    colors = {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(families)}
    panels = {measure: _panel(measure, families, current) for measure in MEASURES} if outcomes else {}
    return str(HTML.chart(panels, MEASURES, colors, len(outcomes), WIDTH, HEIGHT, LEFT))


def _panel(measure: str, families: dict[str, list[Outcome]], current: Outcome | None) -> dict:
    """One measure against Z, for the template: positions in pixels, both axes from round numbers."""
    outcomes = [outcome for runs in families.values() for outcome in runs]
    ticks = MaxNLocator(3).tick_values(0, max(outcome.row()[measure] for outcome in outcomes) or 1)
    powers = [math.log2(outcome.setting.steps) for outcome in outcomes]
    low = math.floor(min(powers))
    high = max(math.ceil(max(powers)), low + 1)

    def x_of(power: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (power - low) / (high - low), 1)

    def y_of(share: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share, 1)

    def point(outcome: Outcome) -> tuple[float, float, str]:
        value = outcome.row()[measure]
        text = f"Z = {outcome.setting.steps}: {value:.4g} {MEASURES[measure]}"
        return x_of(math.log2(outcome.setting.steps)), y_of(value / ticks[-1]), text

    return {
        "rows": [(y_of(tick / ticks[-1]), f"{tick:g}") for tick in ticks],
        "columns": [(x_of(power), f"{2**power:g}") for power in range(low, high + 1)],
        "lines": {name: [point(outcome) for outcome in runs] for name, runs in families.items()},
        "now": None if current is None else point(current),
    }


def png(picture: Image.Image, side: int) -> bytes:
    """The picture as PNG, scaled to fit `side`; small pictures keep hard pixels."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    stream = io.BytesIO()
    picture.convert("RGB").resize(size, resampling).save(stream, "PNG")
    return stream.getvalue()


# --- The static figure ---


def explorer_figure(picture: Image.Image, outcomes: Sequence[Outcome], word: traces.Word) -> tuple[Figure, pd.DataFrame]:
    """A picture, its canvas, three answers and all runs against Z, with a frame of the runs; ValueError without outcomes."""
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
        draw_image(axes["picture"], picture)
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
