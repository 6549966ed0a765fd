"""What a notebook holds while it runs: its profile, its folder, its inputs, and where its figures and tables go.

A notebook opens one `Run` in its second cell and goes through it for every file, so that inputs are found or explained,
outputs are whole or absent, and each figure says what made it. Driven by papermill or by hand, the same code runs.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from medv import limits
from medv.artifacts import (
    MANIFEST,
    Manifest,
    atomic_directory,
    code_fingerprint,
    default_out,
    fingerprint,
    versions,
    write_text,
)
from medv.checkpoints.adapters import is_adapter
from medv.companion.figures import plots as figures
from medv.companion.reproduction.cache import FORCE_KEY, RESUME_KEY
from medv.companion.reproduction.labels import PHANTOMS, label
from medv.companion.reproduction.registry import EXHIBITS, Node, counterpart, find_node, makers, nodes_for
from medv.data.example import Example
from medv.intervals import NOT_MEASURED
from medv.profiles import Profile, get_profile

_NUMBERS = {"index": 0, "picture": 0, "draws": 1}
"""The parameters of notebooks that are numbers, and the least that each may be; all others are names, folders or switches."""
ASKED = ("batch_size", "preset")
"""The parameters of notebooks that say how a model is asked; None takes the profile's."""
GIVEN, FOUND = "given", "found"
"""What an artifact is that was not made: put there by hand, or finished before by the very same work."""


def open_run(
    node_name: str,
    *,
    profile: str = "tiny",
    seed: int = 0,
    out: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> "Run":
    """Open the run of a notebook, named as in `medv.companion.reproduction.registry`.

    `out` defaults to `runs/<profile>` under the project, the folder that `medv reproduce` uses. `parameters` are the
    notebook's own parameters, for the manifests. Raises ValueError for an unknown notebook or profile, for a parameter of
    another kind than the notebook's (papermill's -p makes numbers of digits, and text of all else), and where a launcher
    started the notebook several times.
    """
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"{world} processes were started of this notebook, which is one: start papermill without torchrun, and only "
            f"trainings with it (`torchrun --nproc_per_node {world} -m medv train ...`)"
        )
    limits.seed("seed", seed)
    asked = {name: value for name in ASKED if (value := (parameters or {}).get(name)) is not None}
    for name, value in {"profile": profile, "out": out, **(parameters or {})}.items():
        if name in asked:
            continue  # checked with the profile that it becomes a part of
        if name in _NUMBERS:
            limits.whole(name, value, _NUMBERS[name])
        elif value is not None and not isinstance(value, str | Path | Mapping | bool):
            raise ValueError(f"{name} is {value!r}: it must be text, in quotes (papermill: -r {name} {value})")
    chosen = on_this_machine(get_profile(profile)).asked(**asked)
    node = find_node(node_name, nodes_for(chosen))
    _set_up_display()
    folder = Path(out) if out else default_out(profile)
    return Run(node, chosen, seed, folder.expanduser().resolve(), dict(node.parameters) | dict(parameters or {}))


def on_this_machine(profile: Profile) -> Profile:
    """The profile with as many seeds as there is time for: where a GPU is wanted and missing, the first alone."""
    import torch

    if profile.towers == "bundled" or torch.cuda.is_available():
        return profile
    return replace(profile, seeds=profile.seeds[:1])


def _set_up_display() -> None:
    """In a notebook: bare figures are shown, table cells are shown whole, and reading weights draws no progress bar."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read by transformers when it is imported
    import IPython
    from IPython.core.pylabtools import select_figure_formats

    shell = IPython.get_ipython()
    if shell is not None:
        select_figure_formats(shell, {"png"}, bbox_inches="tight")
        pd.set_option("display.max_colwidth", None)


def _is_given(path: Path) -> bool:
    """Whether a folder holds a model that no notebook made: it has no manifest, or one of other contents."""
    if not (path / "config.json").is_file() and not is_adapter(path):
        return False
    if not (path / MANIFEST).is_file():
        return True
    made = Manifest.read(path).about.get("contents")
    return made is not None and made != fingerprint(path)


def _unmeasured(frame: pd.DataFrame) -> list[str]:
    """The columns without a single number, or in which a cell says so; and the metrics of a long table without a value."""
    found = [name for name in frame if len(frame) and (frame[name].isna().all() or (frame[name] == NOT_MEASURED).any())]
    if {"metric", "value"} <= set(frame):
        known = frame.groupby("metric", sort=False)["value"].count()
        found += list(known.index[known == 0])
    return list(map(str, found))


@dataclass
class Run:
    """One notebook at work. `out` is absolute; the names of inputs and outputs are those that its `node` declares."""

    node: Node
    profile: Profile
    seed: int
    out: Path
    parameters: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    _inputs: dict[str, str] = field(default_factory=dict)
    _kept: dict[str, str] = field(default_factory=dict)

    def banner(self) -> None:
        """Print what this run is: notebook, profile, seed, device, versions, folder."""
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        known = versions()
        packages = ", ".join(f"{name} {known[name]}" for name in ("medv", "python", "torch", "transformers"))
        print(f"{self.node.title}\nprofile  {self.profile.name}: {self.profile.purpose}\nseed     {self.seed}")
        print(f"device   {device}\nversions {packages}\nresults  {os.path.relpath(self.out)}")

    def artifact(self, name: str) -> Path:
        """The path of an artifact that this notebook needs (or has made).

        Raises ValueError if the registry does not declare it, FileNotFoundError, naming the notebook that makes it, if
        it is not there yet.
        """
        if name not in (*self.node.needs, *self.node.makes):
            raise ValueError(
                f"{self.node.name!r} does not declare {name!r}: add it to `needs` of its node in medv/companion/studies"
            )
        path = self.out / name
        if not path.exists():
            maker = makers().get(name)
            by = f"run notebooks/{maker.notebook} first, or `medv reproduce --only {maker.name}`" if maker else "make it first"
            raise FileNotFoundError(f"{name} is not in {self.out}: {by} (profile {self.profile.name})")
        if name in self.node.needs:
            self._inputs[name] = fingerprint(path)
            if _is_given(path):
                self._kept[name] = GIVEN
        return path

    @property
    def towers(self) -> Path:
        """The folder in which `medv towers` made the towers of this run, where the profile begins at such."""
        return self.out / "towers"

    def start(self, init: str | Path | None) -> Path | None:
        """The folder of the model that stage 1 begins with: `init`, or one put together of fetched towers and a projector drawn
        from the seed; None for the bundled towers. Raises FileNotFoundError where the towers are missing.
        """
        if init is not None or self.profile.towers == "bundled":
            return None if init is None else Path(init)
        from medv.checkpoints.bundled import ASSEMBLED_FILE, fetched_towers, save_assembled

        parts, folder = fetched_towers(self.profile.name, self.towers), self.out / "models" / f"start-seed{self.seed}"
        if not (folder / ASSEMBLED_FILE).exists():
            options = {"system": self.profile.system, "seed": self.seed, **self.profile.model.sight}
            save_assembled(*parts, folder, **options)
        return folder

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """Yield a folder to build an artifact in; it takes its place, with a manifest, when the block ends without an error.

        A folder left by a stopped run is handed back, so that a training can continue from its checkpoints: under `medv
        reproduce` one of the very same notebook and inputs, by hand or by papermill one of the same parameters, inputs and
        library. A finished artifact of just this work, and a model that was put there by hand, is handed back as it is, where
        it is, unless the reproduction is forced.
        """
        if name not in self.node.makes:
            raise ValueError(
                f"{self.node.name!r} does not declare {name!r}: add it to `makes` of its node in medv/companion/studies"
            )
        if standing := self._standing(name):
            self._kept[name] = standing
            yield self.out / name
            return
        keep = os.environ.get(RESUME_KEY) or self._resume_key()
        with atomic_directory(self.out / name, keep=keep) as folder:
            yield folder
            about = {"work": self._resume_key(), "key": os.environ.get(RESUME_KEY), "contents": fingerprint(folder)}
            self._manifest(name, about).write(folder)

    def obtain(self, name: str, work: Callable[[Path], Any]) -> Any:
        """A model made by `work(folder)`, whose answer is returned; one that is there already is kept, and said to be "given"
        (put there by hand) or "found" (finished here before). A training that was stopped goes on.
        """
        if standing := self._standing(name):
            self._kept[name] = standing
            print(f"{name} is {standing}: it is kept and not made again")
            return {name: standing}
        with self.making(name) as folder:
            return work(folder)

    def _standing(self, name: str) -> str | None:
        """GIVEN or FOUND for what stands in the place of an artifact and is to be kept; None where it has to be made."""
        path, key = self.out / name, os.environ.get(RESUME_KEY)
        if os.environ.get(FORCE_KEY) or not path.exists():
            return None
        if _is_given(path):
            return GIVEN
        about = Manifest.read(path).about if (path / MANIFEST).is_file() else {}
        work = "key" if key and about.get("key") else "work"  # made by hand: without a key
        same = work in about and about[work] == (key if work == "key" else self._resume_key())
        return FOUND if same and about["contents"] == fingerprint(path) else None

    def _resume_key(self) -> str:
        made_from = {"profile": self.profile.to_dict(), "seed": self.seed, "parameters": self.parameters}
        return "h" + fingerprint(made_from, self._inputs, code_fingerprint())[:16]

    def figure(
        self,
        fig: Figure,
        name: str,
        frame: pd.DataFrame,
        *,
        caption: str = "",
        data: str | None = None,
        comparable: bool = False,
        gaps: Sequence[str] = (),
    ) -> Figure:
        """Save a figure as PNG, SVG, CSV (`frame`, what is drawn) and JSON (the manifest); returns the figure to show it.

        `data` labels the source in the footer, default the phantoms; `comparable` drops the warning there, for what no
        profile changes (a formula, a count of a real data set). `gaps` says what is missing here and why ("no endpoint: not
        judged"); the index shows it. All three of examples and a model: `**run.source(...)`.
        """
        return self._save(fig, name, frame, caption, data, comparable, gaps)

    def source(self, examples: Iterable[Example] = (), model: Path | None = None, name: str = "") -> dict[str, Any]:
        """`data`, `comparable` and `gaps` of what was made of these examples and this model folder, by `labels.label`."""
        return label(self.profile, examples, model, name)

    def table(
        self,
        frame: pd.DataFrame,
        name: str,
        *,
        caption: str = "",
        data: str | None = None,
        comparable: bool = False,
        gaps: Sequence[str] = (),
        digits: int = 2,
    ) -> pd.DataFrame:
        """Save a table as CSV, JSON (the manifest), PNG and SVG; returns the frame to show it. Options as in `figure`."""
        title = caption or EXHIBITS.get(name, name)
        self._save(figures.table_figure(frame, title, digits=digits), name, frame, title, data, comparable, gaps)
        return frame

    def footer(self, data: str | None = None, comparable: bool = False) -> str:
        """The line under a figure that says where its data come from and whether they compare with the paper's."""
        data = data or PHANTOMS
        return data if comparable else f"{data}, profile {self.profile.name}: not comparable with the paper"

    def _save(
        self, fig: Figure, name: str, frame: pd.DataFrame, caption: str, data: str | None, comparable: bool, gaps: Sequence[str]
    ) -> Figure:
        if name not in self.node.results:
            raise ValueError(
                f"{self.node.name!r} does not declare {name!r}: add it to `results` of its node in medv/companion/studies"
            )
        if data is None:
            gaps = [*gaps, *self.source()["gaps"]]
        text, stem = self.footer(data, comparable), self.out / "figures" / name
        figures.footer(fig, text)
        figures.save(fig, stem)
        write_text(stem.with_name(f"{name}.csv"), frame.to_csv(index=False, lineterminator="\n"))
        about = {
            "caption": caption or EXHIBITS.get(name, ""),
            "data": text,
            "comparable": comparable,
            "counterpart": counterpart(name),
            "gaps": [*gaps, *(f"{what}: {NOT_MEASURED}" for what in _unmeasured(frame))],
            "kind": "table" if name.startswith("table") else "figure",
        }
        self._manifest(name, about).write(stem.with_name(f"{name}.json"))
        return fig

    def _manifest(self, name: str, about: dict[str, Any]) -> Manifest:
        about = {"node": self.node.name, "notebook": self.node.notebook, "kept": dict(self._kept), **about}
        return Manifest(
            name=name,
            profile=self.profile.to_dict(),
            seed=self.seed,
            parameters=dict(self.parameters),
            inputs=dict(self._inputs),
            about=about,
            seconds=round(time.perf_counter() - self.started, 3),
        )
