"""Decides whether a notebook has to run again: its fingerprint, what its last run recorded, and the difference as text.

A fingerprint has parts: the notebook's code, its parameters, the profile, the library files that can affect it, its inputs,
the versions of torch and transformers. They are recorded as they are, so that a stale result can say why it is stale. The
library files are those that the notebook's code imports, directly or through others, read from the import statements alone;
where these do not tell (a name that `medv` loads lazily, a shell line), the whole library counts.
"""

import ast
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from medv.artifacts import PACKAGE, as_json, fingerprint, versions, write_json
from medv.companion.reproduction.materials import Materials
from medv.companion.studies.node import Node
from medv.profiles import Profile

RESUME_KEY = "MEDV_RESUME_KEY"
"""Set in a notebook's environment to its fingerprint: unfinished work of the very same notebook may be continued."""

FORCE_KEY = "MEDV_FORCE"
"""Set in a notebook's environment: artifacts are made anew even where they exist."""

SUFFIXES = (".png", ".svg", ".csv", ".json")
"""The files of each figure and table."""

_DRIVER = ("registry.py", "cache.py", "execute.py", "reproduce.py", "cluster.py", "budget.py", "index.py", "publish.py")
_PAGES = ("index.css", "index.html.jinja", "results.css", "results.html.jinja", "exhibits.html.jinja")
BLIND = {"cli.py", "doctor.py", *(f"commands/{name}.py" for name in ("bench", "console", "evaluate", "publish"))}
BLIND |= {"checkpoints/card.py", "checkpoints/card.md.jinja"}
BLIND |= {f"companion/reproduction/{name}" for name in _DRIVER + _PAGES}
"""Files that cannot change a result though a notebook may import them: the driver, declarations, the look of pages, cards."""


@dataclass(frozen=True)
class Workshop:
    """The notebooks' folder, the run folder, the profile, the seed and the configuration file with its materials of one
    reproduction, and what each node left there.
    """

    notebooks: Path
    out: Path
    profile: Profile
    seed: int
    materials: Materials = field(default_factory=Materials)
    config: Path | None = None

    def parameters(self, node: Node) -> dict[str, Any]:
        """Everything that papermill passes to the notebook of `node`."""
        config = {} if self.config is None else {"config": str(self.config)}
        return {"profile": self.profile.name, "seed": self.seed, "out": str(self.out), **config, **node.parameters}

    def check_parameters(self, node: Node) -> None:
        """Raise ValueError if the notebook would be passed a parameter that it does not have (papermill only warns)."""
        known = parameter_names(self.notebooks / node.notebook)
        unknown = [name for name in self.parameters(node) if name not in known]
        if unknown:
            raise ValueError(f"{node.notebook} has no parameter {', '.join(map(repr, unknown))}: it takes {', '.join(known)}")

    def products(self, node: Node) -> dict[str, tuple[Path, ...]]:
        """The files or folders of each artifact, figure and table of `node`."""
        made = {name: (self.out / name,) for name in node.makes}
        return made | {name: tuple(self.out / "figures" / f"{name}{s}" for s in SUFFIXES) for name in node.results}

    def missing(self, node: Node) -> list[str]:
        """The products of `node` that do not exist, or only in part."""
        return [name for name, paths in self.products(node).items() if not all(path.exists() for path in paths)]

    def made_from(self, node: Node) -> dict[str, Any]:
        """The parts of the fingerprint of `node`: equal parts mean equal results. Its inputs must exist."""
        inputs = {name: fingerprint(self.out / name) for name in node.needs}
        if node.last:  # it reads the numbers of all others
            files = sorted((self.out / "figures").glob("*.csv"))
            inputs |= {file.stem: fingerprint(file) for file in files if file.stem not in node.results}
        inputs |= {path.parent.name: fingerprint(path) for path in sorted(self.out.glob("towers/*/origin.json"))}
        inputs |= self.materials.contents(node)
        code = [cell["source"] for cell in code_cells(self.notebooks / node.notebook)]
        return as_json(
            {
                "notebook": fingerprint(code),
                "parameter": {name: value for name, value in self.parameters(node).items() if name not in ("out", "config")},
                "material": self.materials.read_by(node),
                "profile": self.profile.to_dict(),
                "library": library_of(code),
                "input": inputs,
                "version": {name: versions()[name] for name in ("torch", "transformers")},
            }
        )

    def state_file(self, node: Node) -> Path:
        """The record of the last successful run of `node`."""
        return self.out / "state" / f"{node.name}.json"

    def remember(self, node: Node, made_from: Mapping[str, Any], seconds: float) -> None:
        """Record that `node` finished: its fingerprint, what it made, and how long it took."""
        outputs = {name: fingerprint(*paths) for name, paths in self.products(node).items()}
        write_json(self.state_file(node), {"made_from": made_from, "outputs": outputs, "seconds": round(seconds, 2)})

    def recall(self, node: Node) -> dict[str, Any] | None:
        """The record by `remember`, or None if `node` never finished here."""
        path = self.state_file(node)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def check_own(self, nodes: Iterable[Node]) -> None:
        """Raise ValueError if the run folder holds results of another profile or of another seed of the pipeline."""
        for node, kept in ((node, state["made_from"]["parameter"]) for node in nodes if (state := self.recall(node))):
            if any(kept[name] != self.parameters(node)[name] for name in ("profile", "seed")):
                raise ValueError(f"{self.out} holds profile {kept['profile']}, seed {kept['seed']}: choose another --out")

    def stale_reason(self, node: Node, made_from: Mapping[str, Any]) -> str | None:
        """Why `node` must run, e.g. "stale: parameter steps 64 -> 128"; None if what it left is whole and up to date."""
        state = self.recall(node)
        if state is None:
            return "not made yet"
        if missing := self.missing(node):
            return f"{', '.join(missing)} missing"
        for name, paths in self.products(node).items():
            if state["outputs"].get(name) != fingerprint(*paths):
                return f"stale: {name} was changed by something else"
        changes = list(_differences(state["made_from"], made_from))
        if not changes:
            return None
        more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
        return f"stale: {', '.join(changes[:3])}{more}"


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook file, with their source as one string; raises ValueError if it is not a notebook."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no notebook {notebook}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{notebook} is not a notebook in the format of Jupyter 4 ({error!r})") from None
    return [cell | {"source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]


def parameter_names(notebook: Path) -> tuple[str, ...]:
    """The names assigned in the cell tagged `parameters`; raises ValueError if there is no such cell."""
    for cell in code_cells(notebook):
        if "parameters" in cell["metadata"].get("tags", ()):
            body = ast.parse(cell["source"]).body
            assigned = [t for s in body if isinstance(s, ast.Assign) for t in s.targets]
            assigned += [s.target for s in body if isinstance(s, ast.AnnAssign)]
            return tuple(target.id for target in assigned if isinstance(target, ast.Name))
    raise ValueError(f"{notebook.name} has no cell tagged `parameters`: tag the one that assigns profile, seed and out")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """The changed parts as text: hashes are only called changed, values are shown."""
    flat_old, flat_new = dict(_flat(old)), dict(_flat(new))
    keys = [*flat_new, *(key for key in flat_old if key not in flat_new)]
    for key in sorted(keys, key=lambda key: key[0] not in ("parameter", "profile")):
        before, after = flat_old.get(key), flat_new.get(key)
        if before != after:
            name = f"{key[0]} {'.'.join(key[1:])}".strip()
            yield f"{name} changed" if key[0] in ("notebook", "library", "input") else f"{name} {before!r} -> {after!r}"


def _flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*path, name))
        else:
            yield (*path, name), value


# The library files that can affect a notebook.


def library_of(cells: Iterable[str]) -> dict[str, str]:
    """Map each library file (as "phantoms/scene.py") that can affect these code cells to its fingerprint."""
    code = "\n".join(cells)
    has_shell_line = any(line.lstrip().startswith(("!", "%")) for line in code.split("\n"))
    modules = None if has_shell_line else _reached(_imported(code))
    files = _files() if modules is None else modules | _data_of(modules)
    names = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(files)}
    return {name: _digest(path) for name, path in names.items() if name not in BLIND}


def _imported(source: str) -> Iterator[str]:
    """The dotted names that a source imports; for `from a import b`, which may be a module, a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _reached(names: Iterable[str]) -> set[Path] | None:
    """The modules reached from these names; None if one is a lazy name of `medv` itself, which may lead anywhere."""
    reached: set[Path] = set()
    queue = list(names)
    while queue:
        first, *rest = queue.pop().split(".")
        if first != "medv":
            continue
        places = [PACKAGE.joinpath(*rest[:depth]) for depth in range(len(rest) + 1)]
        modules = [file for place in places for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()]
        if len(modules) == 1 and rest != ["__version__"]:
            return None
        for path in modules:
            if path not in reached:
                reached.add(path)
                queue += _imports_of(path)
    return reached


_digest = cache(fingerprint)


@cache
def _imports_of(path: Path) -> tuple[str, ...]:
    return tuple(_imported(path.read_text(encoding="utf-8")))


@cache
def _files() -> frozenset[Path]:
    return frozenset(f for f in PACKAGE.rglob("*") if f.is_file() and f.suffix != ".pyc" and not f.name.startswith("."))


def _data_of(modules: set[Path]) -> set[Path]:
    """The data files of the packages of these modules, and of the top package."""
    packages = {path.parent for path in modules} | {PACKAGE}

    def package(path: Path) -> Path:
        return next(folder for folder in path.parents if (folder / "__init__.py").is_file())

    return {path for path in _files() if path.suffix != ".py" and package(path) in packages}
