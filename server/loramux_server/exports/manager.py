"""ExportManager: the exports of one base, queued, carried out one at a time, and kept until they are deleted.

What `create`, `cancel` and `delete` answered is durable. A job that runs when the server ends, however it ends, is taken up
again by the next server with what it had written. The job has the adapters' files by itself (see `jobs.py`).
The event loop's thread owns every record; disk work runs on threads. HTTP is `api/`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from loramux_adapters.access import OPERATOR, Access
from loramux_adapters.errors import (
    EngineError,
    Overloaded,
    RequestError,
    StorageError,
    StorageFull,
    UnknownExport,
)
from loramux_adapters.registry import AdapterRegistry
from loramux_adapters.training.layout import published_manifest
from loramux_server.exports.base import ExportBase
from loramux_server.exports.jobs import (
    ExportJob,
    ExportRequest,
    JobFault,
    JobFolder,
    MergedAdapter,
    open_jobs,
)
from loramux_server.exports.run import Export, ExportRunner

logger = logging.getLogger(__name__)

MAX_WAITING_OF_TENANT = 4
MAX_WAITING = 16


class ExportManager:
    """`root` is the folder of the exports; one process owns it. Opening it blocks."""

    def __init__(self, root: Path, registry: AdapterRegistry, base: ExportBase) -> None:
        self._root = root
        self._registry = registry
        self._base = base
        self._runner = ExportRunner(base)
        self._exports: dict[str, Export] = {}
        self._current: Export | None = None
        self._creating = asyncio.Lock()
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._removing: set[asyncio.Task[None]] = set()
        for job, folder in open_jobs(root):
            self._exports[job.id] = Export(self._take_up(job, folder), folder)

    def start(self) -> None:
        """Begin to work the queue off."""
        self._worker = asyncio.create_task(self._work())

    async def close(self) -> None:
        """End the child and every watcher; what runs goes on with the next server."""
        self._closing.set()
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        await asyncio.gather(*self._removing)
        for export in self._exports.values():
            export.touch()

    # --- what clients ask -------------------------------------------------------------------------------------------

    async def create(
        self, name: str, adapters: Sequence[tuple[str, float]], request: ExportRequest, access: Access
    ) -> Export:
        """Queue an export of `name`; `adapters` are all that are merged, `name[@generation]` and weight.

        It belongs to whoever `access` is, who was found to see the adapters.

        Raises UnknownAdapter, StorageFull, Overloaded and ExportError; then nothing is left behind.
        """
        if self._closing.is_set():
            raise EngineError("the server is shutting down")
        async with self._creating:
            waiting = [export.job.owner for export in self._exports.values() if not export.job.ended]
            own = 0 if access.is_operator else waiting.count(access.owner)
            if len(waiting) >= MAX_WAITING or own >= MAX_WAITING_OF_TENANT:
                whose = f"{own} of your" if own >= MAX_WAITING_OF_TENANT else str(MAX_WAITING)
                raise Overloaded(f"{whose} exports are waiting or running already; try again later")
            export = await asyncio.to_thread(self._create, name, adapters, request, access)
            self._exports[export.job.id] = export
        self._wake.set()
        logger.info("export %s of %s is queued", export.job.id, name)
        return export

    def counts(self) -> Counter[str]:
        """Exports by status."""
        return Counter(export.job.status for export in list(self._exports.values()))

    def of(self, name: str, access: Access = OPERATOR) -> Sequence[Export]:
        """Of an adapter, newest first; also of one that is deleted."""
        found = [
            export
            for export in self._exports.values()
            if export.job.adapter == name and access.owns(export.job.owner)
        ]
        return sorted(found, key=lambda export: export.job.created, reverse=True)

    def get(self, name: str, export_id: str, access: Access = OPERATOR) -> Export:
        export = self._exports.get(export_id)
        if export is None or export.job.adapter != name or not access.owns(export.job.owner):
            raise UnknownExport(f"id: there is no export {export_id} of this adapter", param="id")
        return export

    async def cancel(self, name: str, export_id: str) -> Export:
        """Returns when it has ended. Raises RequestError for one that had ended before."""
        export = self.get(name, export_id)
        if export.job.ended:
            raise RequestError(
                f"id: the export has {export.job.status} already", param="id", code="export_ended"
            )
        await self._cancel(export)
        return export

    async def delete(self, name: str, export_id: str) -> None:
        """Forget an export and remove its files; one that waits or runs is cancelled first."""
        export = self.get(name, export_id)
        if not export.job.ended:
            await self._cancel(export)
        await asyncio.to_thread(export.folder.forget)
        export.deleted = True
        self._exports.pop(export_id, None)
        export.touch()
        if not export.readers:
            await asyncio.to_thread(export.folder.remove)
        logger.info("export %s is deleted", export_id)

    @contextmanager
    def reading(self, name: str, export_id: str) -> Iterator[Export]:
        """The files of a finished export stay while the block runs, also when it is deleted meanwhile."""
        export = self.get(name, export_id)
        if export.job.status != "succeeded":
            raise RequestError(
                f"id: the export is {export.job.status}; only one that has succeeded can be downloaded",
                param="id",
                code="export_not_ready",
            )
        export.readers += 1
        try:
            yield export
        finally:
            export.readers -= 1
            if export.deleted and not export.readers:
                removing = asyncio.create_task(asyncio.to_thread(export.folder.remove))
                self._removing.add(removing)
                removing.add_done_callback(self._removing.discard)

    async def watch(self, export: Export) -> AsyncGenerator[None, None]:
        """Yields now and after every change, the last time when it has ended, is deleted, or the server closes."""
        while True:
            changed = export.changed
            yield
            if export.job.ended or export.deleted or self._closing.is_set():
                return
            await changed.wait()

    # --- the queue --------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            waiting = [
                export
                for export in self._exports.values()
                if export.job.status == "queued" and not export.cancelled
            ]
            if not waiting:
                self._wake.clear()
                await self._wake.wait()
                continue
            export = min(waiting, key=lambda export: export.job.created)
            self._current = export
            try:
                await self._runner.carry_out(export)
            except (StorageError, OSError) as error:
                logger.error("export %s cannot go on: %s", export.job.id, error)
                fault = JobFault(
                    "the server cannot write its exports; its log has the details", "storage_error"
                )
                # not durable, so the next server tries again
                export.job = export.job.saying(
                    fault.message, "error", status="failed", finished=time.time(), error=fault
                )
                export.touch()
            self._current = None

    async def _cancel(self, export: Export) -> None:
        export.cancelled = True
        if export is not self._current:
            try:
                await self._runner.end(export, "cancelled", "cancelled")
            except StorageError:
                export.cancelled = False
                raise
            return
        if export.process is not None:
            export.process.stop()
        async for _ in self.watch(export):
            pass

    # --- the blocking parts -----------------------------------------------------------------------------------------

    def _take_up(self, job: ExportJob, folder: JobFolder) -> ExportJob:
        """What the last server left in the middle."""
        if job.ended:
            return job
        if folder.out.exists():
            size = sum(path.stat().st_size for path in folder.files())
            said = "succeeded while the server was ending"
            job = job.saying(said, status="succeeded", finished=time.time(), num_bytes=size)
        elif job.status == "running":
            job = job.saying("interrupted by the end of the server", "warn", status="queued")
        folder.save(job)
        return job

    def _create(
        self, name: str, adapters: Sequence[tuple[str, float]], request: ExportRequest, access: Access
    ) -> Export:
        needed = self._base.needed_bytes(request.format)
        self._check_space(needed)
        folder = JobFolder(self._root / f"export-{uuid4().hex[:16]}")
        with contextlib.ExitStack() as held, contextlib.ExitStack() as undo:
            undo.callback(folder.remove)
            merged: list[MergedAdapter] = []
            for index, (model, weight) in enumerate(adapters):
                record = held.enter_context(self._registry.lease(model)).record
                merged.append(MergedAdapter(record.name, record.generation, weight))
                store = self._registry.store
                trained = published_manifest(store.manifest(record.generation).info, record.origin)
                folder.keep(index, merged[-1], store.path(record.generation), trained)
            job = ExportJob(
                id=folder.path.name,
                adapter=name,
                adapters=merged,
                request=request,
                created=time.time(),
                needed_bytes=needed,
                owner=access.owner,
            )
            job = job.saying("created")
            folder.save(job)
            undo.pop_all()
        return Export(job, folder)

    def _check_space(self, needed: int) -> None:
        """The exports that wait or run will take theirs first."""
        promised = sum(
            max(0, export.job.needed_bytes - export.folder.present_bytes())
            for export in list(self._exports.values())
            if not export.job.ended
        )
        free = shutil.disk_usage(self._root).free
        if needed + promised > free:
            others = f", of which {promised / 1e9:.2f} GB are for exports that wait" if promised else ""
            raise StorageFull(
                f"the export needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free{others}; delete "
                "exports that are not needed any more"
            )
