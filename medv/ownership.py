"""Whose a file or folder is: one guard and one lock for everything that takes --out.

A run says what it is made of in a mapping, `run`: "made_by" (the command) and one entry for each thing that decides the
result, by value (a seed) or by contents (the sha256 of data or weights), never by place or time. The mapping is kept with the
result, in `run.json` of a folder and under "run" in every row of a file of JSON lines. What is there already is continued
where it was begun with an equal mapping; anything else is refused, unchanged, with the names of what differs:

    with claim_folder(out, run, inputs=[init]):            # new, empty, or begun by the same run; locked inside the block
        ...
    with claim_file(out, run, inputs=[questions]) as rows:  # the rows that are there; new ones are `owned(run, row)`
        append_jsonl(out, owned(run, row))
    with hold(out):                                         # the lock alone, of a file or folder
        ...
    check_apart(out, inputs)                                # out is none of the inputs, by whatever name or link
    check_new(out)                                          # nothing is there yet

A lock is refused at once where another process has it, and ends with its process, however that dies.
"""

import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from medv.artifacts import write_json

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
    lock = FileLock(place, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process is working on {out}: wait for its end, or choose another --out") from None
    try:
        yield
    finally:
        place.unlink(missing_ok=True)  # while it is held: who opened it meanwhile sees that it is gone, and tries anew
        lock.release()


def check_apart(out: Path, inputs: Iterable[Path | None]) -> None:
    """Raises ValueError where `out` is one of the inputs, lies in one that is a folder, or has one in it."""
    for given in inputs:
        if given is None or not given.exists():
            continue
        here, there = out.resolve(), given.resolve()
        if here == there or (out.exists() and out.samefile(given)):
            raise ValueError(f"--out {out} is also an input: choose another --out")
        if there.is_dir() and (here.is_relative_to(there) or there.is_relative_to(here)):
            raise ValueError(f"--out {out} and the input {given} lie in each other: choose another --out")


def check_new(out: Path) -> None:
    """Raises FileExistsError where there is anything at `out`, a link that leads nowhere included."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists and would be overwritten: choose another name or delete it")


@contextmanager
def claim_folder(out: Path, run: Run, *, inputs: Iterable[Path | None] = ()) -> Iterator[None]:
    """Hold the folder `out` for `run`: it is made, or empty, or the same run was begun in it.

    Raises ValueError, with nothing changed, for any other folder, for a file, and where `out` and an input are one.
    """
    check_apart(out, inputs)
    _check_folder(out, run)
    out.mkdir(parents=True, exist_ok=True)
    with hold(out):
        _check_folder(out, run)
        if not (out / RUN_FILE).exists():
            write_json(out / RUN_FILE, run)
        yield


def _check_folder(out: Path, run: Run) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is not a folder: choose another --out")
    if (out / RUN_FILE).is_file():
        try:
            begun = json.loads((out / RUN_FILE).read_text(encoding="utf-8"))
        except ValueError:
            begun = None
        _check_same(out, begun, run)
    elif found := [path.name for path in out.iterdir() if path.name != LOCK and ".partial." not in path.name]:
        raise ValueError(
            f"{out} holds other files ({found[0]}) and no run that could go on: choose a new or empty folder for --out"
        )


@contextmanager
def claim_file(out: Path, run: Run, *, inputs: Iterable[Path | None] = ()) -> Iterator[list[dict[str, Any]]]:
    """Hold the file of JSON lines `out` for `run`, and give the rows that are there: none, or rows of the same run.

    Raises ValueError, with nothing changed, for any other content, for what is no regular file, and for an input.
    """
    check_apart(out, (path for path in inputs if path is not None and not path.is_dir()))
    owned_rows(out, run)
    with hold(out):
        yield owned_rows(out, run)


def owned(run: Run, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with what it belongs to, in front, so that a line torn by a crash is known by its beginning."""
    return {RUN_KEY: dict(run), **row}


def owned_rows(out: Path, run: Run) -> list[dict[str, Any]]:
    """The whole rows of a file of JSON lines, all of them of `run`; none where there is no file.

    Raises ValueError for anything else than such rows, and a last line that a crash has torn.
    """
    if not out.exists():
        return []
    if not stat.S_ISREG(out.stat().st_mode):
        raise ValueError(f"{out} is not a file: choose another --out")
    *lines, torn = out.read_bytes().split(b"\n")
    begins = json.dumps(owned({"made_by": run["made_by"]}, {})).removesuffix("}}").encode()
    if torn[: len(begins)] != begins[: len(torn)]:
        raise ValueError(f"{out} was not made by {run['made_by']}: choose another --out")
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        _check_same(out, row.get(RUN_KEY) if isinstance(row, dict) else None, run)
        rows.append(row)
    return rows


def _check_same(out: Path, begun: Any, run: Run) -> None:
    """Raises ValueError, naming what differs, where `begun` is not the mapping `run`."""
    now = json.loads(json.dumps(run))  # tuples become lists, as in the file
    if not isinstance(begun, dict) or begun.get("made_by") != now["made_by"]:
        raise ValueError(
            f"{out} was not made by this version's {now['made_by']}, so that it cannot go on: "
            "choose another --out, or delete it"
        )
    if changes := list(differences(begun, now)):
        raise ValueError(
            f"{out} was made from something else ({', '.join(changes)}): choose another --out, or delete it"
        )


def differences(begun: Run, now: Run, place: str = "") -> Iterator[str]:
    """What differs, in words: values as "seed 0, now 9", contents (sha256) as "data changed"."""
    for name in dict.fromkeys((*now, *begun)):
        before, after, where = begun.get(name), now.get(name), f"{place}{name}"
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{where}.")
        elif before != after:
            values = all(len(str(value)) < 64 and not isinstance(value, dict) for value in (before, after))
            yield f"{where} {before}, now {after}" if values else f"{where} changed"
