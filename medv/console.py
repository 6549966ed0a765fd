"""What all commands share: where they print, and bad input turned into one sentence and exit code 2."""

from collections.abc import Callable
from functools import wraps
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

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

    return wrapped
