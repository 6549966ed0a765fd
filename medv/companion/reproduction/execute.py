"""Runs one notebook through papermill in a kernel of its own and keeps the executed copy.

The copy appears under its name only when every cell has run; a failed one is kept as `NAME.failed.ipynb`, and what the kernel
itself printed goes to `NAME.log`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nbclient.exceptions import DeadKernelError
from papermill import execute_notebook
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError


class NotebookFailed(Exception):
    """A cell raised, or the kernel died: `str()` gives the cell and the error, ready to print."""


class _Engine(NBClientEngine):
    """Papermill's own engine with a working folder, an environment for the kernel, and a callback for each cell."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, *, folder, environment, log, on_cell, **_papermill):
        """Execute the notebook, calling `on_cell(number, count)` as each cell starts (arguments by papermill's contract)."""
        started = nb_man.cell_start

        def start(cell, cell_index=None, **options):
            on_cell(cell_index + 1, len(nb_man.nb.cells))
            return started(cell, cell_index, **options)

        nb_man.cell_start = start
        # A working folder in `resources` is the kernel's alone; papermill's `cwd` would move every thread of this process.
        client = PapermillNotebookClient(
            nb_man, kernel_name=kernel_name, timeout=None, startup_timeout=180, resources={"metadata": {"path": str(folder)}}
        )
        with log.open("w", encoding="utf-8") as stream:
            return client.execute(env=dict(environment), stdout=stream, stderr=stream)


papermill_engines.register("medv", _Engine)


def execute(
    notebook: Path,
    executed: Path,
    parameters: Mapping[str, Any],
    *,
    environment: Mapping[str, str],
    on_cell: Callable[[int, int], None],
) -> None:
    """Run `notebook` with `parameters` in its own folder and save the executed copy as `executed`.

    `environment` is the kernel's whole environment. Raises NotebookFailed if a cell raises or the kernel dies.
    """
    executed.parent.mkdir(parents=True, exist_ok=True)
    partial = executed.with_name(f".{executed.stem}.partial.ipynb")
    failed, log = executed.with_name(f"{executed.stem}.failed.ipynb"), executed.with_name(f"{executed.stem}.log")
    # Papermill formats paths with the parameters: braces in a path are doubled.
    source, target = (str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, partial))
    ours = {"folder": notebook.parent, "environment": environment, "log": log, "on_cell": on_cell}
    how = {"engine_name": "medv", "kernel_name": "python3", "language": "python", "progress_bar": False}
    try:
        execute_notebook(source, target, dict(parameters), **how, **ours)
    except PapermillExecutionError as error:
        partial.replace(failed)
        lines = error.source.strip().split("\n")
        shown = "\n".join(f"  | {line}" for line in lines[:15])
        rest = f"\n  | ... {len(lines) - 15} more lines" if len(lines) > 15 else ""
        cell = f"in cell {error.cell_index} of {failed}:\n{shown}{rest}"
        raise NotebookFailed(f"{error.ename}: {error.evalue}\n{cell}") from None
    except DeadKernelError:
        partial.replace(failed)
        raise NotebookFailed(f"the kernel died (out of memory, or killed): see {failed} and {log}") from None
    partial.replace(executed)
    failed.unlink(missing_ok=True)
