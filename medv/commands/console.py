"""Output of all commands: text that cannot steer a terminal, errors as one sentence, results as a table or as JSON.

Names of files, ids, answers and messages come from outside. Whatever is printed through `console` and `errors` is text alone:
no markup is read, and a character that a terminal would obey is shown as an escape (`\\x1b`).
"""

import io
import json
import math
import os
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType, RenderHook, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from medv.artifacts import disk_is_full
from medv.reading import in_a_sentence, visible

BUG = "this is a bug of medv, not of your input: please report it with the command and the lines above"


class _Visible(RenderHook):
    """Shows whatever is printed as `visible` text; the control codes of the console itself pass."""

    def process_renderables(self, renderables: list[RenderableType]) -> list[RenderableType]:
        return [_VisibleRenderable(renderable) for renderable in renderables]


class _VisibleRenderable:
    def __init__(self, renderable: RenderableType):
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.renderable, options):
            yield Segment(text if control else visible(text, keep="\n"), style, control)


def plain_console(**options: Any) -> Console:
    """A console that prints text as `visible` and reads no markup, emoji codes or numbers in it."""
    made = Console(markup=False, emoji=False, highlight=False, **options)
    made.push_render_hook(_Visible())
    return made


console, errors = plain_console(), plain_console(stderr=True)


def report_errors(command: Callable) -> Callable:
    """Report an error that the user can mend as one sentence, with exit code 2; any other as a bug, with its traceback.

    The user's are wrong values (ValueError), files and disks (OSError), too little memory, weights that safetensors refuses. A
    training that was stopped exits with 1.
    """

    @wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # a closed pipe ends the command line silently
            raise
        except Exception as error:
            if _is_of(error, "medv.training.launch", "TrainingStopped"):
                if str(error):  # empty where another process reports it
                    say(str(error))
                raise typer.Exit(1) from error
            sentence = _sentence(error)
            if sentence is None:
                errors.print(traceback.format_exc(), end="", soft_wrap=True)
            say(sentence or BUG)
            raise typer.Exit(2 if sentence else 1) from error

    return wrapped


def say(sentence: str) -> None:
    """One line on standard error."""
    errors.print(Text.assemble(("medv:", "red"), " ", visible(sentence)), soft_wrap=True)


def _sentence(error: Exception) -> str | None:
    """The sentence for an error that the user can mend; None for a bug."""
    if isinstance(error, OSError):
        return _one_line(in_a_sentence(error))
    if isinstance(error, UnicodeEncodeError):
        half = visible(error.object[error.start])
        return f"the text {reprlib.repr(error.object)} has a character that is none ({half}): remove it"
    of_safetensors = _is_of(error, "safetensors", "SafetensorError")
    if (of_safetensors or isinstance(error, RuntimeError)) and disk_is_full(error):  # in the library's own words
        return f"the disk is full ({_one_line(error)}): free some space"
    if of_safetensors or isinstance(error, ValueError):
        return _one_line(error)
    if isinstance(error, MemoryError) or _is_of(error, "torch", "OutOfMemoryError"):
        return "there is not enough memory: ask for a smaller batch, a shorter answer or a smaller model"
    return None


def _one_line(error: Exception | str) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__


def _is_of(error: Exception, module: str, name: str) -> bool:
    """Whether an error is of a module's class; the module is not imported to find out."""
    return module in sys.modules and isinstance(error, getattr(sys.modules[module], name))


def escape_unencodable() -> None:
    """Let the standard streams print an escape for what their encoding lacks, where they would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Flush standard output; a closed reader or a full disk gives no traceback of Python's at its exit."""
    try:
        if sys.stdout is not None:  # it is where the shell has closed it (>&-)
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        if not isinstance(error, BrokenPipeError):
            error.filename = "standard output"
            say(in_a_sentence(error))
        sys.exit(1 if isinstance(error, BrokenPipeError) else 2)


def print_json(value: Any) -> None:
    """Print a result as one line of JSON in ASCII, which any terminal and any pipe can take; no number is null."""
    print(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    """`value` with None for NaN and the infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def filled_text(parts: Iterable[tuple[str, bool]]) -> Text:
    """Pieces of a text, each with whether it was filled in; those are marked where the terminal can."""
    return Text.assemble(*((piece, "bold underline" if filled else "") for piece, filled in parts))


def print_mapping(title: str, mapping: dict, as_json: bool) -> None:
    """Print a mapping as a table of two columns, or as JSON."""
    if as_json:
        print_json(mapping)
        return
    table = Table(title=title, show_header=False)
    for name, value in mapping.items():
        table.add_row(str(name), f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
