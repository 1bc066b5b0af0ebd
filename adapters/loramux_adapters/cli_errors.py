"""How a command that fails says so: one sentence on standard error, or with --json one object on standard output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from loramux_adapters.errors import LoramuxError


@contextmanager
def exit_codes(as_json: bool, code_of: Callable[[LoramuxError], int] = lambda error: 1) -> Iterator[None]:
    """A LoramuxError ends the command with the exit code that `code_of` gives it; nobody sees a traceback."""
    try:
        yield
    except LoramuxError as error:
        if as_json:
            fields = {"message": error.message, "param": error.param, "code": error.code}
            typer.echo(json.dumps({"error": fields}, indent=2))
        else:
            typer.echo(f"loramux: {error.message}", err=True)
        raise typer.Exit(code_of(error)) from error
