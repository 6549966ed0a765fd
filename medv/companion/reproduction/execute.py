"""Run one notebook through papermill in a kernel of its own, and keep the executed copy.

The copy appears under its name only when every cell has run; a failed one is kept as `NAME.failed.ipynb` to look at; what
the kernel itself printed goes to `NAME.log`. This
module knows no graph and no cache.
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
    """Papermill's own engine, with a working folder, an environment for the kernel, and word of each cell."""

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
    failed = executed.with_name(f"{executed.stem}.failed.ipynb")
    log = executed.with_name(f"{executed.stem}.log")
    options = {"folder": notebook.parent, "environment": environment, "log": log, "on_cell": on_cell}
    try:
        execute_notebook(
            _literal(notebook),
            _literal(partial),
            dict(parameters),
            engine_name="medv",
            kernel_name="python3",
            language="python",
            progress_bar=False,
            **options,
        )
    except PapermillExecutionError as error:
        partial.replace(failed)
        raise NotebookFailed(_describe(error, failed)) from None
    except DeadKernelError:
        partial.replace(failed)
        raise NotebookFailed(f"the kernel died (out of memory, or killed): see {failed} and {log}") from None
    partial.replace(executed)
    failed.unlink(missing_ok=True)


def _literal(path: Path) -> str:
    """The path as papermill wants it: braces doubled, because it formats paths with the parameters."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _describe(error: PapermillExecutionError, failed: Path) -> str:
    source = error.source.strip().split("\n")
    shown = "\n".join(f"  | {line}" for line in source[:15])
    rest = f"\n  | ... {len(source) - 15} more lines" if len(source) > 15 else ""
    return f"{error.ename}: {error.evalue}\nin cell {error.cell_index} of {failed}:\n{shown}{rest}"
