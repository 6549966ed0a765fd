"""`medv reproduce`: run the notebooks as a graph, each only when something that it depends on has changed.

Finished notebooks are remembered under the run folder, so that a killed reproduction continues where it was. A notebook that
fails blocks those that need it, and no others. Where the profile's models are small, notebooks share the machine, each with its
part of the cores; else heavy ones (training) get it alone.
"""

import os
import queue
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from medv.artifacts import PACKAGE, default_out, fingerprint
from medv.companion.reproduction import cache
from medv.companion.reproduction.cache import SUFFIXES, Workshop
from medv.companion.reproduction.registry import EXHIBITS, Node, chain_lengths, nodes_for, ordered, parents
from medv.ownership import check_empty, hold
from medv.profiles import get_profile

COLORS = {"cached": "green", "done": "green", "running": "cyan", "failed": "red", "blocked": "yellow", "stale": "yellow"}


@dataclass
class Progress:
    """Where one notebook stands: "waiting", "running", "done", "cached", "failed" or "blocked"; not selected: "stale"."""

    node: Node
    status: str = "waiting"
    note: str = ""
    cell: str = ""
    started: float | None = None
    seconds: float | None = None

    @property
    def finished(self) -> bool:
        """Whether what this notebook makes is there and up to date."""
        return self.status in ("done", "cached")

    @property
    def elapsed(self) -> float | None:
        """Seconds of this or, when cached, of the earlier execution."""
        return time.monotonic() - self.started if self.status == "running" else self.seconds


def reproduce(
    profile: str = "tiny",
    only: Sequence[str] = (),
    out: str | Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    jobs: int = 1,
    *,
    publish: bool = False,
    seed: int = 0,
    nodes: Sequence[Node] | None = None,
    notebooks: str | Path | None = None,
    console: Console | None = None,
) -> int:
    """Bring figures, tables and artifacts up to date and write `index.html`; returns the exit code (0 good, 1 a failure).

    `only` names notebooks, figures or tables; what they need comes along. `out` defaults to `runs/<profile>`. `jobs` notebooks
    may run at once, each with its share of the cores. `publish` copies the results of a wholly good run to `figures/<profile>/`
    of the source tree.
    Raises ValueError for unknown names and parameters, and if another process works in the same folder.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}: at least one notebook must be allowed to run")
    console = console or Console()
    folder = Path(notebooks) if notebooks else source_notebooks()
    shop = Workshop(folder.resolve(), Path(out or default_out(profile)).resolve(), get_profile(profile), seed)
    nodes = nodes_for(shop.profile) if nodes is None else nodes
    chosen = ordered(nodes, only)
    for node in chosen:
        cache.check_parameters(node, shop)
    if shop.profile.notes:
        console.print(Text(f"profile {profile}: {shop.profile.notes}"), soft_wrap=True)
    if shop.profile.towers == "packages":
        console.print(_estimate_table(chosen, shop))
        console.print("what is finished is kept: the same command goes on after a stop")
    if dry_run:
        console.print(_plan_table(chosen, nodes, shop, force))
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
        progress = {node.name: Progress(node) for node in chosen}
        try:
            _Schedule(shop, nodes, progress, force, jobs, console).run()
        except KeyboardInterrupt:
            console.print("interrupted: finished notebooks are kept; the same command continues", style="yellow")
            return 130
        return _conclude(shop, nodes, progress, console, publish)


def source_notebooks() -> Path:
    """The `notebooks/` folder beside the package; raises FileNotFoundError if medv does not run from a source tree."""
    folder = PACKAGE.parent / "notebooks"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not there: the notebooks come with the source tree, so clone it and `pip install -e .` there"
        )
    return folder


class _Schedule:
    """Start what is ready, wait for what runs, until nothing is left."""

    def __init__(self, shop, nodes, progress: dict[str, Progress], force: bool, jobs: int, console: Console):
        self.shop, self.nodes, self.progress, self.force, self.jobs, self.console = (
            shop,
            nodes,
            progress,
            force,
            jobs,
            console,
        )
        self.messages: queue.Queue[tuple[Progress, str | None]] = queue.Queue()
        self.plain = not console.is_terminal
        lengths = chain_lengths(nodes)
        self.order = sorted(progress.values(), key=lambda item: -lengths[item.node.name])

    def run(self) -> None:
        view = Live(console=self.console, get_renderable=self._view, refresh_per_second=4, transient=True)
        with nullcontext() if self.plain else view:
            while any(item.status in ("waiting", "running") for item in self.progress.values()):
                self._start_ready()
                if any(item.status == "running" for item in self.progress.values()):
                    self._finish(*self.messages.get())

    def _start_ready(self) -> None:
        for item in self.order:
            if item.status != "waiting":
                continue
            before = [self.progress[parent.name] for parent in parents(item.node, self.nodes)]
            if item.node.last and any(o.status in ("waiting", "running") and not o.node.last for o in self.progress.values()):
                continue
            if any(parent.status in ("failed", "blocked") for parent in before):
                bad = next(parent.node.name for parent in before if parent.status in ("failed", "blocked"))
                self._say(item, "blocked", f"needs {bad}")
            elif all(parent.finished for parent in before) and self._room_for(item.node):
                self._begin(item)

    def _room_for(self, node: Node) -> bool:
        running = [item.node for item in self.progress.values() if item.status == "running"]
        if self._exclusive(node):
            return not running
        return len(running) < self.jobs and not any(self._exclusive(other) for other in running)

    def _exclusive(self, node: Node) -> bool:
        return node.alone or (node.heavy and not self.shop.profile.side_by_side)

    def _begin(self, item: Progress) -> None:
        made_from = cache.parts(item.node, self.shop)
        reason = "forced" if self.force else cache.stale_reason(item.node, self.shop, made_from)
        if reason is None:
            item.seconds = cache.recall(item.node, self.shop)["seconds"]
            self._say(item, "cached")
            return
        item.started = time.monotonic()
        self._say(item, "running", reason)
        threading.Thread(target=self._work, args=(item, made_from), daemon=True).start()

    def _work(self, item: Progress, made_from: dict) -> None:
        """In a thread: execute, check that everything declared was made, remember. Any error is the notebook's."""
        try:
            from medv.companion.reproduction.execute import (
                execute,  # papermill takes seconds to import: a cached run does without
            )

            def on_cell(number: int, count: int) -> None:
                item.cell = f"{number}/{count}"

            executed = self.shop.out / "notebooks" / item.node.notebook
            source = self.shop.notebooks / item.node.notebook
            _forget(item.node, self.shop)
            environment = self._environment(item.node, made_from)
            execute(source, executed, self.shop.parameters(item.node), environment=environment, on_cell=on_cell)
            if missing := self.shop.missing(item.node):
                raise RuntimeError(f"every cell ran, but {', '.join(missing)} was not made")
            cache.remember(item.node, self.shop, made_from, time.monotonic() - item.started)
        except Exception as error:
            self.messages.put((item, str(error) or repr(error)))
        else:
            self.messages.put((item, None))

    def _environment(self, node: Node, made_from: dict) -> dict[str, str]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = cores if self._exclusive(node) else max(1, cores // self.jobs)
        defaults = {"OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false"}
        force = {cache.FORCE_KEY: "1"} if self.force else {}
        return defaults | os.environ | {cache.RESUME_KEY: f"k{fingerprint(made_from)[:16]}"} | force

    def _finish(self, item: Progress, error: str | None) -> None:
        item.seconds = time.monotonic() - item.started
        if error is None:
            self._say(item, "done")
        else:
            self._say(item, "failed", error.split("\n")[0])
            self.console.print(Text(f"{item.node.notebook} failed: {error}", style="red"), soft_wrap=True)

    def _say(self, item: Progress, status: str, note: str = "") -> None:
        item.status, item.note = status, note
        if self.plain:
            seconds = f" ({_duration(item.seconds)})" if item.finished else ""
            self.console.print(Text(f"{status:8} {item.node.name}{seconds}{': ' if note else ''}{note}"), soft_wrap=True)

    def _view(self) -> Table:
        return _table(self.progress.values(), f"medv reproduce · profile {self.shop.profile.name}")


def _forget(node: Node, shop: Workshop) -> None:
    """Drop the note of an earlier success, so that a failure or a kill is not taken for it."""
    (shop.out / "state" / f"{node.name}.json").unlink(missing_ok=True)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _table(items, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("notebook", "status", "time", "cell", ""):
        table.add_column(column, justify="right" if column == "time" else "left")
    for item in items:
        status = Text(item.status, style=COLORS.get(item.status, ""))
        table.add_row(item.node.name, status, _duration(item.elapsed), item.cell, Text(item.note))
    return table


def _plan_table(chosen: Sequence[Node], nodes: Sequence[Node], shop: Workshop, force: bool) -> Table:
    """What would run and why, without running it."""
    items, rerun = [], set()
    for node in chosen:
        before = [n.name for n in (chosen if node.last else parents(node, nodes)) if n.name in rerun]
        if force:
            reason = "forced"
        elif before:
            reason = f"needs {', '.join(before)}, which will run"
        else:
            reason = cache.stale_reason(node, shop, cache.parts(node, shop))
        if reason:
            rerun.add(node.name)
        items.append(Progress(node, "run" if reason else "cached", reason or ""))
    return _table(items, f"plan · profile {shop.profile.name} · {len(rerun)} of {len(items)} notebooks would run")


def _estimate_table(chosen: Sequence[Node], shop: Workshop) -> Table:
    """How long each notebook takes on this machine; cached ones too, for whether they are is seen when they start."""
    from medv.companion.reproduction.budget import measure, work_of
    from medv.companion.reproduction.run import on_this_machine

    profile = on_this_machine(shop.profile)
    unit, works = measure(profile), {node.name: work_of(node.name, profile) for node in chosen}
    seconds = {name: work.seconds(unit) for name, work in works.items()}
    about = f"{unit.learned:.3g} s an example learned, {unit.asked:.3g} s an answer's forward, {unit.drawn:.3g} s a picture"
    table = Table(title=f"on this machine, estimated ({about})", title_justify="left", box=None, pad_edge=False)
    table.add_column("notebook")
    table.add_column("about", justify="right")
    for name, value in (seconds | {"all": sum(seconds.values())}).items():
        table.add_row(name, f"{value / 3600:.1f} h" if value >= 3600 else f"{value / 60:.0f} min" if value else "minutes")
    return table


def _outsiders(shop: Workshop, nodes: Sequence[Node], progress: dict[str, Progress]) -> dict[str, Progress]:
    """The notebooks that were not asked for, as an earlier run left them."""
    found = {}
    for node in nodes:
        if node.name in progress:
            continue
        state = cache.recall(node, shop)
        item = Progress(node, "stale" if state else "waiting", seconds=state["seconds"] if state else None)
        inputs_there = all((shop.out / name).exists() for name in node.needs)
        if state and inputs_there and cache.stale_reason(node, shop, cache.parts(node, shop)) is None:
            item.status = "cached"
        found[node.name] = item
    return found


def _conclude(shop: Workshop, nodes: Sequence[Node], progress: dict[str, Progress], console: Console, publish: bool) -> int:
    """Print the summary, write the index, publish if asked; the exit code."""
    from medv.companion.reproduction.index import write_index

    everything = progress | _outsiders(shop, nodes, progress)
    items = [everything[node.name] for node in ordered(nodes)]
    index = write_index(shop.out, shop.profile.name, shop.seed, items, EXHIBITS)
    console.print(_table(progress.values(), f"medv reproduce · profile {shop.profile.name}"))
    good = all(item.finished for item in progress.values())
    console.print(Text(f"index: {os.path.relpath(index)}"), soft_wrap=True)
    if publish and good:
        console.print(Text(f"published to {os.path.relpath(_publish(shop, progress))}"), soft_wrap=True)
    elif publish:
        console.print("not published: not every notebook finished", style="yellow")
    return 0 if good else 1


def _publish(shop: Workshop, progress: dict[str, Progress]) -> Path:
    """Copy the results of the finished notebooks to `figures/<profile>/` beside `notebooks/`."""
    target = shop.notebooks.parent / "figures" / shop.profile.name
    target.mkdir(parents=True, exist_ok=True)
    for item in progress.values():
        for name in item.node.results:
            for suffix in SUFFIXES:
                shutil.copyfile(shop.out / "figures" / f"{name}{suffix}", target / f"{name}{suffix}")
    return target
