"""Atomic writes, fingerprints, manifests and resumable JSON lines.

A run killed at any moment leaves no half-written file, and each result records what made it.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from medv import __version__, limits
from medv.reading import DataError, check_regular, read_lines

PACKAGE = Path(__file__).parent
MANIFEST = "manifest.json"
CARD = "README.md"  # of a model's folder
SPEED = "speed.json"  # time and memory of a training
UNREAD = (MANIFEST, CARD, SPEED)  # in a folder, of no account for its fingerprint


def default_out(profile: str, seed: int = 0) -> Path:
    """`runs/<profile>`, or `runs/<profile>-seed<seed>` where the seed is not 0, in the nearest folder with a pyproject.toml at
    or above the current one, else in the current one.
    """
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / "pyproject.toml").is_file()), here)
    return root / "runs" / (f"{profile}-seed{seed}" if seed else profile)


def _plain(value: Any) -> Any:
    """The `default` of `json.dumps` for numpy values, paths, dataclasses and sets."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def as_json(value: Any) -> Any:
    """`value` as it comes back from a JSON file: tuples as lists, numpy values, paths and dataclasses as plain values."""
    return json.loads(json.dumps(value, default=_plain))


def disk_is_full(error: Exception) -> bool:
    """Whether an error means that a file could not grow; torch and safetensors have messages of their own for it."""
    full = r"No space left|File too large|quota|os error (27|28|122)\b|PytorchStreamWriter|unexpected pos"
    return bool(re.search(full, str(error), re.IGNORECASE))


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is flushed to disk and renamed to `path`, else removed.

    Raises DataError where `path` is a folder, a pipe, a device or a socket.
    """
    path = Path(path)
    check_regular(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}.partial.{path.name}")
    try:
        with _named(path, partial):
            yield partial
            with partial.open("rb+") as stream:
                os.fsync(stream.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _named(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Let an OSError name `path`: that of a full disk names no file, others may name `partial`."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, str(partial), partial):
            error.filename, error.filename2 = str(path), None
        raise


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` (UTF-8, newlines as given) to `path` atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON to `path` atomically; numpy values, paths and dataclasses are converted."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n")


@contextmanager
def atomic_directory(target: str | Path, keep: str | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `target` to build in; it replaces `target` only when the block ends without an error.

    A process killed inside the block leaves `target` as it was; the next builder removes the unfinished folder. A builder that
    passes `keep`, a name for exactly this work, gets its own unfinished folder back.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{keep or os.getpid()}")
    for left in target.parent.glob(f".{target.name}.partial-*"):
        if _has_builder(left.name.rpartition("-")[2]) or (keep and left == partial):
            continue
        if ".partial-old-" in left.name and not target.exists():  # killed between the two renames below
            left.rename(target)
        else:
            shutil.rmtree(left)
    partial.mkdir(exist_ok=True)
    try:
        yield partial
        if target.exists():
            old = target.with_name(f".{target.name}.partial-old-{os.getpid()}")
            target.rename(old)
            partial.rename(target)
            old.unlink() if old.is_symlink() else shutil.rmtree(old)
        else:
            partial.rename(target)
    finally:
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)


def _has_builder(owner: str) -> bool:
    """Whether `owner`, the end of an unfinished folder's name, is the number of another running process."""
    if not owner.isdigit() or int(owner) == os.getpid():
        return False
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def append_jsonl(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append one record as a JSON line and flush it to disk, after cutting off a line torn by an earlier crash."""
    path = Path(path)
    check_regular(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, ensure_ascii=False, default=_plain).encode() + b"\n"
    with _named(path), path.open("ab+") as stream:
        if size := stream.seek(0, os.SEEK_END):
            stream.seek(size - 1)
            if stream.read(1) != b"\n":
                stream.seek(0)
                stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read JSON lines; a missing file is an empty list, and a last line without its newline (torn by a crash) is dropped.

    Raises DataError, naming the line, if any other line is not JSON.
    """
    if not Path(path).exists():
        return []
    records = []
    for _, record in read_lines(path, whole=True):
        if isinstance(record, DataError):
            raise record
        records.append(record)
    return records


def fingerprint(*things: Any) -> str:
    """The sha256 (hex) of files, folders (names and contents, without `UNREAD`) and JSON-like values, in order.

    A `Path` stands for the bytes there, whatever its name; anything else is hashed as canonical JSON. Manifests hold times and
    cards may be edited: without them equal weights are equal. Raises FileNotFoundError for a path that does not exist.
    """
    digest = hashlib.sha256()
    for thing in things:
        canonical = (
            _path_digest(thing) if isinstance(thing, Path) else json.dumps(thing, sort_keys=True, default=_plain).encode()
        )
        digest.update(canonical + b"\0")
    return digest.hexdigest()


def _path_digest(path: Path) -> bytes:
    if path.is_dir():
        return _tree_digest(path, (f for f in path.rglob("*") if f.is_file() and f.name not in UNREAD))
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _tree_digest(root: Path, files: Iterable[Path]) -> bytes:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + _path_digest(file))
    return digest.digest()


@cache
def code_fingerprint(exclude: tuple[str, ...] = ()) -> str:
    """The sha256 of the installed medv package, sources and data files, without `exclude` (paths inside it) and bytecode."""
    skip = {PACKAGE / name for name in exclude}
    files = (f for f in PACKAGE.rglob("*") if f.is_file() and "__pycache__" not in f.parts and f not in skip)
    return _tree_digest(PACKAGE, (f for f in files if not f.name.startswith("."))).hex()


@cache
def versions() -> dict[str, str | None]:
    """The installed versions of Python and of the packages that can change a result (None: not installed)."""
    found: dict[str, str | None] = {"python": platform.python_version(), "medv": __version__}
    names = "torch", "transformers", "tokenizers", "peft", "deepspeed", "accelerate", "numpy", "pandas", "pillow"
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> str:
    """The kind of computer, without its name: operating system, processor, number of cores."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


@cache
def git_commit() -> str | None:
    """The commit of the source tree that medv runs from, with "+changes" if it differs from it; None outside git."""
    git = ["git", "-C", str(PACKAGE)]
    try:
        # Without this test, an installed copy would report the commit of whatever repository surrounds the environment.
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def placeless(value: Any) -> Any:
    """`value` for a file that may be published: every absolute path in it, at any depth, is reduced to its last part."""
    if isinstance(value, Mapping):
        return {placeless(name): placeless(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [placeless(part) for part in value]
    return Path(value).name if isinstance(value, str | Path) and Path(value).is_absolute() else value


def relative(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`, both without links, with "/" between its parts: a note that holds when both move."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The origin of a result: enough to reproduce it, and to see what has changed since.

    `inputs` maps the name of each artifact read to its fingerprint; `about` holds what only this kind of result has (a caption,
    the label of the data, a test score). `threads` is OMP_NUM_THREADS, None where it was not set: the order of sums, and so the
    last digits, depend on it.
    """

    name: str
    profile: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float | None = None
    versions: dict[str, str | None] = dataclasses.field(default_factory=versions)
    code: str = dataclasses.field(default_factory=code_fingerprint)
    commit: str | None = dataclasses.field(default_factory=git_commit)
    platform: str = dataclasses.field(default_factory=machine)
    threads: str | None = dataclasses.field(default_factory=lambda: os.environ.get("OMP_NUM_THREADS"))
    created: str = dataclasses.field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def write(self, path: str | Path) -> Path:
        """Write the manifest as JSON, `placeless`; a folder gets it as `manifest.json`."""
        path = Path(path)
        return write_json(path / MANIFEST if path.is_dir() else path, placeless(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a manifest from a file, or from `manifest.json` in a folder; raises ValueError if it is not one."""
        path = Path(path)
        path = path / MANIFEST if path.is_dir() else path
        check_regular(path)
        try:
            made = cls(**json.loads(path.read_text(encoding="utf-8")))
            for name in ("profile", "parameters", "inputs", "about", "versions"):
                if not isinstance(getattr(made, name), dict):
                    raise ValueError(f"its {name} is no object")
            if made.seed is not None:
                limits.seed("its seed", made.seed)
        except (RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a medv manifest: {error}") from None
        return made
