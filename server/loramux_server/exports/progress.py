"""How far a running export is, put together from what its child process says. Kept in memory only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any


class ExportProgress:
    """Bytes over all phases. A phase the plan did not name ("noise") makes the total grow when it begins."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.phase = "plan"
        self._clock = clock
        self._done: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._first: tuple[float, int] | None = (
            None  # when the first bytes were heard of, and how many they were
        )

    def plan(self, phases: Mapping[str, int]) -> None:
        self._totals = dict(phases)

    def advance(self, fields: Mapping[str, Any]) -> bool:
        """Take one progress object of the child; whether a phase began with it."""
        phase = str(fields["phase"])
        began = phase != self.phase
        for earlier in self._done:
            if earlier != phase:
                self._done[earlier] = self._totals[earlier]
        self.phase = phase
        self._totals[phase] = int(fields["total"])
        self._done[phase] = int(fields["done"])
        if self._first is None:
            self._first = (self._clock(), self.done)
        return began

    @property
    def done(self) -> int:
        return sum(self._done.values())

    @property
    def total(self) -> int:
        return sum(self._totals.values())

    @property
    def fraction(self) -> float:
        return self.done / self.total if self.total else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """At the average rate so far; None before there is one."""
        if self._first is None:
            return None
        began, before = self._first
        advanced = self.done - before
        return (self.total - self.done) * (self._clock() - began) / advanced if advanced else None
