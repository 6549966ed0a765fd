"""A notebook's `Run`: its profile, its folder, its inputs, and where its figures and tables go.

A notebook opens one `Run` in its second cell and uses it for every file, so that missing inputs are explained, outputs are
whole or absent, and each figure records what made it. The same code runs under papermill and by hand.

The labels of a result come from its examples and its model, never from the profile's name: a drawn image is a
phantom, whatever its data set is called, and a result compares with the paper's only where real images were shown to a model of
the paper's size.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from medv import artifacts, limits
from medv.artifacts import MANIFEST, PACKAGE, Manifest, fingerprint
from medv.checkpoints.adapters import base_folder, is_adapter
from medv.checkpoints.bundled import bundled
from medv.checkpoints.shards import read_object
from medv.companion.figures import plots as figures
from medv.companion.reproduction.cache import FORCE_KEY, RESUME_KEY
from medv.companion.reproduction.materials import DATA, VQA_SETS, Materials, absent, names_in, unusable
from medv.companion.reproduction.registry import EXHIBITS, Node, counterpart, find_node, makers, nodes_for
from medv.companion.studies.machine import Machine
from medv.companion.studies.requests import JudgeOf, judge_of
from medv.data.example import Example
from medv.intervals import NOT_MEASURED
from medv.profiles import PAPER, Profile, get_profile
from medv.training.examples import PHANTOMS as DRAWN
from medv.training.examples import TrainingData

PHANTOMS = "synthetic phantoms"
_NUMBERS = {"index": 0, "picture": 0, "draws": 1}
"""The parameters of notebooks that are numbers, and the least that each may be; all others are names, folders or switches."""
ASKED = ("batch_size", "preset")
"""The parameters of notebooks that say how a model is asked; None takes the profile's."""
GIVEN, FOUND = "given", "found"
"""States of an artifact that was not made now: put there by hand, or finished before by the very same work."""


def open_run(
    node_name: str,
    *,
    profile: str = "tiny",
    seed: int = 0,
    out: str | Path | None = None,
    config: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> "Run":
    """Open the run of a notebook, by the name of its node.

    `out` defaults to `runs/<profile>` under the project, the folder that `medv reproduce` uses. `config` is a file of
    `medv.companion.reproduction.materials`, for weights and data that are not in the package. `parameters` are the
    notebook's own parameters, for the manifests. Raises ValueError for an unknown notebook or profile, for a parameter of the
    wrong type (papermill's -p makes numbers of digits, and text of all else), and where a launcher started the notebook
    several times.
    """
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"{world} processes were started of this notebook, which is one: start papermill without torchrun, and only "
            f"trainings with it (`torchrun --nproc_per_node {world} -m medv train ...`)"
        )
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read by transformers when it is imported
    limits.seed("seed", seed)
    own = dict(parameters or {})
    asked = {name: value for name in ASKED if (value := own.get(name)) is not None}
    for name, value in {"profile": profile, "out": out, "config": config, **own}.items():
        if name in asked:
            continue  # checked with the profile that it becomes a part of
        if name in _NUMBERS and value is not None:
            limits.whole(name, value, _NUMBERS[name])
        elif value is not None and not isinstance(value, str | Path | Mapping | bool):
            raise ValueError(f"{name} is {value!r}: it must be text, in quotes (papermill: -r {name} {value})")
    materials = Materials.read(config)
    chosen = drawn_anew(materials.of(on_this_machine(get_profile(profile))).asked(**asked), seed)
    node = find_node(node_name, nodes_for(chosen))
    import IPython
    from IPython.core.pylabtools import select_figure_formats

    shell = IPython.get_ipython()
    if shell is not None:  # in a notebook: bare figures are shown, and table cells whole
        select_figure_formats(shell, {"png"}, bbox_inches="tight")
        pd.set_option("display.max_colwidth", None)
    folder = Path(out) if out else artifacts.default_out(profile, seed)
    return Run(node, chosen, seed, folder.expanduser().resolve(), dict(node.parameters) | own, materials)


def drawn_anew(profile: Profile, seed: int) -> Profile:
    """The profile for one seed of the whole pipeline: each has seeds of its own for the short trainings of the studies, some of
    which start from weights that are the same in every run.
    """
    plans = {name: getattr(profile, name) for name in ("lora", "initialization", "adaptation")}
    moved = {name: [number + seed * len(plan.seeds) for number in plan.seeds] for name, plan in plans.items() if plan}
    return replace(profile, **{name: replace(plans[name], seeds=tuple(numbers)) for name, numbers in moved.items()})


def on_this_machine(profile: Profile) -> Profile:
    """The profile with the seeds that there is time for: only the first where a GPU is wanted and missing."""
    import torch

    return profile if profile.towers == "bundled" or torch.cuda.is_available() else profile.with_seeds(profile.seeds[:1])


def _is_given(path: Path) -> bool:
    """Whether a folder holds a model that no notebook made: it has no manifest, or one of other contents."""
    if not (path / "config.json").is_file() and not is_adapter(path):
        return False
    if not (path / MANIFEST).is_file():
        return True
    about = Manifest.read(path).about
    made = about.get("contents")
    return "node" not in about or (made is not None and made != fingerprint(path))  # no node: by `medv publish`


def label(profile: Profile, examples: Iterable[Example] = (), model: Path | None = None, name: str = "") -> dict[str, Any]:
    """`data`, `comparable` and `gaps` of a result, as `Run.figure` takes them. Without examples it is of phantoms.

    name: of real data ("vqa_rad questions"). A gap says which stand-in was used instead of what the profile is made for. Of the
    model's folder only the configuration is read; an adapter is as large as its base.
    """
    examples, size, own = list(examples), None, None
    drawn = not examples or any(example.drawn for example in examples)
    if model is not None:
        folder = Path(model).resolve()
        own = f"bundled {folder.name.replace('_', ' ')}" if folder.is_relative_to(PACKAGE.resolve()) else None
    if model is not None and not drawn:
        while is_adapter(folder):
            folder = base_folder(folder)
        text = read_object(folder / "config.json").get("text_config", {})
        size = (text.get("hidden_size"), text.get("num_hidden_layers"))
    data = [PHANTOMS if drawn else f"real {name}".strip(), *([] if own is None else [own])]
    gaps = [f"{PHANTOMS} stand in for real images"] if drawn and not profile.synthetic else []
    gaps += [f"the {own} stands in for a model of this profile"] if own and profile.towers != "bundled" else []
    return {"data": ", ".join(data), "comparable": size == (PAPER.model.hidden_size, PAPER.model.layers), "gaps": gaps}


@dataclass
class Run:
    """One running notebook. `out` is absolute; the names of inputs and outputs are those that its `node` declares."""

    node: Node
    profile: Profile
    seed: int
    out: Path
    parameters: dict[str, Any] = field(default_factory=dict)
    materials: Materials = field(default_factory=Materials)
    started: float = field(default_factory=time.perf_counter)
    _inputs: dict[str, str] = field(default_factory=dict)
    _kept: dict[str, str] = field(default_factory=dict)

    def banner(self) -> None:
        """Print notebook, profile, seed, device, versions and folder."""
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        packages = ", ".join(f"{name} {artifacts.versions()[name]}" for name in ("medv", "python", "torch", "transformers"))
        print(f"{self.node.title}\nprofile  {self.profile.name}: {self.profile.purpose}\nseed     {self.seed}")
        print(f"device   {device}\nversions {packages}\nresults  {os.path.relpath(self.out)}")

    def _check_declared(self, name: str, kind: str, known: Sequence[str]) -> None:
        if name not in known:
            raise ValueError(
                f"{self.node.name!r} does not declare {name!r}: add it to `{kind}` of its node in medv/companion/studies"
            )

    def artifact(self, name: str) -> Path:
        """The path of an artifact that this notebook needs or has made.

        Raises ValueError if its node does not declare it, FileNotFoundError, naming the notebook that makes it, if it is not
        there yet.
        """
        self._check_declared(name, "needs", (*self.node.needs, *self.node.makes))
        path = self.out / name
        if not path.exists():
            maker = makers(nodes_for(self.profile)).get(name)
            by = f"run notebooks/{maker.notebook} first, or `medv reproduce --only {maker.name}`" if maker else "make it first"
            raise FileNotFoundError(f"{name} is not in {self.out}: {by} (profile {self.profile.name})")
        if name in self.node.needs:
            self._inputs[name] = fingerprint(path)
            if _is_given(path):
                self._kept[name] = GIVEN
        return path

    def material(self, name: str) -> Path | None:
        """The folder of weights or data that the configuration file names; None where it names none and this profile draws its
        own images. Raises FileNotFoundError where a profile of real data needs it.
        """
        self._check_declared(name, "reads", (*names_in(self.node.reads), *self.node.may_read))
        path = self.materials.path(name)
        if path is None and not self.profile.synthetic and name not in self.node.may_read:
            raise FileNotFoundError(absent(name))
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{name} of the configuration file is not there: {path}")
        return path

    def data(self, name: str, data: str | None = None, folder: str | Path | None = None) -> TrainingData:
        """The data of a role: the notebook's own `data` and `folder`, else the configuration file's, else phantoms where this
        profile draws its images (FileNotFoundError elsewhere).
        """
        if data is not None:
            return TrainingData(data, folder and Path(folder))
        path = self.material(name)
        return DRAWN if path is None else TrainingData(DATA[name], path)

    def vqa_data(self, data: str | None, folder: str | Path | None, protocol: str = "official") -> list[TrainingData]:
        """The question sets of stage 3: the notebook's own, else all that the configuration file names, else phantoms."""
        if data is not None:
            return [TrainingData(data, folder and Path(folder), protocol)]
        found = [TrainingData(name, self.material(name), protocol) for name in self.materials.vqa_sets()]
        if not found and not self.profile.synthetic:
            raise FileNotFoundError(absent("|".join(VQA_SETS)))
        return found or [replace(DRAWN, protocol=protocol)]

    @property
    def machine(self) -> Machine:
        """How trainings run here."""
        return self.materials.machine

    def own_model(self) -> Path:
        """The folder of the bundled tiny model, or, where none of the profile's size is bundled, the model of stage 2."""
        return bundled("tiny_model") if self.profile.towers == "bundled" else self.artifact("models/stage2")

    def general_model(self) -> dict[str, Path]:
        """A general vision-language model by its name, where there is one."""
        if self.profile.towers == "bundled":
            return {"bundled general model (shapes)": bundled("general_model")}
        folder = self.material("general")
        return {} if folder is None else {f"general model ({folder.name})": folder}

    def judge(self, source: TrainingData) -> JudgeOf | None:
        """The judge of the configuration file, for answers to a real benchmark; None for phantoms, which need no key."""
        return None if source.name == DRAWN.name else judge_of(self.materials.endpoint(), source)

    def baselines(self, kind: str) -> dict[str, Path]:
        """The baselines of the configuration file that have a file of "answers" or "judgements", by name."""
        return {name: path for name, one in self.materials.baselines.items() if (path := getattr(one, kind))}

    @property
    def towers(self) -> Path:
        """The folder in which `medv towers` made the towers of this run, where the profile begins at such."""
        return self.out / "towers"

    def start(self, init: str | Path | None) -> Path | None:
        """The folder of the model that stage 1 begins with: `init`, or one put together of fetched towers and a projector drawn
        from the seed; None for the bundled towers, and where the model of stage 1 is given. Raises FileNotFoundError where the
        towers are missing.
        """
        if init is not None or self.profile.towers == "bundled" or "stage1" in self.materials.weights:
            return None if init is None else Path(init)
        from medv.checkpoints.bundled import fetched_towers, save_assembled
        from medv.checkpoints.released import VIEWS, image_settings

        folder, options = self.out / "models" / f"start-seed{self.seed}", self.profile.model.sight
        if self.profile.towers == "given":
            parts = [self.material(name) for name in ("language", "vision")]
            options |= image_settings(VIEWS, read_object(parts[1] / "config.json")["image_size"])
        else:
            parts = fetched_towers(self.profile.name, self.towers)
        made = {"parts": fingerprint(*parts, options, self.profile.system)}  # other towers may lie there by now
        if not (folder / MANIFEST).is_file() or Manifest.read(folder).inputs != made:
            save_assembled(*parts, folder, system=self.profile.system, seed=self.seed, **options)
            Manifest(folder.name, inputs=made).write(folder)
        return folder

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """Yield a folder to build an artifact in; it takes its place, with a manifest, when the block ends without an error.

        The folder of a stopped run is yielded again, so that a training continues from its checkpoints: under `medv reproduce`
        that of the very same notebook and inputs, by hand or by papermill that of the same parameters, inputs and library. A
        finished artifact of exactly this work, and a model that was put there by hand, is yielded where it is, unless the
        reproduction is forced.
        """
        self._check_declared(name, "makes", self.node.makes)
        if standing := self._standing(name):
            self._kept[name] = standing
            yield self.out / name
            return
        key = os.environ.get(RESUME_KEY)
        with artifacts.atomic_directory(self.out / name, keep=key or self._resume_key()) as folder:
            yield folder
            about = {"work": self._resume_key(), "key": key, "contents": fingerprint(folder)}
            about["code"] = artifacts.code_fingerprint()
            self._manifest(name, about).write(folder)

    def obtain(self, name: str, work: Callable[[Path], Any], *, checked: bool = False) -> Any:
        """A model made by `work(folder)`, whose result is returned; one that exists already is kept, and {name: "given"} (put
        there by hand) or {name: "found"} (finished here before) is returned. A stopped training continues. A model that the
        configuration file names is linked to its place. Raises ValueError where another model, or a broken link, stands there.

        checked: `work` leaves a finished folder of the same training as it is and refuses any other, as `run_stage` does: then
        what does not affect the training (how a model is evaluated) may change without making it again.
        """
        short, place = name.rpartition("/")[2], self.out / name
        given = self.materials.weights.get(short)
        if given is not None and (said := unusable(short, given)):
            raise FileNotFoundError(said)
        if given is None and place.is_symlink() and not place.exists():
            raise ValueError(f"{place} links to {place.readlink()}, which is gone: name it under [weights] or remove the link")
        if given is not None and place.resolve() != given:
            if place.is_symlink():
                place.unlink()
            elif place.exists():
                raise ValueError(f"{place} is not {short} = {given}: move it away, or leave {short} out of the file")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(given, target_is_directory=True)
        if standing := GIVEN if given is not None else self._standing(name):
            self._kept[name] = standing
            print(f"{name} is {standing}: it is kept and not made again")
            return {name: standing}
        about = Manifest.read(place).about if checked and (place / MANIFEST).is_file() else {}
        if about.get("code") == artifacts.code_fingerprint() and not os.environ.get(FORCE_KEY):
            with suppress(ValueError, RuntimeError):  # of another training: it is made again
                work(place)
                self._kept[name] = FOUND
                print(f"{name} is {FOUND}: what has changed does not affect its training")
                return {name: FOUND}
        with self.making(name) as folder:
            return work(folder)

    def _standing(self, name: str) -> str | None:
        """GIVEN or FOUND for an existing artifact that is to be kept; None where it has to be made."""
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
        material = self.materials.read_by(self.node) | self.materials.contents(self.node)
        made_from |= {"material": material} if material else {}
        return "h" + fingerprint(made_from, self._inputs, artifacts.code_fingerprint())[:16]

    def source(self, examples: Iterable[Example] = (), model: Path | None = None, name: str = "") -> dict[str, Any]:
        """`data`, `comparable` and `gaps` of what was made of these examples and this model folder, by `label`; with the judge,
        where the notebook may ask one about real examples.
        """
        found = label(self.profile, examples, model, name)
        if "judge" in self.node.may_read and not found["data"].startswith(PHANTOMS):
            judge = self.materials.judge
            found["data"] += f", judge {judge.get('model', 'by default')}" if judge else ", no judge"
        return found

    def footer(self, data: str | None = None, comparable: bool = False) -> str:
        """The line under a figure: where its data come from and whether they compare with the paper's."""
        data = data or PHANTOMS
        return data if comparable else f"{data}, profile {self.profile.name}: not comparable with the paper"

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
        self._check_declared(name, "results", self.node.results)
        gaps = gaps if data is not None else [*gaps, *self.source()["gaps"]]
        # Columns without a single number, or in which a cell says so; and metrics of a long table without a value.
        missing = [c for c in frame if len(frame) and (frame[c].isna().all() or (frame[c] == NOT_MEASURED).any())]
        if {"metric", "value"} <= set(frame):
            counts = frame.groupby("metric", sort=False)["value"].count()
            missing += list(counts.index[counts == 0])
        text, stem = self.footer(data, comparable), self.out / "figures" / name
        figures.footer(fig, text)
        figures.save(fig, stem)
        artifacts.write_text(stem.with_name(f"{name}.csv"), frame.to_csv(index=False, lineterminator="\n"))
        about = {
            "caption": caption or EXHIBITS.get(name, ""),
            "data": text,
            "comparable": comparable,
            "counterpart": counterpart(name),
            "gaps": [*gaps, *(f"{column}: {NOT_MEASURED}" for column in missing)],
            "kind": "table" if name.startswith("table") else "figure",
        }
        self._manifest(name, about).write(stem.with_name(f"{name}.json"))
        return fig

    def table(self, frame: pd.DataFrame, name: str, *, caption: str = "", digits: int = 2, **labels: Any) -> pd.DataFrame:
        """Save a table as CSV, JSON (the manifest), PNG and SVG; returns the frame to show it. `labels` as in `figure`."""
        caption = caption or EXHIBITS.get(name, name)
        self.figure(figures.table_figure(frame, caption, digits=digits), name, frame, caption=caption, **labels)
        return frame

    def _manifest(self, name: str, about: dict[str, Any]) -> Manifest:
        return Manifest(
            name=name,
            profile=self.profile.to_dict(),
            seed=self.seed,
            parameters=dict(self.parameters),
            inputs=dict(self._inputs),
            about={"node": self.node.name, "notebook": self.node.notebook, "kept": dict(self._kept), **about},
            seconds=round(time.perf_counter() - self.started, 3),
        )
