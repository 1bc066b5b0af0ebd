"""Claims on what the registry names: counted when taken, ended once."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from loramux_adapters.registry_db import AdapterRecord


class Claim:
    """Something that stays until `release`. A second release does nothing."""

    def __init__(self, end: Callable[[], None]) -> None:
        self._end: Callable[[], None] | None = end

    def release(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Lease(Claim):
    """A claim on the generation a name meant when the lease was taken."""

    def __init__(self, record: AdapterRecord, end: Callable[[], None]) -> None:
        super().__init__(end)
        self.record = record
