"""Where it looked, in the explorer: point at a word of the answer, or go to it with Tab, and see its map on the picture.

The page needs no script: the map of a word is its child, and the style sheet shows it while the word is pointed at or focused.
"""

import base64
import threading

import ipywidgets as widgets
from PIL import Image

from medv.companion.explorer import view
from medv.companion.explorer.session import Cancelled, Outcome
from medv.companion.figures.overlays import WordMap, limit_of, overlay_png, word_maps
from medv.companion.figures.templates import template
from medv.companion.figures.traces import Word
from medv.evaluation.answering import Answerer
from medv.evaluation.attribution import Occlusions, attribute

SIDE = 260  # pixels of the longer side of the picture
HTML = template(__package__, "looked.html.jinja").module


def looked_html(picture: Image.Image, maps: list[WordMap]) -> str:
    """The picture, the words of the answer, and for each word its map, which the style sheet shows on demand."""
    scale, limit = SIDE / max(picture.size), limit_of(maps)
    width, height = (max(1, round(size * scale)) for size in picture.size)
    images = [base64.b64encode(b"" if each.drops is None else overlay_png(each.drops, limit)).decode() for each in maps]
    return str(HTML.looked(maps, images, base64.b64encode(view.png(picture, SIDE)).decode(), width, height, limit))


class WhereItLooked(view.Background, widgets.VBox):
    """A button and the maps of the outcome that is shown; a map is computed when it is asked for, in a thread, and kept."""

    def __init__(self, answerer: Answerer, word: Word):
        self.answerer, self.word = answerer, word
        self.outcome: Outcome | None = None
        self.kept: dict[int, str] = {}  # by the identity of an outcome, which its session keeps
        self._stop = threading.Event()
        self.button = widgets.Button(description="Where it looked", layout={"width": "150px"}, disabled=True)
        self.button.tooltip = "hide each region of the picture in turn, and see which words suffer"
        self.button.on_click(lambda _: self.look())
        self.page = widgets.HTML(layout={"width": "100%"})
        super().__init__([self.button, self.page], layout={"width": "100%"})

    def show(self, outcome: Outcome) -> None:
        """Make this the outcome that is asked about, and show its maps where they are known."""
        if outcome is not self.outcome:
            self._stop.set()
        self.outcome = outcome
        self.button.disabled = outcome.image is None or not outcome.answer.tokens or not outcome.trace.events
        self.page.value = self.kept.get(id(outcome), "")

    def look(self) -> None:
        """Compute the maps of the outcome that is shown; pressed again meanwhile, stop."""
        if self._busy():
            self._stop.set()
            return
        if self.outcome is None or id(self.outcome) in self.kept:
            return
        self._stop = threading.Event()
        self._begin(self._run, self.outcome, self._stop)

    def _run(self, outcome: Outcome, stop: threading.Event) -> None:
        def on_step(done: int, total: int) -> None:
            if stop.is_set():
                raise Cancelled
            if outcome is self.outcome:
                self.page.value = view.message(f"canvas {done} of {total} ... (press again to stop)")

        try:
            shown = Occlusions.of(self.answerer, outcome.image)
            wanted = range(outcome.answer.tokens)
            found = attribute(self.answerer, shown, outcome.answer.question, outcome.trace, positions=wanted, on_step=on_step)
            given = tuple(event for event in outcome.trace.fixed if event.position in wanted)
            page = self.kept[id(outcome)] = looked_html(outcome.image, word_maps(found, self.word, given))
        except Cancelled:
            page = ""
        except Exception as error:  # beware: without this a thread dies unseen
            page = view.message(f"this could not be computed, {type(error).__name__}: {error}", "error")
        if outcome is self.outcome:
            self.page.value = page
