"""The HTML of the explorer: an answer with its repetitions marked, a canvas at one moment, a chart of the runs as SVG.

The template escapes every word of a model, a question and a file name.
"""

import io
import math
from collections.abc import Sequence
from importlib import resources

from PIL import Image

from medv.companion.explorer.session import MEASURES, Outcome
from medv.companion.figures.plots import PALETTE
from medv.companion.figures.templates import template
from medv.companion.figures.traces import Word

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 250, 150, 38, 14, 24, 22  # one panel of the chart and its margins, in pixels
HTML = template(__package__, "view.html.jinja").module


def style() -> str:
    """The style sheet of the explorer."""
    return f"<style>{resources.files(__package__).joinpath('explorer.css').read_text('utf-8')}</style>"


def message(text: str, kind: str = "note") -> str:
    """A line to the user: kind "note" or "error"."""
    return str(HTML.message(text, kind)).strip()


def answer_html(outcome: Outcome, title: str = "") -> str:
    """The answer with its repeated parts marked, and its numbers."""
    return str(HTML.answer(outcome, title))


def legend_html() -> str:
    """The meaning of the colors and borders of a canvas."""
    return str(HTML.legend())


def canvas_html(outcome: Outcome, frame: int, word: Word) -> str:
    """The canvas after `frame` forwards; color is the confidence with which each token was written."""
    widest = [""] * outcome.trace.gen_length  # each position is as wide as its longest word, so that nothing moves
    for event in outcome.trace.events:
        widest[event.position] = max(widest[event.position], word(event.token), key=len)
    canvas = outcome.canvas(frame)
    written = sum(cell.state in ("written", "fresh") for cell in canvas)
    taken = sum(cell.taken for cell in canvas)
    status = f"forward {min(frame, outcome.frames)} of {outcome.frames}: {written} of {len(canvas)} positions written"
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
    panels = [_panel(measure, families, current) for measure in MEASURES] if outcomes else []
    return str(HTML.chart(panels, colors, len(outcomes)))


def _panel(measure: str, families: dict[str, list[Outcome]], current: Outcome | None) -> dict:
    """One measure against Z, for the template: positions in pixels, both axes from round numbers."""
    outcomes = [outcome for runs in families.values() for outcome in runs]
    top = _round_up(max(outcome.row()[measure] for outcome in outcomes))
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
        return x_of(math.log2(outcome.setting.steps)), y_of(value / top), text

    return {
        "measure": measure,
        "label": MEASURES[measure],
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "rows": [(y_of(share), f"{top * share:.3g}") for share in (0, 0.5, 1)],
        "columns": [(x_of(power), f"{2**power:g}") for power in range(low, high + 1)],
        "lines": {name: [point(outcome) for outcome in runs] for name, runs in families.items()},
        "now": None if current is None else point(current),
    }


def _round_up(value: float) -> float:
    """The next of 1, 2, 3, 4, 5, 6, 8 times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 3, 4, 5, 6, 8, 10) if value <= step * power * 1.0000001)


def png(picture: Image.Image, side: int) -> bytes:
    """The picture as PNG, scaled to fit `side`; small pictures keep hard pixels."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    stream = io.BytesIO()
    picture.convert("RGB").resize(size, resampling).save(stream, "PNG")
    return stream.getvalue()
