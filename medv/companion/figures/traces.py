"""A trace for people: one animated HTML page that needs nothing else, or a JSON file; and which of them a name asks for.

The page embeds its style, its script and the picture, and its content policy forbids every request. Words of tokens, the
question and the answer are data: escaped in the text of the page, and set as text, never as markup, by its script. It reads
a finished `medv.diffusion.trace.Trace`; to watch one grow in a terminal is `medv.companion.figures.trace_terminal`.
"""

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from PIL import Image

from medv.artifacts import write_text
from medv.diffusion.trace import FORMAT, REMASK, Trace
from medv.reading import check_regular, open_regular

TERMINAL, SUFFIXES = "-", (".html", ".json")
SPECIAL = "∎"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_BEGIN = "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta http-equiv='Content-Security-Policy'"
PICTURE = 320  # pixels, the longer side

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
        if path.exists() and not _ours(path):
            raise ValueError(f"{path} exists and is no trace, so that it is not written over: choose another name")
    return TERMINAL in names, files


def _ours(path: Path) -> bool:
    """Whether a file is empty, or begins as a trace of its kind does."""
    begin = (_BEGIN if path.suffix == ".html" else json.dumps({"format": FORMAT})[:-1]).encode()
    with open_regular(path) as stream:
        found = b" ".join(stream.read(len(begin) + 64).split()).replace(b"{ ", b"{", 1)[: len(begin)]
    return found in (b"", begin)


def word_of(tokenizer) -> Word:
    """The text of one token, its spaces kept, with a sign in place of what does not print, ∎ for a special token."""
    special = set(tokenizer.all_special_ids)
    return lambda token: SPECIAL if token in special else printable(tokenizer.decode([token]))


def printable(text: str) -> str:
    """`text` with ↵ for a line break and · for what would move a cursor or show nothing."""
    return "".join("↵" if c == "\n" else c if c.isprintable() else "·" for c in text) or "·"


def write_trace(
    path: str | Path, trace: Trace, word: Word, *, question: str, answer: str, picture: Image.Image | None = None
) -> Path:
    """Write the trace to `path` as its suffix says, whole or not at all; the page shows batch row 0 or the only one."""
    path = Path(path)
    trace_targets([str(path)])
    if path.suffix == ".json":
        words = {str(token): word(token) for token in sorted({event.token for event in trace.events})}
        return trace.save(path, about={"question": question, "answer": answer, "words": words})
    return write_text(path, trace_page(trace, word, question=question, answer=answer, picture=picture))


def trace_page(trace: Trace, word: Word, *, question: str = "", answer: str = "", picture: Image.Image | None = None) -> str:
    """The HTML page of a trace of one row. Raises ValueError where it has more: take `trace.of_row(row)`."""
    rows = {event.row for event in trace.events}
    if len(rows) > 1:
        raise ValueError(f"a page shows one row, but the trace has {len(rows)}: pass trace.of_row(0), for example")
    style, script = (resources.files(__package__).joinpath(f"trace.{kind}").read_text("utf-8") for kind in ("css", "js"))
    title = html.escape(question or "A trace")
    image = f"<img alt='the image that was asked about' src='{_embedded(picture)}'>" if picture is not None else ""
    head = (
        f' content="{POLICY}">'
        f"<meta name='viewport' content='width=device-width'><title>medv: {title}</title><style>{style}</style>"
    )
    body = (
        f"<header>{image}<div><h1>{title}</h1><p id='answer'>{html.escape(answer) or '(an empty answer)'}</p></div></header>"
        f"{_PLAYER}<details><summary>All {len(trace.events)} events as a table</summary>{_table(trace, word)}</details>"
        f"<script type='application/json' id='data'>{_data(trace, word)}</script><script>{script}</script>"
    )
    return f"{_BEGIN}{head}</head><body>{body}</body></html>\n"


_PLAYER = """<section aria-label="how the answer was unmasked">
<div id="controls"><button id="play" type="button">Play</button>
<button id="back" type="button" aria-label="one forward back">‹</button>
<button id="next" type="button" aria-label="one forward on">›</button>
<input id="slider" type="range" min="0" value="0" aria-label="forwards">
<label>speed <select id="speed"><option value="2">2 a second</option><option value="6" selected>6 a second</option>
<option value="20">20 a second</option></select></label></div>
<div id="timeline" aria-hidden="true"></div>
<p id="status" role="status">This page needs JavaScript to play; the answer and the table of events are there without.</p>
<div id="canvas"></div>
<ul class="legend"><li><span class="ramp"></span>confidence when written, 0 to 1</li>
<li><span class="cell fresh">new</span>written by this forward</li>
<li><span class="cell lost">old</span>taken back by this forward</li>
<li><span class="cell again">word</span>written again</li><li><span class="cell open">&nbsp;</span>masked</li>
<li><span class="cell">∎</span>end of the answer, or another special token</li></ul>
<p class="keys">Space plays and pauses; arrow keys step; Home and End go to the ends.</p></section>"""


def _data(trace: Trace, word: Word) -> str:
    """What the script reads; no "<" in it, so that no word ends the element it stands in."""
    words = {token: word(token) for token in {event.token for event in trace.events}}
    events = [[e.step, e.position, e.kind != REMASK, words[e.token], round(e.confidence, 4)] for e in trace.events]
    return json.dumps({"length": trace.gen_length, "events": events}, ensure_ascii=False).replace("<", "\\u003c")


def _table(trace: Trace, word: Word) -> str:
    rows = "".join(
        f"<tr><td>{e.step + 1}</td><td>{e.position}</td><td>{e.kind}</td><td>{html.escape(word(e.token))}</td>"
        f"<td>{e.token}</td><td>{e.confidence:.3f}</td></tr>"
        for e in trace.events
    )
    names = ("forward", "position", "event", "word", "token", "confidence")
    head = "".join(f"<th scope='col'>{name}</th>" for name in names)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _embedded(picture: Image.Image) -> str:
    """The picture, small, as a data address."""
    small = picture.convert("RGB")
    small.thumbnail((PICTURE, PICTURE))
    stream = io.BytesIO()
    small.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
