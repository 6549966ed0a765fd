"""Ownership of outputs: one guard and one lock for every command that writes.

A mapping, `run`, says what a run is made of: "made_by" (the command) and one entry for each thing that decides the result, by
value (a seed) or by contents (the sha256 of data or weights), never by path or time. It is kept with the result, in `run.json`
of a folder and under "run" in every row of a file of JSON lines. An output begun with an equal mapping is continued; anything
else is refused, unchanged, naming what differs.

A lock is refused at once where another process has it, and ends with its process; the thread that has it may take it again.
"""

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from medv.artifacts import as_json, write_json

RUN_FILE, RUN_KEY = "run.json", "run"
LOCK = ".lock"
Run = Mapping[str, Any]


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Keep other processes from working on `out`, a folder (which must exist) or a file, until the block ends.

    Raises ValueError at once where another process does so already.
    """
    place = out / LOCK if out.is_dir() else out.with_name(f".{out.name}{LOCK}")
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.resolve(), timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        holder = place.read_text(encoding="utf-8") if place.is_file() else ""
        raise ValueError(f"another process {holder}is working on {out}: wait for its end, or choose another output") from None
    try:
        place.write_text(f"({os.getpid()}) ", encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:  # while it is held, so that a process that has opened it notices and tries again
            place.unlink(missing_ok=True)
        lock.release()


def check_apart(out: Path, inputs: Iterable[Path | None]) -> None:
    """Raises ValueError where `out` is one of the inputs, under any name, lies in one that is a folder, or has one in it."""
    for given in inputs:
        if given is None or not given.exists():
            continue
        here, there = out.resolve(), given.resolve()
        if here == there or (out.exists() and out.samefile(given)):
            raise ValueError(f"the output {out} is also an input: choose another place for it")
        if there.is_dir() and (here.is_relative_to(there) or there.is_relative_to(here)):
            raise ValueError(f"the output {out} and the input {given} lie in each other: choose another place for it")


def check_new(out: Path, inputs: Iterable[Path | None] = ()) -> None:
    """`check_apart`, and raises FileExistsError where anything is at `out`, a link that leads nowhere included."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists and would be overwritten: choose another name or delete it")
    check_apart(out, inputs)


@contextmanager
def reserve(out: Path, made_by: str, *, inputs: Iterable[Path | None] = ()) -> Iterator[None]:
    """Hold the folder `out`, which is new, empty or begun by `made_by`, before the rest of the run is known.

    Raises ValueError, with nothing changed, for any other folder, for a file, and where `out` and an input are one. A new
    folder that is empty at the end is removed.
    """
    check_apart(out, inputs)
    _begun(out, made_by)
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with hold(out):
            _begun(out, made_by)
            yield
    finally:
        if made and not any(out.iterdir()):
            out.rmdir()


@contextmanager
def claim_folder(out: Path, run: Run, *, inputs: Iterable[Path | None] = ()) -> Iterator[None]:
    """`reserve` the folder `out` for `run` and record it there; raises ValueError where another run was begun in it."""
    with reserve(out, run["made_by"], inputs=inputs):
        check_folder(out, run)
        if not (out / RUN_FILE).exists():
            write_json(out / RUN_FILE, run)
        yield


def check_folder(out: Path, run: Run) -> None:
    """Raises ValueError as `claim_folder` does, and changes nothing."""
    if (begun := _begun(out, run["made_by"])) is not None:
        _check_same(out, begun, run)


def _begun(out: Path, made_by: str) -> Run | None:
    """The run that was begun in a folder; None where it is empty or absent."""
    if not out.exists() and not out.is_symlink():
        return None
    if not out.is_dir():
        raise ValueError(f"{out} is not a folder: choose another output")
    if (out / RUN_FILE).is_file():
        return _check_maker(out, _parsed((out / RUN_FILE).read_bytes()), made_by)
    check_empty(out)
    return None


def check_empty(out: Path, *, beside: Iterable[str] = ()) -> None:
    """Raises ValueError where the folder `out` holds anything but our lock, what a crash tore, and the names in `beside`."""
    known = {LOCK, *beside}
    if found := sorted(path.name for path in out.iterdir() if path.name not in known and ".partial." not in path.name):
        raise ValueError(
            f"{out} holds other files ({found[0]}) and no run that could go on: choose a new or empty folder as the output"
        )


@contextmanager
def reserve_file(out: Path, made_by: str, *, inputs: Iterable[Path | None] = ()) -> Iterator[None]:
    """Hold the file of JSON lines `out`, which is absent, empty, or has rows of `made_by` alone.

    Raises ValueError, with nothing changed, for any other content, for what is no regular file, and for an input.
    """
    check_apart(out, (path for path in inputs if path is not None and not path.is_dir()))
    _rows(out, made_by)
    with hold(out):
        yield


@contextmanager
def claim_file(out: Path, run: Run, *, inputs: Iterable[Path | None] = ()) -> Iterator[list[dict[str, Any]]]:
    """`reserve_file` for `run`, and yield the rows that are there; raises ValueError where they are another run's."""
    with reserve_file(out, run["made_by"], inputs=inputs):
        yield owned_rows(out, run)


def owned(run: Run, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its run, in front, so that a line torn by a crash is recognized by its beginning."""
    return {RUN_KEY: dict(run), **row}


def owned_rows(out: Path, run: Run) -> list[dict[str, Any]]:
    """The whole rows of a file of JSON lines, all of them of `run`; none where there is no file.

    Raises ValueError for anything else than such rows and a last line that a crash has torn.
    """
    rows = _rows(out, run["made_by"])
    for row in rows:
        _check_same(out, row[RUN_KEY], run)
    return rows


def _rows(out: Path, made_by: str) -> list[dict[str, Any]]:
    """The whole rows of a file, all of them by `made_by`."""
    if not out.exists():
        return []
    if not stat.S_ISREG(out.stat().st_mode):
        raise ValueError(f"{out} is not a file: choose another output")
    begins = json.dumps(owned({"made_by": made_by}, {})).removesuffix("}}").encode()
    with out.open("rb") as stream:
        first = stream.read(len(begins))  # of what may be a large file of somebody else
        *lines, torn = (first + (stream.read() if first == begins else b"")).split(b"\n")
    if not begins.startswith(first) or torn[: len(begins)] != begins[: len(torn)]:
        _check_maker(out, None, made_by)
    rows = [_parsed(line) for line in lines]
    for row in rows:
        _check_maker(out, row.get(RUN_KEY) if isinstance(row, dict) else None, made_by)
    return rows


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _check_maker(out: Path, begun: Any, made_by: str) -> Run:
    if not isinstance(begun, dict) or begun.get("made_by") != made_by:
        raise ValueError(
            f"{out} was not made by this version's {made_by}, so that it cannot go on: choose another output, or delete it"
        )
    return begun


def _check_same(out: Path, begun: Run, run: Run) -> None:
    """Raises ValueError, naming what differs, where `begun`, read from a file, is not the mapping `run`."""
    if changes := list(differences(begun, as_json(run))):
        raise ValueError(f"{out} was made from something else ({', '.join(changes)}): choose another output, or delete it")


def differences(begun: Run, now: Run, place: str = "") -> Iterator[str]:
    """Descriptions of what differs: values as "seed 0, now 9", contents (sha256) as "data changed"."""
    for name in dict.fromkeys((*now, *begun)):
        before, after, where = begun.get(name), now.get(name), f"{place}{name}"
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{where}.")
        elif before != after:
            values = all(len(str(value)) < 64 and not isinstance(value, dict) for value in (before, after))
            yield f"{where} {before}, now {after}" if values else f"{where} changed"
