"""Commands that are imported when they run, so that the list of all of them costs no import of any.

Until then a command is its name and one line. Only the top level is lazy; what a command's own options are, its own
module says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

Register = Callable[[typer.Typer], None]

_REGISTERED: dict[str, Register] = {}


class LazyCommands(TyperGroup):
    """The class of an app's top level (`typer.Typer(cls=LazyCommands)`); see `later`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` begin with, imported now."""
        if args and args[0] in _REGISTERED:
            self.commands[args[0]] = load(args[0])
        return super().resolve_command(ctx, args)


def later(app: typer.Typer, name: str, summary: str, register: Register, *, hidden: bool = False) -> None:
    """Add the command `name`; `register` imports it and adds it to the app it is given."""
    _REGISTERED[name] = register
    app.command(name, help=summary, hidden=hidden)(_not_loaded)


def load(name: str) -> Any:
    """The real command."""
    holder = typer.Typer(rich_markup_mode=None)
    _REGISTERED[name](holder)
    return get_group(holder).commands[name]


def _not_loaded() -> None:
    raise AssertionError("resolve_command puts the real command in this one's place")
