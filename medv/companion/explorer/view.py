"""What the explorer shows, as HTML text: an answer with its repetitions marked, a canvas at one moment, a chart of the runs.

Pure functions from `explorer.session` to strings; the chart is SVG, made fast enough to follow a dragged slider. Every
word of a model, a question or a file name goes through `escape`: nothing of it is ever markup.
"""

import io
import math
from collections.abc import Sequence
from html import escape
from importlib import resources

from PIL import Image

from medv.companion.explorer.session import MEASURES, Cell, Outcome, cells
from medv.companion.figures.plots import PALETTE
from medv.companion.figures.traces import Word
from medv.diffusion.trace import Trace

WIDE, HIGH, LEFT, BOTTOM, TOP = 250, 150, 38, 24, 22  # one panel, in pixels


def style() -> str:
    """The style sheet of the explorer."""
    return f"<style>{resources.files(__package__).joinpath('explorer.css').read_text('utf-8')}</style>"


def message(text: str, kind: str = "note") -> str:
    """A line to the user: kind "note" or "error"."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="medv-{kind}" role="{role}">{escape(text)}</div>' if text else ""


def answer_html(outcome: Outcome, title: str = "") -> str:
    """The answer with its repeated parts marked, and its numbers."""
    text = "".join(
        f'<mark title="said before">{escape(part)}</mark>' if again else escape(part) for part, again in outcome.parts
    )
    answer, setting = outcome.answer, outcome.setting
    numbers = {
        "repeated words": f"{outcome.repetition:.0f} %",
        "words": str(outcome.words),
        "forwards": str(answer.forwards),
        "seconds": f"{answer.seconds:.2f}",
        "ended by": answer.finish_reason,
    }
    listed = "".join(f"<span>{name} <b>{value}</b></span>" for name, value in numbers.items())
    head = f"<h4>{escape(title)}Z = {setting.steps} <small>{escape(setting.family())}</small></h4>"
    asked = f'<p class="medv-asked">{escape(outcome.picture)}: {escape(_short(answer.question, 160))}</p>'
    said = f'<p>{text or "(an empty answer)"}</p><p class="medv-numbers">{listed}</p>'
    return f'<div class="medv-answer">{head}{asked}{said}</div>'


def canvas_html(trace: Trace, frame: int, word: Word) -> str:
    """The canvas after `frame` forwards; color is the confidence with which each token was written."""
    widest = _widest(trace, word)
    canvas = cells(trace, frame)
    drawn = "".join(_cell_html(cell, place, widest[place], word) for place, cell in enumerate(canvas))
    written = sum(cell.state in ("written", "fresh") for cell in canvas)
    taken = sum(cell.taken for cell in canvas)
    last = max((event.step + 1 for event in trace.events), default=0)
    said = f"forward {min(frame, last)} of {last}: {written} of {trace.gen_length} positions written"
    said += f", {taken} taken back so far" if taken else ""
    return f'<div class="medv-frame"><p class="medv-said">{said}</p><div class="medv-canvas">{drawn}</div></div>'


def legend_html() -> str:
    """What the colors and borders of a canvas mean."""
    return (
        '<ul class="medv-legend"><li><span class="medv-ramp"></span>confidence 0 to 1</li>'
        '<li><span class="medv-cell fresh" style="--sure:80%">new</span>written by this forward</li>'
        '<li><span class="medv-cell lost">old</span>taken back by it</li>'
        '<li><span class="medv-cell again" style="--sure:80%">word</span>written again</li>'
        '<li><span class="medv-cell open">&nbsp;</span>masked</li><li>∎ end of the answer</li></ul>'
    )


def _cell_html(cell: Cell, place: int, widest: str, word: Word) -> str:
    text = "" if cell.token is None else word(cell.token)
    again = " again" if cell.taken and cell.state in ("written", "fresh") else ""
    start = " start" if widest.startswith(" ") else ""
    never = " never" if not widest else ""
    history = f", taken back {cell.taken} times so far" if cell.taken else ""
    what = f"confidence {cell.confidence:.3f}, forward {cell.forward}" if cell.token is not None else "masked"
    return (
        f'<span class="medv-cell {cell.state}{again}{start}{never}" style="--sure:{100 * cell.confidence:.0f}%" '
        f'title="position {place}: {what}{history}"><i aria-hidden="true">{escape(widest.strip() or widest)}</i>'
        f"<b>{escape(text.strip() or text)}</b></span>"
    )


def _widest(trace: Trace, word: Word) -> list[str]:
    """The longest word that each position ever holds, so that nothing moves while the canvas plays."""
    widest = [""] * trace.gen_length
    for event in trace.events:
        widest[event.position] = max(widest[event.position], word(event.token), key=len)
    return widest


# --- The chart ---


def chart_html(outcomes: Sequence[Outcome], current: Outcome | None = None) -> str:
    """Repetition, words, forwards and seconds of all runs against Z, a line a family; the current run is ringed."""
    if not outcomes:
        return '<p class="medv-note">No run yet: each answer becomes a point here.</p>'
    families: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda each: each.setting.steps):
        families.setdefault(_family(outcome), []).append(outcome)
    colors = {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(_in_order(outcomes))}
    panels = "".join(_panel(measure, families, colors, outcomes, current) for measure in MEASURES)
    keys = "".join(
        f'<li><span style="background:{color}"></span>{escape(_short(name, 110))}</li>' for name, color in colors.items()
    )
    note = f"{len(outcomes)} runs, one answer each: a single answer varies, and no interval can be given"
    return f'<div class="medv-chart">{panels}</div><ul class="medv-legend keys">{keys}<li>{note}</li></ul>'


def _in_order(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(map(_family, outcomes)))


def _family(outcome: Outcome) -> str:
    return f"{outcome.picture}: {outcome.answer.question} ({outcome.setting.family()})"


def _value(outcome: Outcome, measure: str) -> float:
    return float(outcome.row()[measure])


def _panel(
    measure: str,
    families: dict[str, list[Outcome]],
    colors: dict[str, str],
    outcomes: Sequence[Outcome],
    current: Outcome | None,
) -> str:
    """One measure against Z, both axes from round numbers."""
    top = _round_up(max(_value(outcome, measure) for outcome in outcomes))
    low = math.floor(math.log2(min(outcome.setting.steps for outcome in outcomes)))
    high = max(math.ceil(math.log2(max(outcome.setting.steps for outcome in outcomes))), low + 1)

    def at(outcome: Outcome) -> tuple[float, float]:
        x = LEFT + (WIDE - LEFT - 14) * (math.log2(outcome.setting.steps) - low) / (high - low)
        return round(x, 1), round(HIGH - BOTTOM - (HIGH - BOTTOM - TOP) * _value(outcome, measure) / top, 1)

    marks = []
    for share in (0, 0.5, 1):
        y = HIGH - BOTTOM - (HIGH - BOTTOM - TOP) * share
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDE - 8}" y1="{y}" y2="{y}"/>')
        marks.append(f'<text x="{LEFT - 5}" y="{y + 3.5}" text-anchor="end">{top * share:.3g}</text>')
    for power in range(low, high + 1):
        x = LEFT + (WIDE - LEFT - 14) * (power - low) / (high - low)
        marks.append(f'<text x="{x:.1f}" y="{HIGH - 9}" text-anchor="middle">{2**power:g}</text>')
    for name, runs in families.items():
        points = " ".join(f"{x},{y}" for x, y in map(at, runs))
        marks.append(f'<polyline points="{points}" stroke="{colors[name]}"/>')
        for outcome in runs:
            x, y = at(outcome)
            told = escape(f"Z = {outcome.setting.steps}: {_value(outcome, measure):.4g} {MEASURES[measure]}; {name}")
            marks.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colors[name]}"><title>{told}</title></circle>')
    if current is not None:
        x, y = at(current)
        marks.append(f'<circle class="now" cx="{x}" cy="{y}" r="7"/>')
    title = f'<text class="title" x="{LEFT}" y="13">{MEASURES[measure]}</text>'
    axis = f'<text x="{LEFT - 24}" y="{HIGH - 9}" class="axis">Z</text>'
    return (
        f'<svg class="{measure}" viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{MEASURES[measure]} against Z">'
        f"{title}{axis}{''.join(marks)}</svg>"
    )


def _round_up(value: float) -> float:
    """The next of 1, 2, 3, 4, 5, 6, 8 times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 3, 4, 5, 6, 8, 10) if value <= step * power * 1.0000001)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def png(picture: Image.Image, side: int) -> bytes:
    """The picture as PNG, scaled to fit `side`; small pictures keep hard pixels."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    stream = io.BytesIO()
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    picture.convert("RGB").resize(size, how).save(stream, "PNG")
    return stream.getvalue()
