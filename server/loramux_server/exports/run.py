"""Carrying one export out: the child process, what it says, and how the job ends.

Promises: when `carry_out` returns, the job has ended; a state is durable before anybody sees it. Cancelling the coroutine
kills the child and leaves the job as it is, to be resumed. A cancelled or failed export leaves no weights. Does not
know of other jobs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from loramux_server.exports.base import ExportBase
from loramux_server.exports.jobs import ExportJob, JobFault, JobFolder, Level, Status
from loramux_server.exports.process import ExportProcess
from loramux_server.exports.progress import ExportProgress

logger = logging.getLogger(__name__)

NOT_PROVEN = "export_not_proven"

_PHASES = {
    "merge": "merging",
    "verify": "comparing with the served model",
    "noise": "measuring the server's own rounding",
}


@dataclass(eq=False)
class Export:
    """A job and what is known of it while this server runs."""

    job: ExportJob
    folder: JobFolder
    progress: ExportProgress | None = None
    process: ExportProcess | None = None
    cancelled: bool = False
    deleted: bool = False
    readers: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def change(self, job: ExportJob) -> None:
        """Make a record durable, then visible. Raises StorageError."""
        await asyncio.to_thread(self.folder.save, job)
        self.job = job
        self.touch()

    def touch(self) -> None:
        """Wake whoever watches."""
        self.changed.set()
        self.changed = asyncio.Event()


class ExportRunner:
    """Exports of one base."""

    def __init__(self, base: ExportBase) -> None:
        self._base = base

    async def carry_out(self, export: Export) -> None:
        resume = export.folder.partial.exists()
        said = "goes on with what was written" if resume else "started"
        started = export.job.started or time.time()
        await export.change(export.job.saying(said, status="running", started=started))
        fault = await self._run(export, resume=resume)
        if resume and fault is not None and fault.param == "resume":
            await export.change(
                export.job.saying("starts again: what was written is another version's", "warn")
            )
            await asyncio.to_thread(export.folder.remove_partial)
            fault = await self._run(export, resume=False)
        if fault is None:
            await self._succeed(export)
        elif export.cancelled:
            await asyncio.to_thread(export.folder.remove_partial)
            await self.end(export, "cancelled", "cancelled")
        else:
            report = await asyncio.to_thread(export.folder.give_up)
            error = _explained(fault, report, export.folder.path)
            await self.end(export, "failed", error.message, "error", error=error)

    async def _run(self, export: Export, *, resume: bool) -> JobFault | None:
        export.progress = ExportProgress()
        export.process = ExportProcess(self._arguments(export, resume), on_gpu=self._base.device == "cuda")
        if export.cancelled:
            export.process.stop()
        try:
            return await export.process.run(partial(self._observe, export))
        finally:
            export.process = None

    def _arguments(self, export: Export, resume: bool) -> list[str]:
        request, folder = export.job.request, export.folder
        arguments = ["export", *self._base.arguments, "--out", str(folder.out)]
        for index, adapter in enumerate(export.job.adapters):
            arguments += ["--adapter", f"{folder.adapter(index, adapter)}={adapter.weight!r}"]
        arguments += ["--format", request.format, "--onto", request.onto]
        arguments += ["--shard-size", str(request.shard_size), "--verify-tokens", str(request.verify_tokens)]
        if request.verify is not None:
            arguments += ["--verify", str(request.verify)]
        flags = {"--compare": request.compare, "--strict": request.strict, "--resume": resume}
        return [*arguments, *(flag for flag, on in flags.items() if on), "--json", "--progress", "json"]

    def _observe(self, export: Export, fields: dict[str, Any]) -> None:
        progress = export.progress
        assert progress is not None
        if fields["event"] == "plan":
            progress.plan(fields["phases"])
            for warning in fields["warnings"]:
                export.job = export.job.saying(warning, "warn")
        elif progress.advance(fields):  # saved with the next change of status: a phase is no promise
            export.job = export.job.saying(_PHASES.get(progress.phase, progress.phase))
        export.touch()

    async def _succeed(self, export: Export) -> None:
        files = await asyncio.to_thread(export.folder.files)
        num_bytes = sum(path.stat().st_size for path in files)
        await self.end(export, "succeeded", "succeeded", num_bytes=num_bytes)

    async def end(
        self, export: Export, status: Status, message: str, level: Level = "info", **changes: Any
    ) -> None:
        """Give a job its last status."""
        ended = export.job.saying(message, level, status=status, finished=time.time(), **changes)
        await export.change(ended)
        logger.info("export %s of %s has %s", ended.id, ended.adapter, status)


def _explained(fault: JobFault, report: dict[str, Any] | None, folder: Path) -> JobFault:
    """The command's own sentence without this machine's paths, or what the report says was not proven."""
    if fault.code == NOT_PROVEN and report is not None:
        failures = "; ".join(report["verification"]["failures"])
        message = f"the export is not equal to the served model: {failures}; format fp32 would be closer"
        return JobFault(message, NOT_PROVEN, "format")
    return JobFault(fault.message.replace(f"{folder}/", ""), fault.code, fault.param)
