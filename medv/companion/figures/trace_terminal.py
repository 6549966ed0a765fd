"""A canvas in the terminal while it is unmasked, forward by forward.

It takes the events of a stream (`medv.diffusion.trace`) as they come; the finished page is `figures.traces`. Words are
shown as text: what could steer a terminal is replaced before.
"""

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from medv.companion.figures.traces import Word
from medv.diffusion.trace import COMMIT, Events

LOW, HIGH = (246, 169, 122), (143, 195, 234)  # of confidence 0 and 1, as on the page


class TerminalView:
    """A context that draws batch row 0 of a stream: call it with the events of each forward.

    Color is the confidence at commit time; the newest words are bold and underlined, masks are ░, and a position that was
    taken back and waits is ↺.
    """

    def __init__(self, console: Console, gen_length: int, word: Word):
        self.word, self.forwards, self.taken = word, 0, 0
        self.places: list[tuple[str, float, int] | None] = [None] * gen_length  # word, confidence, forward
        self.again: set[int] = set()
        # Drawn when there is news: a thread of its own would only draw the same again.
        self.live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> "TerminalView":
        self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        self.live.stop()

    def __call__(self, events: Events) -> None:
        """Take in one forward and draw."""
        self.forwards += 1
        for event in (event for event in events if event.row == 0):
            wrote = event.kind == COMMIT
            shown = (self.word(event.token), event.confidence, self.forwards)
            self.places[event.position] = shown if wrote else None
            if not wrote:
                self.again.add(event.position)
                self.taken += 1
        self.live.update(self.picture(), refresh=True)

    def picture(self) -> Group:
        """The canvas and a line about it."""
        canvas = Text(overflow="fold")
        last = max((i for i, place in enumerate(self.places) if place), default=-1)
        for position, place in enumerate(self.places):
            if place is None:
                canvas.append("↺" if position in self.again else "░", style="dim" if position > last else "")
                continue
            text, sure, forward = place
            bare = text.lstrip(" ")
            canvas.append(text[: len(text) - len(bare)])
            canvas.append(bare, style=_style(sure, new=forward == self.forwards))
        written = sum(place is not None for place in self.places)
        back = f", {self.taken} taken back" if self.taken else ""
        told = f"forward {self.forwards}: {written} of {len(self.places)} positions written{back}"
        return Group(canvas, Text(told, style="dim"))


def _style(sure: float, *, new: bool) -> str:
    red, green, blue = (round(low + sure * (high - low)) for low, high in zip(LOW, HIGH, strict=True))
    return f"{'bold underline ' if new else ''}black on #{red:02x}{green:02x}{blue:02x}"
