"""When does a notebook have to run again? Its fingerprint, what it left the last time, and the difference in words.

A fingerprint has parts (the notebook's code, its parameters, the profile, the library files that it can feel, the inputs, the
versions of torch and transformers), kept as they are, so that a stale result can say why it is stale. This module runs nothing.
"""

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medv.artifacts import fingerprint, versions, write_json
from medv.companion.reproduction.reach import library_of
from medv.companion.reproduction.registry import Node
from medv.profiles import Profile

RESUME_KEY = "MEDV_RESUME_KEY"
"""Set in a notebook's environment to its fingerprint: unfinished work of the very same notebook may be continued."""

FORCE_KEY = "MEDV_FORCE"
"""Set in a notebook's environment: what stands in the place of an artifact is made anew, whoever put it there."""

SUFFIXES = (".png", ".svg", ".csv", ".json")
"""What each figure and table consists of."""


@dataclass(frozen=True)
class Workshop:
    """What all notebooks of one reproduction share: where they are, where results go, and the dial."""

    notebooks: Path
    out: Path
    profile: Profile
    seed: int

    def parameters(self, node: Node) -> dict[str, Any]:
        """Everything that papermill passes to the notebook of `node`."""
        return {"profile": self.profile.name, "seed": self.seed, "out": str(self.out), **node.parameters}

    def products(self, node: Node) -> dict[str, tuple[Path, ...]]:
        """The files or folders of each artifact, figure and table of `node`."""
        made = {name: (self.out / name,) for name in node.makes}
        return made | {name: tuple(self.out / "figures" / f"{name}{s}" for s in SUFFIXES) for name in node.results}

    def missing(self, node: Node) -> list[str]:
        """The products of `node` that are not there, or only in part."""
        return [name for name, paths in self.products(node).items() if not all(path.exists() for path in paths)]


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


def check_parameters(node: Node, shop: Workshop) -> None:
    """Raise ValueError if the notebook would be passed a parameter that it does not have (papermill only warns)."""
    known = parameter_names(shop.notebooks / node.notebook)
    unknown = [name for name in shop.parameters(node) if name not in known]
    if unknown:
        raise ValueError(
            f"{node.notebook} has no parameter {', '.join(map(repr, unknown))}: its parameters cell assigns {', '.join(known)}"
        )


def parts(node: Node, shop: Workshop) -> dict[str, Any]:
    """The parts of the fingerprint of `node`: equal parts mean equal results. Its inputs must exist."""
    parameters = {name: value for name, value in shop.parameters(node).items() if name != "out"}
    found = versions()
    code = [cell["source"] for cell in code_cells(shop.notebooks / node.notebook)]
    everything = {
        "notebook": fingerprint(code),
        "parameter": parameters,
        "profile": shop.profile.to_dict(),
        "library": library_of(code),
        "input": {name: fingerprint(shop.out / name) for name in node.needs}
        | (_results(node, shop) if node.last else {})
        | {path.parent.name: fingerprint(path) for path in sorted(shop.out.glob("towers/*/origin.json"))},
        "version": {name: found[name] for name in ("torch", "transformers")},
    }
    return json.loads(json.dumps(everything, default=list))


def _results(node: Node, shop: Workshop) -> dict[str, str]:
    """The results of other notebooks that there are, by their numbers."""
    files = sorted((shop.out / "figures").glob("*.csv"))
    return {file.stem: fingerprint(file) for file in files if file.stem not in node.results}


def _state_file(node: Node, shop: Workshop) -> Path:
    return shop.out / "state" / f"{node.name}.json"


def remember(node: Node, shop: Workshop, made_from: Mapping[str, Any], seconds: float) -> None:
    """Note that `node` is finished: what from, what it made, and how long it took."""
    outputs = {name: fingerprint(*paths) for name, paths in shop.products(node).items()}
    state = {"made_from": made_from, "outputs": outputs, "seconds": round(seconds, 2)}
    write_json(_state_file(node, shop), state)


def recall(node: Node, shop: Workshop) -> dict[str, Any] | None:
    """What `remember` noted, or None if `node` was never finished here."""
    path = _state_file(node, shop)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def stale_reason(node: Node, shop: Workshop, made_from: Mapping[str, Any]) -> str | None:
    """Why `node` must run, e.g. "stale: parameter steps 64 -> 128"; None if what it left is whole and up to date."""
    state = recall(node, shop)
    if state is None:
        return "not made yet"
    if missing := shop.missing(node):
        return f"{', '.join(missing)} missing"
    for name, paths in shop.products(node).items():
        if state["outputs"].get(name) != fingerprint(*paths):
            return f"stale: {name} was changed by something else"
    changes = list(_differences(state["made_from"], made_from))
    if not changes:
        return None
    more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
    return f"stale: {', '.join(changes[:3])}{more}"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """The changed parts in words; hashes are only called changed, values are shown."""
    flat_old, flat_new = dict(_flat(old)), dict(_flat(new))
    keys = [*flat_new, *(key for key in flat_old if key not in flat_new)]
    for key in sorted(keys, key=lambda key: key[0] not in ("parameter", "profile")):
        before, after = flat_old.get(key), flat_new.get(key)
        if before != after:
            what = f"{key[0]} {'.'.join(key[1:])}".strip()
            yield f"{what} changed" if key[0] in ("notebook", "library", "input") else f"{what} {before!r} -> {after!r}"


def _flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*path, name))
        else:
            yield (*path, name), value
