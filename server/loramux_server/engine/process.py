"""Start and stop a worker's process. What is said between the two is `link.py`'s and `client.py`'s. No torch."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from loramux_adapters.errors import EngineError
from loramux_server.engine.options import WorkerOptions

_STOP_WAIT_S = 10.0
# Turns that a thread of the engine watches for the others before it sleeps (GNU libgomp, "GOMP_SPINCOUNT"): about half a
# millisecond. Its default is ten times as long, and beside a busy program that is time the awaited thread does not get.
_SPINS = "10000"


async def start_worker(options: WorkerOptions) -> Process:
    """It reads its options from standard input, which then ends."""
    command = (sys.executable, "-m", "loramux_server.engine")
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, env=worker_environment(os.environ))
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(options))
    process.stdin.close()
    return process


def worker_environment(own: Mapping[str, str]) -> dict[str, str]:
    """`own`, and how long threads of a product wait for each other, unless `own` says something about that."""
    if "GOMP_SPINCOUNT" in own or "OMP_WAIT_POLICY" in own:
        return dict(own)
    return {**own, "GOMP_SPINCOUNT": _SPINS}


async def stop_worker(process: Process, farewell: Callable[[], Awaitable[None]] | None) -> None:
    """Gone on return: by itself, if it is told to and does it in time."""
    if process.returncode is None and farewell is not None:
        try:
            await farewell()
            await asyncio.wait_for(process.wait(), _STOP_WAIT_S)
        except (EngineError, TimeoutError):
            pass
    if process.returncode is None:
        process.kill()
        await process.wait()
