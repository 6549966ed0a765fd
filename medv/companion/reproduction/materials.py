"""The configuration file of a run: weights, data, baselines, judge and machine, and changes of the profile.

`medv reproduce --profile paper --config FILE` hands it to every notebook; `paper.toml` at the top of the source tree is a
commented example. A notebook asks its `Run` for a material by name, and what is not there is never replaced by anything else.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medv.artifacts import as_json, fingerprint
from medv.companion.studies.machine import Machine, adjusted
from medv.companion.studies.node import Node
from medv.profiles import Profile

if TYPE_CHECKING:
    from medv.evaluation.judge_client import Endpoint

WEIGHTS = {
    "language": "the language tower that stage 1 starts from (LLaDA-8B-Instruct, converted)",
    "vision": "the vision tower (SigLIP2, converted)",
    "general": "a general vision-language model (LLaDA-V, converted), for the ablation of the initial weights",
    "stage1": "a finished model of stage 1, instead of training it",
    "stage2": "a finished model of stage 2 (the released LLaDA-MedV, converted)",
    "stage3": "a finished model of stage 3",
}
DATA = {
    "align": "llava_med_align",
    "instruct": "llava_med_instruct",
    "vqa_rad": "vqa_rad",
    "slake": "slake",
    "pathvqa": "pathvqa",
    "qa50": "qa50",
}
"""Name in the file -> name of the data set."""
VQA_SETS = ("vqa_rad", "slake", "pathvqa")


@dataclass(frozen=True)
class Baseline:
    """Another model of Table 1 and 3: a file of its answers, or judgements of these, or both."""

    answers: Path | None = None
    judgements: Path | None = None


@dataclass(frozen=True)
class Materials:
    """The content of a configuration file; all of it may be left out. judge: fields of `Endpoint`, without a key."""

    weights: Mapping[str, Path] = field(default_factory=dict)
    data: Mapping[str, Path] = field(default_factory=dict)
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    judge: Mapping[str, Any] | None = None
    machine: Machine = field(default_factory=Machine)
    profile: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: str | Path | None) -> "Materials":
        """The materials of a TOML file, whose relative paths start at its folder; None has none. Raises ValueError for a name
        that nothing reads, FileNotFoundError where the file is missing.
        """
        if file is None:
            return cls()
        from medv.evaluation.judge_client import Endpoint

        file = Path(file).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"there is no configuration file {file}: `paper.toml` in the source tree is an example")
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no TOML file: {error}") from None

        def section(name: str, known: Iterable[str] | None = None, within: Mapping = content) -> dict[str, Any]:
            """A table of the file, all of whose names are known."""
            found = within.get(name, {})
            if not isinstance(found, dict):
                raise ValueError(f"{file}: {name} is {found!r}, but must be a table [{name}]")
            if known is not None and (unknown := [key for key in found if key not in known]):
                raise ValueError(f"{file}: [{name}] has no {unknown[0]!r}: choose from {', '.join(known)}")
            return found

        def place(name: str, value: Any) -> Path:
            if not isinstance(value, str) or not value:
                raise ValueError(f"{file}: {name} is {value!r}, but must be a path in quotes")
            try:
                return (file.parent / Path(value).expanduser()).resolve()
            except (RuntimeError, ValueError, OSError) as error:  # ~nobody, a null byte, a loop of links
                raise ValueError(f"{file}: {name} is {value!r}, which is no path here: {error}") from None

        section_names = [item.name for item in fields(cls)]
        if unknown := [name for name in content if name not in section_names]:
            raise ValueError(f"{file} has no section {unknown[0]!r}: choose from {', '.join(section_names)}")
        baselines = {}
        for name in section("baselines"):
            given = section(name, [item.name for item in fields(Baseline)], content["baselines"])
            if not given:
                raise ValueError(f"{file}: [baselines.{name}] is empty: give its answers, or judgements of them")
            baselines[name] = Baseline(**{key: place(f"{key} of {name}", value) for key, value in given.items()})
        judge = section("judge", [item.name for item in fields(Endpoint) if item.name != "key"]) if "judge" in content else None
        try:
            adjusted(Endpoint(key="checked when it is used"), judge or {}, "[judge]")
            machine = Machine(**section("machine", [item.name for item in fields(Machine)]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from None
        return cls(
            weights={name: place(name, value) for name, value in section("weights", WEIGHTS).items()},
            data={name: place(name, value) for name, value in section("data", DATA).items()},
            baselines=baselines,
            judge=judge,
            machine=machine,
            profile=section("profile"),
        )

    def of(self, profile: Profile) -> Profile:
        """The profile with the changes of the file. Raises ValueError for a change of what names it and labels results."""
        if fixed := [name for name in ("name", "towers", "synthetic") if name in self.profile]:
            raise ValueError(f"{fixed[0]} of the profile cannot be changed by a configuration file: choose another --profile")
        changed = adjusted(profile, self.profile) if self.profile else profile
        if not changed.seeds or changed.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"a profile has seeds, and dtype float32, bfloat16 or float16: {changed.seeds!r}, {changed.dtype!r}"
            )
        if len(changed.lora.sizes) != len(changed.lora.steps):
            raise ValueError(f"each of lora.sizes {changed.lora.sizes} needs its own number in lora.steps {changed.lora.steps}")
        return changed

    def endpoint(self) -> "Endpoint | None":
        """The judge with the key of the environment; None where the file names none."""
        from medv.evaluation.judge_client import Endpoint, key_from_environment

        return None if self.judge is None else Endpoint(**self.judge, key=key_from_environment())

    def path(self, name: str) -> Path | None:
        """A folder of weights or data by name; None where the file does not name it."""
        return self.weights.get(name) or self.data.get(name)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy, without a key."""
        return as_json(asdict(self))

    def read_by(self, node: Node) -> dict[str, Any]:
        """The part that a notebook declares to read, JSON-able, for its fingerprint."""
        names = [*names_in(node.reads), *node.may_read, *made_by(node)]
        own = {name: path for name in names if (path := self.path(name))}
        return as_json(own | {name: getattr(self, name) for name in ("judge", "baselines") if name in names})

    def files_of(self, node: Node) -> dict[str, Path]:
        """The files of baselines that a notebook reads, by "answers of NAME"."""
        named = self.baselines.items() if "baselines" in node.may_read else ()
        found = {f"{kind} of {name}": getattr(one, kind) for name, one in named for kind in ("answers", "judgements")}
        return {name: file for name, file in found.items() if file is not None}

    def contents(self, node: Node) -> dict[str, str]:
        """The fingerprints of `files_of` that exist."""
        return {name: fingerprint(file) for name, file in self.files_of(node).items() if file.is_file()}

    def missing(self, node: Node, profile: Profile) -> list[str]:
        """Why a notebook cannot be made of this file: a sentence for each material that it needs and that is not there."""
        if profile.towers != "given":
            return []
        made = made_by(node)
        given = bool(made) and all(name in self.weights for name in made)  # what it would be trained from is not needed
        needed = [name for name in node.reads if name == "qa50" or not given]
        lost = [absent(name) for name in needed if not any(map(self.path, name.split("|")))]
        used = {name: path for name in (*names_in(needed), *node.may_read, *made) if (path := self.path(name))}
        lost += [f"{name} is not there: {file}" for name, file in self.files_of(node).items() if not file.is_file()]
        return lost + [said for name, path in used.items() if (said := unusable(name, path))]

    def vqa_sets(self) -> dict[str, Path]:
        """The data sets of Table 2 that the file names."""
        return {name: self.data[name] for name in VQA_SETS if name in self.data}


def made_by(node: Node) -> list[str]:
    """The names under [weights] of what a notebook makes."""
    return [name.rpartition("/")[2] for name in node.makes if name.startswith("models/")]


def unusable(name: str, path: Path) -> str:
    """Why a folder is not what its name in the file says; empty for one that is."""
    from medv.checkpoints.adapters import is_adapter
    from medv.data.readers import data_set

    if not path.exists():
        return f"{name} is not there: {path}"
    if name in WEIGHTS:
        whole = (path / "config.json").is_file() or is_adapter(path)
        return "" if whole else f"{name} of the configuration file is no model: {path} has no config.json"
    try:
        data_set(DATA[name]).find(path, "test" if name == "qa50" else "train")
    except ValueError as error:
        return f"{name} of the configuration file is no such data set: {error}"
    return ""


def names_in(reads: Iterable[str]) -> list[str]:
    """The names in `Node.reads`, in which "a|b" stands for either."""
    return [name for either in reads for name in either.split("|")]


def absent(name: str) -> str:
    """The sentence about a material, or either of several, that the configuration file does not name."""
    name, *others = name.split("|")
    also = f", or another of {', '.join(others)}" if others else ""
    table, about = ("weights", WEIGHTS[name]) if name in WEIGHTS else ("data", f"the folder of {DATA[name]}")
    return f'{name} is missing: name it under [{table}] in the configuration file, as {name} = "FOLDER" ({about}){also}'
