"""Keep words, in the explorer: check the words of an answer that are to stay, and let the model write the rest again.

Every word is a checkbox of the page, so that Tab reaches it, Space turns it, and a screen reader tells its state.
"""

from collections.abc import Callable

import ipywidgets as widgets

from medv.companion.explorer import view
from medv.companion.explorer.session import Outcome, Session
from medv.companion.figures.traces import Word

ROW = {"flex_flow": "row wrap", "align_items": "center"}


def words_of(outcome: Outcome, word: Word) -> list[tuple[str, tuple[int, ...]]]:
    """The words of an answer, each with the positions of its tokens; a sign belongs to the word before it."""
    found: list[tuple[str, tuple[int, ...]]] = []
    for place, token in enumerate(outcome.trace.replay(10**9)[: outcome.answer.tokens]):
        text = word(token)
        if not found or text.startswith((" ", "↵")):
            found.append((text, (place,)))
        else:
            found[-1] = (found[-1][0] + text, (*found[-1][1], place))
    return found


class KeepWords(view.Background, widgets.VBox):
    """A button that lays out the words of the outcome that is shown, and one that fills what is not kept, in a thread.

    done: called with the new outcome.
    """

    def __init__(self, session: Session, word: Word, done: Callable[[Outcome], None]):
        self.session, self.word, self.done = session, word, done
        self.outcome: Outcome | None = None
        self.boxes: dict[widgets.Checkbox, tuple[int, ...]] = {}
        wide = {"layout": {"width": "150px"}, "disabled": True}
        self.choose_button = widgets.Button(description="Keep words", tooltip="choose words that are to stay", **wide)
        self.fill_button = widgets.Button(description="Fill the rest", tooltip="keep these, write all others again", **wide)
        self.choose_button.on_click(lambda _: self.choose())
        self.fill_button.on_click(lambda _: self.fill())
        self.words, self.message = widgets.HBox(layout=ROW), widgets.HTML()
        self.words.add_class("medv-keep")
        buttons = widgets.HBox([self.choose_button, self.fill_button, self.message], layout=ROW)
        super().__init__([buttons, self.words], layout={"width": "100%"})

    def show(self, outcome: Outcome) -> None:
        """Make this the outcome whose words are chosen; those of one that was filled are laid out at once."""
        self.outcome = outcome
        self.choose_button.disabled = outcome.image is None or not outcome.answer.tokens
        self._lay_out(words_of(outcome, self.word) if outcome.kept else [])

    def choose(self) -> None:
        """Lay the words of the outcome out."""
        if self.outcome is not None:
            self._lay_out(words_of(self.outcome, self.word))

    def fill(self) -> None:
        """Let the model write again what is not kept."""
        if self.outcome is None or self._busy():
            return
        kept = [place for box, places in self.boxes.items() if box.value for place in places]
        self.fill_button.disabled, self.message.value = True, view.message("filling ...")
        self._begin(self._run, self.outcome, kept)

    def _lay_out(self, words: list[tuple[str, tuple[int, ...]]]) -> None:
        self.boxes = {}
        for text, places in words:
            box = widgets.Checkbox(value=self.outcome.kept >= set(places), description=text.strip(), indent=False)
            box.layout.width = "auto"
            self.boxes[box] = places
        self.words.children = tuple(self.boxes)
        self.fill_button.disabled, self.message.value = not self.boxes, ""

    def _run(self, outcome: Outcome, kept: list[int]) -> None:
        try:
            self.done(self.session.fill(outcome, kept))
            count = sum(box.value for box in self.boxes)
            self.message.value = view.message(f"{count} {'word' if count == 1 else 'words'} kept, the rest filled")
        except Exception as error:  # beware: without this a thread dies unseen
            self.message.value = view.message(f"this could not be filled, {type(error).__name__}: {error}", "error")
        finally:
            self.fill_button.disabled = not self.boxes
