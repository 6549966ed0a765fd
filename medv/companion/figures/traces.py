"""A trace for people: an animated HTML page, a JSON file, or a canvas in the terminal while it is sampled.

The page is one file: it embeds its style, its script and the picture, and its content policy forbids every request. The
template escapes the words of tokens, the question and the answer; the script sets them as text, never as markup.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from medv.artifacts import write_text
from medv.companion.figures.templates import template
from medv.diffusion.trace import COMMIT, FORMAT, Event, Events, Trace
from medv.reading import check_regular, open_regular

TERMINAL, SUFFIXES = "-", (".html", ".json")
SPECIAL = "∎"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
PAGE_BEGIN = "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta http-equiv='Content-Security-Policy'"
"""How the template begins: a file that begins so is a trace and may be replaced."""
PICTURE = 320  # pixels, the longer side of the picture on the page
LOW, HIGH = (246, 169, 122), (143, 195, 234)  # the colors of confidence 0 and 1 in the terminal, as on the page

Word = Callable[[int], str]


def trace_targets(names: Sequence[str]) -> tuple[bool, list[Path]]:
    """Whether the terminal is asked for ("-"), and the files (.html or .json) to write.

    Raises ValueError for another suffix and for a name that cannot become a file, so that nothing is sampled in vain.
    """
    files = [Path(name) for name in names if name != TERMINAL]
    for path in files:
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"a trace is written to a name that ends in {' or '.join(SUFFIXES)}, or to {TERMINAL} for the terminal: "
                f"not to {str(path)!r}"
            )
        blocked = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
        if blocked is not None:
            raise ValueError(f"{path} cannot be written: {blocked} is a file")
        check_regular(path)
        begin = (PAGE_BEGIN if path.suffix == ".html" else json.dumps({"format": FORMAT})[:-1]).encode()
        found = b""
        if path.exists():
            with open_regular(path) as stream:
                found = b" ".join(stream.read(len(begin) + 64).split()).replace(b"{ ", b"{", 1)[: len(begin)]
        if found not in (b"", begin):
            raise ValueError(f"{path} exists and is no trace, so that it is not written over: choose another name")
    return TERMINAL in names, files


def word_of(tokenizer) -> Word:
    """The text of one token, its spaces kept, with a sign in place of what does not print, ∎ for a special token."""
    special = set(tokenizer.all_special_ids)
    return lambda token: SPECIAL if token in special else printable(tokenizer.decode([token]))


def printable(text: str) -> str:
    """`text` with ↵ for a line break and · for what would move a cursor or show nothing."""
    return "".join("↵" if c == "\n" else c if c.isprintable() else "·" for c in text) or "·"


@dataclass(frozen=True)
class Cell:
    """One position of the canvas after some forward.

    state: "open" (masked), "fixed" (given), "written", "fresh" (by the last forward), "lost" (taken back by it); token:
    None where open; confidence: when it was written; taken: how often it was taken back so far; forward: of its last
    event, from 1.
    """

    state: str = "open"
    token: int | None = None
    confidence: float = 0.0
    taken: int = 0
    forward: int = 0


def cells(events: Sequence[Event], gen_length: int, frame: int, fixed: Sequence[Event] = ()) -> list[Cell]:
    """The canvas after `frame` forwards of the events of one row; 0 is all masks, but for the `fixed` tokens of its trace."""
    canvas = [Cell()] * gen_length
    for event in fixed:
        canvas[event.position] = Cell("fixed", event.token, event.confidence)
    for event in events:
        if event.step >= frame:
            break
        last, taken = event.step == frame - 1, canvas[event.position].taken
        token: int | None = event.token
        if event.kind == COMMIT:
            state = "fresh" if last else "written"
        else:
            state, token, taken = ("lost", token, taken + 1) if last else ("open", None, taken + 1)
        canvas[event.position] = Cell(state, token, event.confidence, taken, event.step + 1)
    return canvas


def forwards_of(events: Sequence[Event]) -> int:
    """The forwards that wrote or took back a token, up to the last that did."""
    return events[-1].step + 1 if events else 0


# --- Files ---


def write_trace(
    path: str | Path, trace: Trace, word: Word, *, question: str, answer: str, picture: Image.Image | None = None
) -> Path:
    """Write the trace to `path` as its suffix says, whole or not at all; the page shows batch row 0 or the only one."""
    path = Path(path)
    trace_targets([str(path)])
    if path.suffix == ".json":
        words = {str(token): word(token) for token in sorted({event.token for event in (*trace.fixed, *trace.events)})}
        return trace.save(path, about={"question": question, "answer": answer, "words": words})
    return write_text(path, trace_page(trace, word, question=question, answer=answer, picture=picture))


def trace_page(trace: Trace, word: Word, *, question: str = "", answer: str = "", picture: Image.Image | None = None) -> str:
    """The HTML page of a trace of one row. Raises ValueError where it has more: take `trace.of_row(row)`."""
    rows = {event.row for event in (*trace.fixed, *trace.events)}
    if len(rows) > 1:
        raise ValueError(f"a page shows one row, but the trace has {len(rows)}: pass trace.of_row(0), for example")
    words = {token: word(token) for token in {event.token for event in (*trace.fixed, *trace.events)}}
    events = [[e.step, e.position, e.kind == COMMIT, words[e.token], round(e.confidence, 4)] for e in trace.events]
    files = {kind: resources.files(__package__).joinpath(f"trace.{kind}").read_text("utf-8") for kind in ("css", "js")}
    shown = {"question": question, "answer": answer, "picture": None}
    if picture is not None:
        small, stream = picture.convert("RGB"), io.BytesIO()
        small.thumbnail((PICTURE, PICTURE))
        small.save(stream, "PNG", optimize=True)
        shown["picture"] = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    data = {"length": trace.gen_length, "events": events, "fixed": [[e.position, words[e.token]] for e in trace.fixed]}
    page = template(__package__, "trace.html.jinja")
    return page.render(files | shown, policy=POLICY, events=trace.events, words=words, data=data)


# --- Terminal ---


class TerminalView:
    """A context that draws batch row 0 of a stream: call it with the events of each forward.

    Color is the confidence at commit time; the newest words are bold and underlined, masks are ░, and a position that was
    taken back and waits is ↺.
    """

    def __init__(self, console: Console, gen_length: int, word: Word):
        self.word, self.gen_length, self.forwards = word, gen_length, 0
        self.events: list[Event] = []
        # Drawn when there is news: a thread of its own would only draw the same again.
        self.live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> "TerminalView":
        self.live.start()
        return self

    def __exit__(self, *_) -> None:
        self.live.stop()

    def __call__(self, events: Events) -> None:
        """Take in one forward and draw."""
        self.forwards += 1
        self.events += [event for event in events if event.row == 0]
        self.live.update(self.picture(), refresh=True)

    def picture(self) -> Group:
        """The canvas and a line about it."""
        places = cells(self.events, self.gen_length, forwards_of(self.events))
        written = [position for position, cell in enumerate(places) if cell.state in ("written", "fresh")]
        canvas = Text(overflow="fold")
        for position, cell in enumerate(places):
            if position not in written:
                canvas.append("↺" if cell.taken else "░", style="dim" if position > max(written, default=-1) else "")
                continue
            text = self.word(cell.token)
            bare = text.lstrip(" ")
            color = [round(low + cell.confidence * (high - low)) for low, high in zip(LOW, HIGH, strict=True)]
            look = "bold underline " if cell.state == "fresh" else ""
            canvas.append(text[: len(text) - len(bare)])
            canvas.append(bare, style=f"{look}black on rgb({color[0]},{color[1]},{color[2]})")
        taken = sum(cell.taken for cell in places)
        back = f", {taken} taken back" if taken else ""
        status = f"forward {self.forwards}: {len(written)} of {self.gen_length} positions written{back}"
        return Group(canvas, Text(status, style="dim"))
