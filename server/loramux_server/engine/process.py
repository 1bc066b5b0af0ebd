"""Start and stop a worker's process. What is said between the two is `link.py`'s and `client.py`'s. No torch."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable

import msgspec

from loramux_adapters.errors import EngineError
from loramux_server.engine.options import WorkerOptions

_STOP_WAIT_S = 10.0


async def start_worker(options: WorkerOptions) -> Process:
    """It reads its options from standard input, which then ends."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "loramux_server.engine", stdin=PIPE)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(options))
    process.stdin.close()
    return process


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
