"""`medv reproduce`: runs the notebooks as a graph, each only when something that it depends on has changed.

Finished notebooks are recorded in the run folder, so that a stopped reproduction resumes. A notebook that fails blocks those
that need it, and no others. Where the profile's models are small, heavy notebooks (training) share the cores with others;
elsewhere they run alone.
"""

import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from medv.artifacts import PACKAGE, atomic_file, default_out, fingerprint, write_json
from medv.companion.reproduction.cache import FORCE_KEY, RESUME_KEY, SUFFIXES, Workshop
from medv.companion.reproduction.cluster import Jobs, asked_for, check_scheduler
from medv.companion.reproduction.materials import Materials
from medv.companion.reproduction.registry import EXHIBITS, Node, chain_lengths, nodes_for, ordered, parents
from medv.ownership import check_empty, hold
from medv.profiles import get_profile

COLORS = {"cached": "green", "done": "green", "running": "cyan", "failed": "red", "blocked": "yellow", "stale": "yellow"}


@dataclass
class Progress:
    """State of one notebook: "waiting", "running", "done", "cached", "failed" or "blocked"; if not selected also "stale"."""

    node: Node
    status: str = "waiting"
    note: str = ""
    cell: str = ""
    started: float | None = None
    seconds: float | None = None

    @property
    def finished(self) -> bool:
        """Whether the products of this notebook exist and are up to date."""
        return self.status in ("done", "cached")


def reproduce(
    profile: str = "tiny",
    only: Sequence[str] = (),
    out: str | Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    jobs: int = 1,
    *,
    config: str | Path | None = None,
    publish: bool = False,
    on: str | None = None,
    slurm: Sequence[str] = (),
    seed: int = 0,
    nodes: Sequence[Node] | None = None,
    notebooks: str | Path | None = None,
    console: Console | None = None,
) -> int:
    """Bring figures, tables and artifacts up to date and write `index.html`; returns the exit code (0 good, 1 a failure).

    `only` names notebooks, figures or tables; what they need is included. `seed` is that of the whole pipeline, all stages
    included. `out` defaults to `runs/<profile>`, or `runs/<profile>-seed<seed>`. Up to `jobs` notebooks
    run at once, each with its share of the cores. `publish` copies the results of a wholly good run to
    `figures/<profile>/` of the source tree. With `on` every notebook is a job (`medv.companion.reproduction.cluster`), with the
    options `slurm`, and a scheduler gets all that are ready.
    Raises ValueError for unknown names and parameters, and if another process works in the same folder.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}: at least one notebook must be allowed to run")
    if publish and seed:
        raise ValueError(
            f"--publish with --seed {seed}: figures/{profile} holds seed 0, and `medv replicate` compares other seeds"
        )
    console = console or Console()
    folder = Path(notebooks) if notebooks else PACKAGE.parent / "notebooks"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not there: the notebooks come with the source tree, so clone it and `pip install -e .` there"
        )
    materials = Materials.read(config)
    own, place = materials.of(get_profile(profile)), Path(out or default_out(profile, seed)).resolve()
    shop = Workshop(
        folder.resolve(), place, own, seed, materials, None if config is None else Path(config).expanduser().resolve()
    )
    nodes = nodes_for(shop.profile) if nodes is None else nodes
    chosen = ordered(nodes, only)
    for node in chosen:
        shop.check_parameters(node)
    shop.check_own(nodes)
    options = check_scheduler(on, slurm, shop.out)
    if shop.profile.notes:
        console.print(Text(f"profile {profile}: {shop.profile.notes}"), soft_wrap=True)
    if shop.profile.towers == "packages":
        console.print(_estimates(chosen, shop))
        console.print("what is finished is kept: the same command goes on after a stop")
    if dry_run:
        console.print(_plan(chosen, nodes, shop, force))
        return 0
    if shop.profile.towers == "packages":
        from medv.checkpoints.bundled import fetched_towers

        fetched_towers(profile, shop.out / "towers")
    shop.out.mkdir(parents=True, exist_ok=True)
    state = shop.out / "state"
    if not state.is_dir():  # what else may be there: `medv towers`, and notebooks that were run by hand
        made = (name.split("/")[0] for node in nodes for name in node.makes)
        check_empty(shop.out, beside=["towers", "figures", *made])
    with hold(shop.out):
        state.mkdir(exist_ok=True)
        if config is not None:
            write_json(shop.out / "config.json", materials.to_dict())
        progress = {node.name: Progress(node) for node in chosen}
        cluster = Jobs(on, shop.out / "jobs", options) if on else None
        try:
            _Schedule(shop, nodes, progress, force, jobs, console, cluster).run()
        except KeyboardInterrupt:
            for line in cluster.cancel() if cluster else ():
                console.print(line, style="yellow", soft_wrap=True)
            console.print("interrupted: finished notebooks are kept; the same command continues", style="yellow")
            return 130
        return _conclude(shop, nodes, progress, console, publish)


def run_node(
    shop: Workshop, node: Node, made_from: dict[str, Any], force: bool, share: int, on_cell: Callable = lambda *_: None
) -> str | None:
    """Execute a notebook on a `share`-th of this machine's cores, check that everything declared was made, and record it.

    Returns the error, if any: it is the notebook's. In a thread, or in a job's own process.
    """
    started = time.monotonic()
    try:
        # Papermill takes seconds to import: a cached run does without it.
        from medv.companion.reproduction.execute import execute

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = int(os.environ.get("SLURM_CPUS_PER_TASK", cores))
        threads = max(1, cores // share)
        defaults = {"OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false"}
        keys = {RESUME_KEY: f"k{fingerprint(made_from)[:16]}"} | ({FORCE_KEY: "1"} if force else {})
        # A failure or a kill must not be taken for the success of an earlier run.
        shop.state_file(node).unlink(missing_ok=True)
        before = {name: _saved(shop, name) for name in node.results}
        source, executed = shop.notebooks / node.notebook, shop.out / "notebooks" / node.notebook
        execute(source, executed, shop.parameters(node), environment=defaults | os.environ | keys, on_cell=on_cell)
        old = [name for name, when in before.items() if when is not None and when == _saved(shop, name)]
        if missing := [*shop.missing(node), *old]:
            raise RuntimeError(f"every cell ran, but {', '.join(missing)} was not made")
        shop.remember(node, made_from, time.monotonic() - started)
    except Exception as error:
        return str(error) or repr(error)
    return None


def _saved(shop: Workshop, name: str) -> int | None:
    """When a figure or table was saved last; None where there is none."""
    manifest = shop.out / "figures" / f"{name}.json"
    return manifest.stat().st_mtime_ns if manifest.exists() else None


class _Schedule:
    """Starts what is ready and waits for what runs, until nothing is left. progress: `Progress` by the name of the node."""

    def __init__(
        self,
        shop: Workshop,
        nodes: Sequence[Node],
        progress: dict,
        force: bool,
        jobs: int,
        console: Console,
        cluster: Jobs | None,
    ):
        self.shop, self.nodes, self.progress, self.cluster = shop, nodes, progress, cluster
        self.force, self.jobs, self.console = force, jobs, console
        self.ended: queue.Queue[tuple[Progress, str | None]] = queue.Queue()  # with the error, if it failed
        self.here = cluster is None or cluster.on == "local"  # a scheduler finds room itself
        lengths = chain_lengths(nodes)
        self.order = sorted(progress.values(), key=lambda item: -lengths[item.node.name])

    def run(self) -> None:
        title = f"medv reproduce · profile {self.shop.profile.name}"
        view = Live(
            console=self.console,
            get_renderable=lambda: _progress_table(title, self.progress.values()),
            refresh_per_second=4,
            transient=True,
        )
        with view if self.console.is_terminal else nullcontext():
            while any(item.status in ("waiting", "running") for item in self.progress.values()):
                self._start_ready()
                if any(item.status == "running" for item in self.progress.values()):
                    item, error = self.ended.get()
                    item.seconds = time.monotonic() - item.started
                    self._set(item, "failed" if error else "done", (error or "").split("\n")[0])
                    if error:
                        self.console.print(Text(f"{item.node.notebook} failed: {error}", style="red"), soft_wrap=True)

    def _start_ready(self) -> None:
        """Begin every notebook whose inputs are there and for which there is room."""
        everyone = self.progress.values()
        for item in self.order:
            if item.status != "waiting":
                continue
            if item.node.last and any(o.status in ("waiting", "running") and not o.node.last for o in everyone):
                continue
            before = [self.progress[parent.name] for parent in parents(item.node, self.nodes)]
            bad = next((parent.node.name for parent in before if parent.status in ("failed", "blocked")), None)
            running = [other.node for other in everyone if other.status == "running" and self.here]
            room = len(running) < self.jobs and not any(map(self._exclusive, running))
            if bad or (lost := self.shop.materials.missing(item.node, self.shop.profile)):
                self._set(item, "blocked", f"needs {bad}" if bad else lost[0])
            elif all(parent.finished for parent in before) and (not running if self._exclusive(item.node) else room):
                self._begin(item)

    def _exclusive(self, node: Node) -> bool:
        return node.alone or (node.heavy and not self.shop.profile.side_by_side)

    def _begin(self, item: Progress) -> None:
        made_from = self.shop.made_from(item.node)
        reason = "forced" if self.force else self.shop.stale_reason(item.node, made_from)
        if reason is None:
            item.seconds = self.shop.recall(item.node)["seconds"]
            self._set(item, "cached")
            return
        item.started = time.monotonic()
        self._set(item, "running", reason)
        threading.Thread(target=self._execute, args=(item, made_from), daemon=True).start()

    def _execute(self, item: Progress, made_from: dict[str, Any]) -> None:
        """In a thread: run the notebook here or in a job."""
        node, shop = item.node, self.shop

        def on_cell(number: int, count: int) -> None:
            item.cell = f"{number}/{count}"

        share = 1 if self._exclusive(node) or not self.here else self.jobs
        work = (shop, node, made_from, self.force, share)
        if self.cluster is None:
            self.ended.put((item, run_node(*work, on_cell)))
            return
        try:
            asked = asked_for(node, shop.profile, shop.materials.machine)
            error = self.cluster.submit_and_wait(node.name, fingerprint(made_from), asked, run_node, *work)
        except Exception as problem:
            error = str(problem) or repr(problem)
        self.ended.put((item, error))

    def _set(self, item: Progress, status: str, note: str = "") -> None:
        item.status, item.note = status, note
        if not self.console.is_terminal:
            seconds = f" ({_duration(item.seconds)})" if item.finished else ""
            self.console.print(Text(f"{status:8} {item.node.name}{seconds}{': ' if note else ''}{note}"), soft_wrap=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _table(title: str, rows: Iterable[Sequence[str | Text]], *columns: str) -> Table:
    """A table without lines; the columns "time" and "about" are numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in ("time", "about") else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _progress_table(title: str, items: Iterable[Progress]) -> Table:
    rows = []
    for item in items:
        seconds = time.monotonic() - item.started if item.status == "running" else item.seconds
        status = Text(item.status, style=COLORS.get(item.status, ""))
        rows.append((item.node.name, status, "" if seconds is None else _duration(seconds), item.cell, Text(item.note)))
    return _table(title, rows, "notebook", "status", "time", "cell", "")


def _plan(chosen: Sequence[Node], nodes: Sequence[Node], shop: Workshop, force: bool) -> Table:
    """Which notebooks would run and why, without running them."""
    items, rerun = [], set()
    for node in chosen:
        before = [n.name for n in (chosen if node.last else parents(node, nodes)) if n.name in rerun]
        if lost := shop.materials.missing(node, shop.profile):
            items.append(Progress(node, "blocked", lost[0]))
            continue
        if force:
            reason = "forced"
        elif before:
            reason = f"needs {', '.join(before)}, which will run"
        else:
            reason = shop.stale_reason(node, shop.made_from(node))
        if reason:
            rerun.add(node.name)
        items.append(Progress(node, "run" if reason else "cached", reason or ""))
    title = f"plan · profile {shop.profile.name} · {len(rerun)} of {len(items)} notebooks would run"
    return _progress_table(title, items)


def _estimates(chosen: Sequence[Node], shop: Workshop) -> Table:
    """How long each notebook takes on this machine, whether it is cached or not."""
    from medv.companion.reproduction.budget import measure, work_of
    from medv.companion.reproduction.run import on_this_machine

    profile = on_this_machine(shop.profile)
    unit = measure(profile)
    seconds = {node.name: work_of(node.name, profile).seconds(unit) for node in chosen}
    seconds["all"] = sum(seconds.values())
    about = f"{unit.learned:.3g} s an example learned, {unit.asked:.3g} s an answer's forward, {unit.drawn:.3g} s a picture"
    rows = [
        (name, f"{value / 3600:.1f} h" if value >= 3600 else f"{value / 60:.0f} min" if value else "minutes")
        for name, value in seconds.items()
    ]
    return _table(f"on this machine, estimated ({about})", rows, "notebook", "about")


def _conclude(shop: Workshop, nodes: Sequence[Node], progress: dict[str, Progress], console: Console, publish: bool) -> int:
    """Print the summary, write the index, publish if asked; the exit code."""
    from medv.companion.reproduction.index import write_index

    items = []
    for node in ordered(nodes):
        item = progress.get(node.name)
        if item is None:  # not asked for: as an earlier run left it
            state = shop.recall(node)
            item = Progress(node, "stale" if state else "waiting", seconds=state["seconds"] if state else None)
            inputs_there = all((shop.out / name).exists() for name in node.needs)
            if state and inputs_there and shop.stale_reason(node, shop.made_from(node)) is None:
                item.status = "cached"
        items.append(item)
    index = write_index(shop.out, shop.profile.name, shop.seed, items, EXHIBITS)
    console.print(_progress_table(f"medv reproduce · profile {shop.profile.name}", progress.values()))
    console.print(Text(f"index: {os.path.relpath(index)}"), soft_wrap=True)
    good = all(item.finished for item in progress.values())
    if publish and good:
        target = shop.notebooks.parent / "figures" / shop.profile.name
        target.mkdir(parents=True, exist_ok=True)
        for name in (f"{result}{suffix}" for item in progress.values() for result in item.node.results for suffix in SUFFIXES):
            with atomic_file(target / name) as partial:
                shutil.copyfile(shop.out / "figures" / name, partial)
        console.print(Text(f"published to {os.path.relpath(target)}"), soft_wrap=True)
    elif publish:
        console.print("not published: not every notebook finished", style="yellow")
    return 0 if good else 1
