"""Rows of data files: objects with named fields, and checks whose errors say where the row is and what it holds.

Question files, answer files, annotations and judgements are all read here, so that an id, a text or an image name means the
same everywhere.
"""

import json
import math
import os
import reprlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from medv.data.images import ImageError, resolve_image
from medv.reading import DataError, read_values


class Row(dict[str, Any]):
    """The fields of one row, and its position: `path` and `place` ("row 2" of a list, or "line 2")."""

    def __init__(self, fields: dict[str, Any], path: str | Path, place: str):
        super().__init__(fields)
        self.path, self.place = path, place

    def error(self, message: str) -> DataError:
        """An error that begins with the row's position."""
        return DataError(f"{self.path} {self.place}: {message}")

    def with_fields(self, fields: dict[str, Any]) -> "Row":
        """Other fields at the same position."""
        return Row(fields, self.path, self.place)

    def key(self, *keys: str) -> str:
        """The first of `keys` that the row has; raises DataError where it has none."""
        for key in keys:
            if key in self:
                return key
        raise self.error(f"no {' or '.join(map(repr, keys))} (the row has {', '.join(self) or 'no field'})")

    def text(self, *keys: str, empty: bool = False, numbers: bool = False) -> str:
        """The stripped text in the first of `keys` that the row has; blank only if `empty`, a number only if `numbers`."""
        key = self.key(*keys)
        value = str(self[key]) if numbers and is_number(self[key]) else self[key]
        if not isinstance(value, str):
            raise self.error(f"{key!r} is {found(value)}, but must be text{' or a number' if numbers else ''}")
        if not empty and not value.strip():
            raise self.error(f"{key!r} is empty")
        return value.strip()

    def answer(self) -> str:
        """The text of an answer, in `text` or `answer`, unstripped; it may be empty."""
        self.text("text", "answer", empty=True)
        return self[self.key("text", "answer")]

    def identity(self, *keys: str) -> str:
        """The id in the first of `keys` that the row has: a string, or a whole number (12.0 is 12)."""
        key = self.key(*keys)
        name = as_id(self[key])
        if name is None:
            raise self.error(f"{key!r} is {found(self[key])}, but an id is a string or a whole number")
        return name

    def amount(self, key: str) -> float | int | None:
        """The number, not negative, in `key`; None where it is absent or null."""
        value = self.get(key)
        if value is not None and not (is_number(value) and value >= 0):
            raise self.error(f"{key!r} is {found(value)}, but must be a number, not negative")
        return value

    def image(self, folder: str | os.PathLike | None, name: str) -> Path | None:
        """The path of image `name` inside `folder`; None where no folder is given."""
        try:
            return None if folder is None else resolve_image(folder, name)
        except ImageError as error:
            raise self.error(str(error)) from None


def read_rows(path: str | Path) -> list[Row]:
    """The objects of a JSON file: one list, one object a line, or pretty-printed objects one after another.

    Raises DataError for a file that cannot be read (`medv.reading`), has no rows, or has a row that is no object.
    """
    rows = []
    for place, value in read_values(path):
        if not isinstance(value, dict):
            raise Row({}, path, place).error(f"expected an object with named fields, found {found(value)}")
        rows.append(Row(value, path, place))
    if not rows:
        raise DataError(f"{path} has no rows: is it the right file?")
    return rows


def by_id(rows: Iterable[Row], *keys: str) -> dict[str, Row]:
    """The rows by their ids, or by position (from 0) without one; raises DataError for a duplicate id."""
    named: dict[str, Row] = {}
    for place, row in enumerate(rows):
        name = row.identity(*keys) if any(key in row for key in keys) else str(place)
        if name in named:
            raise row.error(f"the id {name!r} stands in {named[name].place} already: every id must be unique")
        named[name] = row
    return named


def answers_to(asked: Collection[str], path: str | Path) -> dict[str, Row]:
    """The rows of an answer file by `question_id` or `id`, or, where no row has one, by the order of the ids `asked`.

    Raises DataError where only some rows have an id, and where rows without ids are not as many as the questions.
    """
    rows, keys = read_rows(path), ("question_id", "id")
    bare = [row for row in rows if not any(key in row for key in keys)]
    if not bare:
        return by_id(rows, *keys)
    if len(bare) < len(rows):
        raise bare[0].error("no 'question_id', though other rows have one: give every answer its id, or none")
    if len(rows) != len(asked):
        raise DataError(f"{path} has {len(rows)} answers without ids to {len(asked)} questions: give each its question_id")
    return dict(zip(asked, rows, strict=True))


def as_id(value: Any) -> str | None:
    """An id as text, the same for 12, 12.0 and " 12"; None for anything else."""
    if is_number(value) and value == math.floor(value):
        return str(int(value))
    return value.strip() or None if isinstance(value, str) else None


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def found(value: Any) -> str:
    """A value as an error shows it, shortened."""
    return json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
