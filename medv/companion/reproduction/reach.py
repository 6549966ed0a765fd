"""The part of the library that a notebook can feel: the modules that its code imports, directly or through others.

Read from the import statements alone, so that it takes no time and imports nothing. A data file belongs to the package folder
that holds it. Where the statements do not tell (a name that `medv` loads lazily, a shell line), the whole library counts.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from medv.artifacts import PACKAGE

BLIND = (
    "cli.py",
    "commands/bench.py",
    "commands/console.py",
    "commands/evaluate.py",
    "doctor.py",
    "reproduce.py",
    "experiments/registry.py",
    "experiments/cache.py",
    "experiments/reach.py",
)
BLIND += ("experiments/execute.py", "report/index.py", "report/index.css")
"""What cannot change a result though a notebook may import it: the driver, the declarations and the index page."""


def library_of(cells: Iterable[str]) -> dict[str, str]:
    """Map each library file (as "data/phantoms.py") that these code cells can feel to the sha256 of its bytes."""
    code = "\n".join(cells)
    lines = code.split("\n")
    python = "\n".join("" if line.lstrip().startswith(("!", "%")) else line for line in lines)
    reached = _closure(_imported(python)) if python == code else None
    files = sorted(_files() if reached is None else _with_data(reached))
    names = {path: path.relative_to(PACKAGE).as_posix() for path in files}
    return {names[path]: _digest(path) for path in files if names[path] not in BLIND}


def _imported(source: str) -> Iterator[str]:
    """The dotted names that a source imports; for `from a import b`, which may be a module, a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _closure(names: Iterable[str]) -> set[Path] | None:
    """The modules reached from these names; None if one is a lazy name of `medv` itself, which may lead anywhere."""
    reached: set[Path] = set()
    queue = list(names)
    while queue:
        first, *rest = queue.pop().split(".")
        if first != "medv":
            continue
        modules = [path for depth in range(len(rest) + 1) if (path := _module(rest[:depth]))]
        if len(modules) == 1 and rest != ["__version__"]:
            return None
        for path in modules:
            if path not in reached:
                reached.add(path)
                queue += _imports_of(path)
    return reached


def _module(names: list[str]) -> Path | None:
    base = PACKAGE.joinpath(*names)
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


@cache
def _imports_of(path: Path) -> tuple[str, ...]:
    return tuple(_imported(path.read_text(encoding="utf-8")))


@cache
def _files() -> tuple[Path, ...]:
    return tuple(f for f in PACKAGE.rglob("*") if f.is_file() and f.suffix != ".pyc" and not f.name.startswith("."))


def _with_data(modules: set[Path]) -> set[Path]:
    """These modules and the data files of their packages; data of the top package always count."""
    packages = {path.parent for path in modules} | {PACKAGE}

    def package(path: Path) -> Path:
        return next(folder for folder in path.parents if (folder / "__init__.py").is_file())

    return modules | {path for path in _files() if path.suffix != ".py" and package(path) in packages}


@cache
def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
