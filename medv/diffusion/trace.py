"""Traces: the events of a sampling call, from which the canvas after each forward can be replayed.

Streams yield the events of each forward as it happens; a `Trace` holds them all and is stored as JSON. It stores token ids;
rendering lives in `medv.companion.figures`.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from medv import limits
from medv.artifacts import write_json
from medv.reading import read_json

COMMIT, REMASK, FIXED = "commit", "remask", "fixed"
FORMAT = "medv trace 1"
PLACES = ("row", "position", "token")

Result = TypeVar("Result")


class Event(NamedTuple):
    """One token written or, with kind "remask", taken back.

    step: the forward after which it happened (0-based). row: of the batch. position: in the response (0-based). token: the
    id. confidence: when it was written.
    """

    step: int
    row: int
    position: int
    token: int
    confidence: float
    kind: str = COMMIT


Events = tuple[Event, ...]


def drain(steps: Generator[Events, None, Result], on_step: Callable[[Events], None] | None = None) -> Result:
    """Run a stream to its end and return its result; `on_step` is called with the events of each forward."""
    while True:
        try:
            events = next(steps)
        except StopIteration as end:
            return end.value
        if on_step is not None:
            on_step(events)


@dataclass(frozen=True)
class Trace:
    """All events of one sampling call, in order of (step, row, position); a step's remasks come after its commits.

    fixed: the tokens that stood there from the beginning, as events of step -1, of kind "fixed" and confidence 1. Raises
    ValueError for a confidence that is NaN.
    """

    events: Events
    gen_length: int
    mask_token_id: int
    fixed: Events = ()

    def __post_init__(self):
        if wrong := next((event for event in self.events if event.confidence != event.confidence), None):
            raise ValueError(
                f"confidence nan, in {wrong}: the model's numbers are not finite; take another model, or bfloat16 or "
                "float32 where it was float16"
            )

    @property
    def commits(self) -> Events:
        """The written tokens, including those that were taken back later."""
        return tuple(event for event in self.events if event.kind == COMMIT)

    def of_row(self, row: int) -> "Trace":
        """The events of one batch row."""
        kept = {name: tuple(e for e in getattr(self, name) if e.row == row) for name in ("events", "fixed")}
        return replace(self, **kept)

    def replay(self, step: int, row: int = 0) -> list[int]:
        """The response ids of `row` after forward `step`, with the mask id at masked positions; step -1 is the beginning."""
        canvas = [self.mask_token_id] * self.gen_length
        for event in (*self.fixed, *self.events):
            if event.row == row and event.step <= step:
                canvas[event.position] = self.mask_token_id if event.kind == REMASK else event.token
        return canvas

    def to_dict(self) -> dict:
        """A JSON-able form: one list per column; "fixed" has columns of its own, where there are such tokens."""
        columns = {name: [getattr(event, name) for event in self.events] for name in Event._fields}
        fixed = {name: [getattr(event, name) for event in self.fixed] for name in PLACES}
        sizes = {"gen_length": self.gen_length, "mask_token_id": self.mask_token_id}
        return sizes | columns | ({"fixed": fixed} if self.fixed else {})

    @classmethod
    def from_dict(cls, value: dict) -> "Trace":
        """The inverse of `to_dict`. Raises ValueError for a trace that no sampler can produce."""
        if not isinstance(value, dict):
            raise ValueError(f"a trace is a mapping of columns, not {type(value).__name__}: pass what to_dict gave")
        names = {"gen_length", "mask_token_id", *Event._fields}
        if set(value) - {"fixed"} != names:
            raise ValueError(f"a trace has the keys {sorted(names)}, not {sorted(value)}: pass what to_dict gave")
        for name in ("gen_length", "mask_token_id"):
            limits.whole(name, value[name], 0)
        fixed = value.get("fixed", dict.fromkeys(PLACES, ()))
        if not isinstance(fixed, dict) or set(fixed) != set(PLACES):
            raise ValueError(f"the fixed tokens of a trace have the columns {', '.join(PLACES)}: pass what to_dict gave")
        trace = cls(
            tuple(map(Event._make, _rows([value[name] for name in Event._fields]))),
            value["gen_length"],
            value["mask_token_id"],
            tuple(Event(-1, *place, 1.0, FIXED) for place in _rows([fixed[name] for name in PLACES])),
        )
        trace._check()
        return trace

    def save(self, path: str | Path, about: dict | None = None) -> Path:
        """Write the trace as JSON atomically, with `about` (question, answer, ...) beside it."""
        return write_json(path, {"format": FORMAT, "about": about or {}, "trace": self.to_dict()})

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read a file that `save` wrote. Raises ValueError if it holds no valid trace."""
        try:
            value = read_json(path)
            if not isinstance(value, dict) or value.get("format") != FORMAT or "trace" not in value:
                raise ValueError(f"it is not of the format {FORMAT!r}, which Trace.save writes")
            return cls.from_dict(value["trace"])
        except ValueError as error:
            raise ValueError(f"{path} holds no trace: {error}") from None

    def _check(self) -> None:
        """Raise ValueError for an event that is not possible after those before it."""
        written, last = {}, 0
        for event in self.fixed:
            for name in PLACES:
                limits.whole(name, getattr(event, name), 0)
            if event.position >= self.gen_length:
                raise ValueError(f"{event} cannot be: positions lie below gen_length {self.gen_length}")
            written[event.row, event.position] = event.token
        kept = set(written)
        for event in self.events:
            for name in ("step", *PLACES):
                limits.whole(name, getattr(event, name), 0)
            sure = event.confidence
            if isinstance(sure, bool) or not isinstance(sure, int | float) or not 0 <= sure <= 1:
                raise ValueError(f"confidence {sure!r} is not between 0 and 1, in {event}")
            if event.step < last or event.position >= self.gen_length or event.kind not in (COMMIT, REMASK):
                raise ValueError(
                    f"{event} cannot be: steps do not decrease (the last was {last}), positions lie below gen_length "
                    f"{self.gen_length}, and the kind is {COMMIT!r} or {REMASK!r}"
                )
            place, last = (event.row, event.position), event.step
            if event.kind == REMASK and (place in kept or written.pop(place, None) != event.token):
                raise ValueError(f"{event} takes back a token that does not stand there")
            if event.kind == COMMIT and place in written:
                raise ValueError(f"{event} writes where a token stands already: it must be taken back first")
            if event.kind == COMMIT and event.token != self.mask_token_id:  # a preset can write the mask itself
                written[place] = event.token


def _rows(columns: list) -> list[tuple]:
    """Columns as rows. Raises ValueError where they are no lists of one length."""
    if not all(isinstance(column, list | tuple) for column in columns) or len(set(map(len, columns))) > 1:
        raise ValueError("the columns of a trace are lists of one length: pass what to_dict gave")
    return list(zip(*columns, strict=True))
