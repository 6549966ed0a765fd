"""What all commands share: errors as one sentence, results as a table or as JSON. It knows no command."""

import json
from collections.abc import Callable
from functools import wraps
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medv.artifacts import disk_is_full

console, errors = Console(), Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def in_words(command: Callable) -> Callable:
    """Turn the errors that a person can mend into one sentence and exit code 2."""

    @wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, FileExistsError) as error:
            errors.print(f"[red]medv:[/red] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from error
        except Exception as error:
            if not disk_is_full(error):
                raise
            line = next(iter(str(error).splitlines()), "")
            errors.print(f"[red]medv:[/red] the disk is full ({escape(line)}): free some space", soft_wrap=True)
            raise typer.Exit(2) from error

    return wrapped


def print_mapping(title: str, mapping: dict, as_json: bool) -> None:
    """Print a mapping as a table of two columns, or as JSON."""
    if as_json:
        print(json.dumps(mapping, ensure_ascii=False))
        return
    table = Table(title=escape(title), show_header=False)
    for name, value in mapping.items():
        table.add_row(escape(str(name)), f"{value:.4f}" if isinstance(value, float) else escape(str(value)))
    console.print(table)
