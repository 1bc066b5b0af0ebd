"""Work that a run leaves to another thread, while its own does something else. No torch."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

_T = TypeVar("_T")


def elsewhere(writer: Executor | None, work: Callable[[], _T]) -> Generator[Future[Any], None, _T]:
    """What `work` returns: computed here, or by the writer while the caller is told to do something else."""
    if writer is None:
        return work()
    working = writer.submit(work)
    while not working.done():
        yield working
    return working.result()
