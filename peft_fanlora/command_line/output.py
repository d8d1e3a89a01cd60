"""The output of the commands: tables, JSON, and one-line errors."""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


Command = TypeVar("Command", bound=Callable[..., None])
_FOR_USERS = (ValueError, OSError, NotImplementedError, ModuleNotFoundError)


def answers_in_one_line(command: Command) -> Command:
    """Decorator of the commands that need PEFT: prints errors that the user can fix as one line, with exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        import_module("peft")  # registers both methods, before the command imports modules of this package
        try:
            command(*args, **kwargs)
        except _FOR_USERS as error:
            if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("peft_fanlora"):
                raise
            message = _visible(" ".join(str(error).split())) or type(error).__name__
            typer.echo(f"Error: {message}", err=True)
            raise typer.Exit(1) from error

    return run  # type: ignore[return-value]


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Redirects library output in the context to stderr, that of compiled ones too, so that stdout only has the result."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def show_json(content: Mapping[str, Any]) -> None:
    """Prints a result as JSON."""
    typer.echo(json.dumps(content, indent=2))


def show_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Prints a table of names and values."""
    table = Table(show_header=False)
    for name, value in facts.items():
        is_count = isinstance(value, int) and not isinstance(value, bool)
        table.add_row(_plain(name), f"{value:,}" if is_count else _plain(value))
    _print(title, table)


def show_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Prints a table; all columns except the first and the last are numbers."""
    table = Table()
    columns = list(columns)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position in (0, len(columns) - 1) else "right")
    for row in rows:
        table.add_row(*map(_plain, row))
    _print(title, table)


def _plain(value: Any) -> str:
    """Returns a value as text in which rich markup and terminal control characters are escaped."""
    return escape(_visible(str(value)))


def _visible(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _print(title: str, table: Table) -> None:
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(_plain(title), style="bold")
    console.print(table)
