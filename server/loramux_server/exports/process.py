"""Running one export in a child process: its arguments in, its progress as it comes, its outcome.

The outcome is the program's own verdict (exit code, and one JSON object on standard output); a child that ends without one
is a fault with its exit status, and its last words go to the log. Cancelling the coroutine kills the child.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from loramux_server.exports.jobs import JobFault

logger = logging.getLogger(__name__)

_LAST_LINES = 20
_LONGEST_LINE = 2**20

Observer = Callable[[dict[str, Any]], None]


class ExportProcess:
    """One run of `loramux export`; `stop` may be called at any time."""

    def __init__(self, arguments: Sequence[str], *, on_gpu: bool) -> None:
        self.arguments = arguments
        self._on_gpu = on_gpu
        self._process: asyncio.subprocess.Process | None = None
        self._stopped = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """End it now; `run` then returns a fault."""
        self._stopped = True
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)

    async def run(self, observe: Observer) -> JobFault | None:
        """None when the export is there. `observe` is given each object of the child's progress."""
        if self._stopped:
            return JobFault("the export was stopped", "export_stopped")
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loramux_server.exports.child", *self.arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment(),
            limit=_LONGEST_LINE,
            start_new_session=True,  # Ctrl-C is for the server, which then ends the child
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            if self._stopped:
                self.stop()
            output, last = await asyncio.gather(process.stdout.read(), _read_lines(process.stderr, observe))
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return None if status == 0 else self._fault(status, output, last)

    def _environment(self) -> dict[str, str]:
        """One thread, because the cores are the worker's; no GPU, unless the base was quantized on it."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        return environment if self._on_gpu else {**environment, "CUDA_VISIBLE_DEVICES": ""}

    def _fault(self, status: int, output: bytes, last: Sequence[str]) -> JobFault:
        try:
            error = json.loads(output)["error"]
            return JobFault(str(error["message"]), str(error["code"]), error["param"])
        except (ValueError, KeyError, TypeError):
            how = f"signal {-status}" if status < 0 else f"exit code {status}"
            if not self._stopped:
                logger.error("an export process ended with %s:\n%s", how, "\n".join(last))
            advice = (
                "; the kernel ends processes so when memory runs out" if status == -signal.SIGKILL else ""
            )
            return JobFault(f"the export process ended with {how}{advice}", "export_crashed")


async def _read_lines(stream: asyncio.StreamReader, observe: Observer) -> Sequence[str]:
    """The last lines that are no progress."""
    last: deque[str] = deque(maxlen=_LAST_LINES)
    while line := await stream.readline():
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        if isinstance(fields, dict) and "event" in fields:
            observe(fields)
        else:
            last.append(line.decode(errors="replace").rstrip())
    return last
