"""Reading files that others wrote: bounded, strict about JSON, and safe to show in a terminal.

A FIFO, a device or a file of many gigabytes is refused before it is read, so that no input hangs a command. JSON is stricter
than Python's: no NaN, no duplicate key, no lone surrogate, no deep nesting. Errors are one sentence with the file, the line and
the remedy.
"""

import codecs
import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO
from unicodedata import category

LARGEST = 1 << 30
"""Bytes of a file that is read whole (1 GiB); the largest published annotation file has about 0.4 GB."""
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_MENDS = {
    errno.ENOENT: "does not exist",
    errno.EACCES: "may not be read or written by this user: change its permissions or choose another place",
    errno.EPERM: "may not be changed by this user: choose another place",
    errno.EROFS: "is on a read-only disk: choose another place",
    errno.ENOSPC: "cannot be written, because the disk is full: make room and run again",
    errno.EDQUOT: "cannot be written, because the disk quota is used up: make room and run again",
    errno.EFBIG: "cannot be written, because it would be larger than a file may be here: raise the limit (ulimit -f)",
    errno.ENAMETOOLONG: "has too long a name: shorten it",
    errno.EISDIR: "is a folder: give a file",
    errno.ENOTDIR: "cannot be, because a part of its path is a file: give another path",
    errno.ELOOP: "is a link that leads back to itself: give the file",
    errno.EEXIST: "exists already: choose another name or remove it",
}
DEEPEST = 64
"""Levels of nesting in a JSON value."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # perhaps a lone one
_SPACE = re.compile(r"[ \t\r\n]*")


class DataError(ValueError):
    """One sentence about what is wrong with a data file, where, and the remedy."""


def in_a_sentence(error: OSError) -> str:
    """An operating system's error as a sentence that begins with the path, if the error has one."""
    if error.errno is None:  # raised by hand, with a sentence of its own
        return " ".join(str(error).split())
    path = str(error.filename) if error.filename is not None else "a file"
    return f"{path} {_MENDS.get(error.errno, f'cannot be used: {error.strerror or error}')}"


def visible(text: str, *, keep: str = "") -> str:
    """`text` with escapes for the characters that a terminal would obey or hide: controls, line ends (unless in `keep`), marks
    that change the direction of writing, surrogates.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep or category(c) == "Zs" else c.encode("unicode_escape").decode() for c in text
    )


def check_regular(path: str | Path, status: os.stat_result | None = None) -> None:
    """Raises DataError where `path` (or the open file of `status`) is there, but is a folder, a pipe, a device or a socket."""
    if status is None:
        try:
            status = Path(path).stat()
        except FileNotFoundError:
            return
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "no regular file")
        raise DataError(f"{path} is {kind}: give a regular file")


@contextmanager
def open_regular(path: str | Path, *, largest: int | None = None) -> Iterator[BinaryIO]:
    """Open a regular file of at most `largest` bytes (None: any size) for reading, without waiting for a pipe or a device.

    Raises DataError for anything else, and for an OSError inside the block.
    """
    if "\0" in str(path):
        raise DataError(f"{str(path)!r} is not a file name")
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    try:
        check_regular(path, Path(path).stat())  # before the open, which would wake a device
        with os.fdopen(os.open(path, flags), "rb") as stream:
            status = os.fstat(stream.fileno())
            check_regular(path, status)  # again: by now the name may belong to another file
            if largest is not None and status.st_size > largest:
                raise DataError(f"{path} has {status.st_size} bytes, over the limit of {largest}: is it the right file?")
            yield stream
    except OSError as error:
        error.filename = path  # a failed read does not name it
        raise DataError(in_a_sentence(error)) from None


def read_bytes(path: str | Path, *, largest: int = LARGEST) -> bytes:
    """The contents of a regular file of at most `largest` bytes; raises DataError for anything else."""
    with open_regular(path, largest=largest) as stream:
        data = stream.read(largest + 1)
    if len(data) > largest:  # it grew, or is of a kind that has no size
        raise DataError(f"{path} has more than the limit of {largest} bytes: is it the right file?")
    return data


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; raises DataError."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8 text (byte {error.start}): save the file as UTF-8") from None


def parse_json(text: str, where: str | Path, line: int = 1) -> Any:
    """The one value that `text` holds; raises DataError, with `where` and the line, for anything else."""
    reader = _Values(text, where, line)
    reader.skip()
    value = reader.value()
    if reader.skip():
        raise reader.error("not JSON (more than one value)")
    return value


def read_json(path: str | Path) -> Any:
    """The one value of a JSON file; raises DataError."""
    return parse_json(read_text(path), path)


def read_values(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The place ("row 2" of one list, "line 2" of values one after another) and the value of each row.

    Raises DataError, naming the line, at the first that is not JSON.
    """
    # Not by lines: answers contain separators that str.splitlines takes for line ends, and objects may span lines.
    reader = _Values(read_text(path), path)
    if reader.skip() != "[":
        while reader.skip():
            yield f"line {reader.line}", reader.value()
        return
    reader.place += 1
    more = reader.skip() != "]"
    for number in count(1):
        if not more:
            break
        yield f"row {number}", reader.value()
        sign = reader.skip()
        if sign not in (",", "]"):
            raise reader.error("not JSON (a comma or the end of the list is missing); is the file complete?")
        more = sign == ","
        reader.place += more
        reader.skip()
    reader.place += 1
    if reader.skip():
        raise reader.error("not JSON (something follows the list): give one list, or one object a line")


def read_lines(path: str | Path, *, whole: bool = False) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line that is not blank; for a line that is not JSON, its DataError instead.

    whole: drop a last line without its newline, which a crash tore.
    """
    lines = read_bytes(path).removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines[:-1] if whole else lines, start=1):
        try:
            if text := line.decode().strip(" \t\r"):
                yield number, parse_json(text, path, number)
        except UnicodeDecodeError:
            yield number, DataError(f"{path} line {number}: not UTF-8 text: save the file as UTF-8")
        except DataError as error:
            yield number, error


class _Values:
    """A position in a text of JSON values, and its line."""

    def __init__(self, text: str, where: str | Path, line: int = 1):
        self.text, self.where, self.place, self.line = text, where, 0, line

    def error(self, message: str) -> DataError:
        return DataError(f"{self.where} line {self.line}: {message}")

    def skip(self) -> str:
        """Skip white space; returns the next character, empty at the end."""
        self._go(_SPACE.match(self.text, self.place).end())
        return self.text[self.place : self.place + 1]

    def value(self) -> Any:
        """The value that begins here."""
        try:
            value, end = _DECODER.raw_decode(self.text, self.place)
        except json.JSONDecodeError as error:
            self._go(error.pos)
            raise self.error(f"not JSON ({error.msg}); is the file complete?") from None
        except RecursionError:
            raise self.error("nested too deeply to be a data file") from None
        except (ValueError, OverflowError) as error:  # of the decoder's hooks, or a number of thousands of digits
            raise self.error(f"not JSON as it should be ({str(error).partition(';')[0]})") from None
        source = self.text[self.place : end]
        if source.count("[") + source.count("{") > DEEPEST and _depth(value) > DEEPEST:
            raise self.error("nested too deeply to be a data file")
        if _SURROGATE.search(source):
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start].encode("unicode_escape").decode()
                raise self.error(f"{half} is half of a character (a lone surrogate): remove it") from None
        self._go(end)
        return value

    def _go(self, place: int) -> None:
        self.line += self.text.count("\n", self.place, place)
        self.place = place


def _depth(value: Any) -> int:
    """The levels of nesting, of at most as many as Python's decoder reads."""
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        level = [part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole)]
    return depth


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return fields


def _number(text: str) -> int:
    number = int(text)
    float(number)  # an OverflowError for one that nothing can be counted with
    return number


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no value of JSON: write null or leave the field out")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_number)
