"""How a long one-off preparation shows that it moves: a bar on a terminal, plain lines elsewhere, or none.

It promises to write to stderr only, so that a command's output can be piped. It times and logs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Reporter:
    """Says nothing; the base of the two that do."""

    def say(self, text: str) -> None:
        """A new stage begins."""

    def tick(self, done: int, total: int) -> None:
        """The stage has got this far."""


class _Lines(Reporter):
    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Bar(Reporter):
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def say(self, text: str) -> None:
        self._bar.update(self._task, description=text, total=None, completed=0)

    def tick(self, done: int, total: int) -> None:
        self._bar.update(self._task, total=total, completed=done)


@contextmanager
def reporter(shown: bool) -> Iterator[Reporter]:
    """The reporter that fits stderr; silent when `shown` is false."""
    console = Console(stderr=True)
    if not shown:
        yield Reporter()
    elif not console.is_terminal:
        yield _Lines(console)
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            yield _Bar(bar)
