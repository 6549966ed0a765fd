"""What happened while a response was sampled: a sparse list of events, from which every canvas can be replayed."""

from dataclasses import dataclass
from typing import NamedTuple

COMMIT, REMASK = "commit", "remask"


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


Commit = Event


@dataclass(frozen=True)
class Trace:
    """All events of one sampling call, in order of (step, row, position); what a step takes back comes after its commits."""

    events: tuple[Event, ...]
    gen_length: int
    mask_token_id: int

    @property
    def commits(self) -> tuple[Event, ...]:
        """The tokens written, those that were taken back later among them."""
        return tuple(event for event in self.events if event.kind == COMMIT)

    def of_row(self, row: int) -> "Trace":
        """The events of one batch row."""
        return Trace(tuple(event for event in self.events if event.row == row), self.gen_length, self.mask_token_id)

    def replay(self, step: int, row: int = 0) -> list[int]:
        """The response ids of `row` after forward `step`, masks where nothing is written; step -1 is all masks."""
        canvas = [self.mask_token_id] * self.gen_length
        for event in self.events:
            if event.row == row and event.step <= step:
                canvas[event.position] = event.token if event.kind == COMMIT else self.mask_token_id
        return canvas

    def to_dict(self) -> dict:
        """A JSON-able form: one list per column."""
        columns = {name: [getattr(event, name) for event in self.events] for name in Event._fields}
        return {"gen_length": self.gen_length, "mask_token_id": self.mask_token_id, **columns}

    @classmethod
    def from_dict(cls, value: dict) -> "Trace":
        """The inverse of `to_dict`."""
        columns = zip(*(value[name] for name in Event._fields), strict=True)
        return cls(tuple(Event(*entry) for entry in columns), value["gen_length"], value["mask_token_id"])
