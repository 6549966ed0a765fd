"""What happened while a response was sampled: a sparse list of commits, from which every canvas can be replayed."""

from dataclasses import dataclass
from typing import NamedTuple


class Commit(NamedTuple):
    """One token written: at forward `step` (0-based), in batch row `row`, at response position `position` (0-based)."""

    step: int
    row: int
    position: int
    token: int
    confidence: float


@dataclass(frozen=True)
class Trace:
    """All commits of one sampling call, in order of (step, row, position)."""

    commits: tuple[Commit, ...]
    gen_length: int
    mask_token_id: int

    def of_row(self, row: int) -> "Trace":
        """The commits of one batch row."""
        return Trace(tuple(c for c in self.commits if c.row == row), self.gen_length, self.mask_token_id)

    def replay(self, step: int, row: int = 0) -> list[int]:
        """The response ids of `row` after forward `step`, masks where nothing is written yet; step -1 is all masks."""
        canvas = [self.mask_token_id] * self.gen_length
        for commit in self.commits:
            if commit.row == row and commit.step <= step:
                canvas[commit.position] = commit.token
        return canvas

    def to_dict(self) -> dict:
        """A JSON-able form: one list per column."""
        columns = {name: [getattr(c, name) for c in self.commits] for name in Commit._fields}
        return {"gen_length": self.gen_length, "mask_token_id": self.mask_token_id, **columns}
