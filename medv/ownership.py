"""Whose a file or folder is: one guard and one lock for everything that takes --out.

A run says what it is made of in a mapping, `run`: "made_by" (the command) and one entry for each thing that decides the
result, by value (a seed) or by contents (the sha256 of data or weights), never by place or time. The mapping is kept with the
result, in `run.json` of a folder and under "run" in every row of a file of JSON lines. What is there already is continued
where it was begun with an equal mapping; anything else is refused, unchanged, with the names of what differs:

    with claim_folder(out, run, inputs=[init]):            # new, empty, or begun by the same run; locked inside the block
        ...
    with claim_file(out, run, inputs=[questions]) as rows:  # the rows that are there; new ones are `owned(run, row)`
        append_jsonl(out, owned(run, row))
    with reserve(out, "medv train", inputs=[init]):         # the folder held, before it is known what the run is made of
        ...
    with reserve_file(out, "medv judge", inputs=[answers]):
        ...
    with hold(out):                                         # the lock alone, of a file or folder
        ...
    check_apart(out, inputs)                                # out is none of the inputs, by whatever name or link
    check_new(out, inputs)                                  # that, and nothing is there yet
    check_empty(out)                                        # a folder without anything of others

A lock is refused at once where another process has it, and ends with its process, however that dies; the thread that has it
may take it again.
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
        raise ValueError(f"another process {holder}is working on {out}: wait for its end, or choose another --out") from None
    try:
        place.write_text(f"({os.getpid()}) ", encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:  # while it is held: who opened it meanwhile sees that it is gone, and tries anew
            place.unlink(missing_ok=True)
        lock.release()


def check_apart(out: Path, inputs: Iterable[Path | None]) -> None:
    """Raises ValueError where `out` is one of the inputs, lies in one that is a folder, or has one in it."""
    for given in inputs:
        if given is None or not given.exists():
            continue
        here, there = out.resolve(), given.resolve()
        if here == there or (out.exists() and out.samefile(given)):
            raise ValueError(f"the output {out} is also an input: choose another place for it")
        if there.is_dir() and (here.is_relative_to(there) or there.is_relative_to(here)):
            raise ValueError(f"the output {out} and the input {given} lie in each other: choose another place for it")


def check_new(out: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Raises FileExistsError where there is anything at `out`, a link that leads nowhere included; else as `check_apart`."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists and would be overwritten: choose another name or delete it")
    check_apart(out, inputs)


@contextmanager
def reserve(out: Path, made_by: str, *, inputs: Iterable[Path | None] = ()) -> Iterator[None]:
    """Hold the folder `out`: it is made, or empty, or a run of `made_by` was begun in it.

    Raises ValueError, with nothing changed, for any other folder, for a file, and where `out` and an input are one. A folder
    that was made here and is empty at the end is removed.
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
    """`reserve` the folder `out` for `run`, and note it there; raises ValueError where another run was begun in it."""
    with reserve(out, run["made_by"], inputs=inputs):
        check_folder(out, run)
        if not (out / RUN_FILE).exists():
            write_json(out / RUN_FILE, run)
        yield


def check_folder(out: Path, run: Run) -> None:
    """Raises ValueError as `claim_folder` does, and changes nothing."""
    begun = _begun(out, run["made_by"])
    if begun is not None:
        _check_same(out, begun, run)


def _begun(out: Path, made_by: str) -> Run | None:
    """What was begun in a folder; None where it is empty or absent."""
    if not out.exists() and not out.is_symlink():
        return None
    if not out.is_dir():
        raise ValueError(f"{out} is not a folder: choose another --out")
    if (out / RUN_FILE).is_file():
        try:
            begun = json.loads((out / RUN_FILE).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            begun = None
        return _check_maker(out, begun, made_by)
    check_empty(out)
    return None


def check_empty(out: Path, *, beside: Iterable[str] = ()) -> None:
    """Raises ValueError where the folder `out` holds anything but our lock, what a crash tore, and the names in `beside`."""
    known = {LOCK, *beside}
    found = sorted(path.name for path in out.iterdir() if path.name not in known and ".partial." not in path.name)
    if found:
        raise ValueError(
            f"{out} holds other files ({found[0]}) and no run that could go on: choose a new or empty folder for --out"
        )


@contextmanager
def reserve_file(out: Path, made_by: str, *, inputs: Iterable[Path | None] = ()) -> Iterator[None]:
    """Hold the file of JSON lines `out`: it is absent, empty, or has rows of `made_by` alone.

    Raises ValueError, with nothing changed, for any other content, for what is no regular file, and for an input.
    """
    check_apart(out, (path for path in inputs if path is not None and not path.is_dir()))
    _rows(out, made_by)
    with hold(out):
        yield


@contextmanager
def claim_file(out: Path, run: Run, *, inputs: Iterable[Path | None] = ()) -> Iterator[list[dict[str, Any]]]:
    """`reserve_file` for `run`, and give the rows that are there; raises ValueError where they are another run's."""
    with reserve_file(out, run["made_by"], inputs=inputs):
        yield owned_rows(out, run)


def owned(run: Run, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with what it belongs to, in front, so that a line torn by a crash is known by its beginning."""
    return {RUN_KEY: dict(run), **row}


def owned_rows(out: Path, run: Run) -> list[dict[str, Any]]:
    """The whole rows of a file of JSON lines, all of them of `run`; none where there is no file.

    Raises ValueError for anything else than such rows, and a last line that a crash has torn.
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
        raise ValueError(f"{out} is not a file: choose another --out")
    begins = json.dumps(owned({"made_by": made_by}, {})).removesuffix("}}").encode()
    with out.open("rb") as stream:
        first = stream.read(len(begins))  # of what may be a large file of somebody else
        *lines, torn = (first + (stream.read() if first == begins else b"")).split(b"\n")
    if first != begins[: len(first)] or torn[: len(begins)] != begins[: len(torn)]:
        _check_maker(out, None, made_by)
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        _check_maker(out, row.get(RUN_KEY) if isinstance(row, dict) else None, made_by)
        rows.append(row)
    return rows


def _check_maker(out: Path, begun: Any, made_by: str) -> Run:
    if not isinstance(begun, dict) or begun.get("made_by") != made_by:
        raise ValueError(
            f"{out} was not made by this version's {made_by}, so that it cannot go on: choose another --out, or delete it"
        )
    return begun


def _check_same(out: Path, begun: Run, run: Run) -> None:
    """Raises ValueError, naming what differs, where `begun`, read from a file, is not the mapping `run`."""
    if changes := list(differences(begun, as_json(run))):
        raise ValueError(f"{out} was made from something else ({', '.join(changes)}): choose another --out, or delete it")


def differences(begun: Run, now: Run, place: str = "") -> Iterator[str]:
    """What differs, in words: values as "seed 0, now 9", contents (sha256) as "data changed"."""
    for name in dict.fromkeys((*now, *begun)):
        before, after, where = begun.get(name), now.get(name), f"{place}{name}"
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{where}.")
        elif before != after:
            values = all(len(str(value)) < 64 and not isinstance(value, dict) for value in (before, after))
            yield f"{where} {before}, now {after}" if values else f"{where} changed"
