"""Notices a worker that has work and does nothing about it. No torch.

A worker that computes says so with every step, and between long slices with a `Beat`; a worker that is silent while somebody
waits hangs. Silence is counted in looks, not read off a clock: a front that was itself stopped for a while (a debugger, a
laptop's lid) does not blame the worker for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable

LOOK_S = 1.0
_DUMP_S = 1.0  # for the stacks of all threads to be written


class Watch:
    """`heard` with every message of the worker; `run` beside it."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._every = min(LOOK_S, timeout / 8)
        self._silent = 0.0
        self._heard = False

    def heard(self) -> None:
        self._heard = True

    @property
    def stall(self) -> str | None:
        """What /health says from half of the timeout on; the other half is left to the end of the worker."""
        return self._reason() if self._silent >= self._timeout / 2 else None

    async def run(self, pending: Callable[[], int], hangs: Callable[[str], Awaitable[None]]) -> None:
        """For as long as the task runs; `hangs` is to end the worker."""
        while True:
            await asyncio.sleep(self._every)
            self.look(pending() > 0)
            if self._silent >= self._timeout:
                await hangs(self._reason())
                self._silent = 0.0

    def look(self, pending: bool) -> None:
        waits = pending and not self._heard
        self._silent = self._silent + self._every if waits else 0.0
        self._heard = False

    def _reason(self) -> str:
        return f"the worker has not moved for {self._silent:.3g} s while requests or jobs wait for it"


async def end_hanging(process: asyncio.subprocess.Process) -> None:
    """Have the stacks of all its threads written to the log, then kill it."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGUSR1)
        await asyncio.sleep(_DUMP_S)
        process.kill()
