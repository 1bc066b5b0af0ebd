"""JobManager: the fine-tuning jobs of one base, queued, trained one at a time beside serving.

What `create`, `cancel`, `pause` and `resume` answered is durable. A job that trains when the worker or the server ends,
however that comes, is queued again and goes on from its last checkpoint. A paused job leaves the trainer to the next one;
resumed, it queues up behind the others. The event loop's thread owns every job; disk work runs on threads. HTTP is `api/`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from loramux_adapters.access import OPERATOR, Access
from loramux_adapters.errors import EngineError, Overloaded, StorageError, TrainingError, UnknownJob
from loramux_adapters.files import storage_error
from loramux_server.catalog import AdapterCatalog
from loramux_server.engine.messages import AdapterRef
from loramux_server.training.database import open_database
from loramux_server.training.files import FileStore
from loramux_server.training.folder import JobFolder
from loramux_server.training.job import Job
from loramux_server.training.names import model_name
from loramux_server.training.publication import Publication
from loramux_server.training.records import (
    FINAL,
    STATUSES,
    CheckpointRecord,
    JobEvent,
    JobFault,
    JobRecord,
    JobRequest,
    Status,
    new_id,
)
from loramux_server.training.runner import TrainingRunner, after_a_crash

logger = logging.getLogger(__name__)

MAX_UNFINISHED_OF_TENANT = 20  # paused ones too, so that one tenant does not take the queue from all
MAX_UNFINISHED = 100
POLL_S = 0.1  # until the worker is ready


class JobManager:
    """`root` is the base's folder below the data directory; one process owns it. Opening it blocks."""

    def __init__(self, root: Path, catalog: AdapterCatalog, tensorboard: Path | None = None) -> None:
        self._root = root / "jobs"
        self._engine = catalog.engine
        self.database = open_database(root)
        self.files = FileStore(root / "files", self.database)
        self._jobs: dict[str, Job] = {}
        self._current: Job | None = None
        self._creating = asyncio.Lock()
        self._validating = asyncio.Semaphore(1)
        self._validations: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        publication = Publication(catalog, self.database, self.files)
        self._runner = TrainingRunner(
            self._engine, publication, catalog.metrics.training, self._closing, tensorboard
        )
        self._open()
        catalog.metrics.training.watch(self.counts)

    def start(self) -> None:
        """Begin to work the queue off."""
        for job in self._jobs.values():
            if not job.record.validated and not job.record.ended:
                self._begin_validation(job)
        self._worker = asyncio.create_task(self._work())

    def close(self) -> None:
        """Once nobody asks any more."""
        self.database.close()

    async def stop(self, grace: float) -> None:
        """End every watcher, and training after its step, with a checkpoint; after `grace` seconds without.

        What is not done goes on with the next server.
        """
        self._closing.set()
        self._wake.set()
        for job in self._jobs.values():
            job.touch()
        tasks = [*self._validations, *([self._worker] if self._worker else [])]
        try:
            if self._worker is not None:
                if self._current is not None:
                    await self._runner.stop(self._current)
                await asyncio.wait({self._worker}, timeout=grace)
        finally:
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- what clients ask -------------------------------------------------------------------------------------------

    async def create(
        self, request: JobRequest, base: str, initial: AdapterRef | None, access: Access = OPERATOR
    ) -> Job:
        """Queue a job; its files are validated first. `initial` is the adapter to train further, which the caller holds.

        Raises UnknownFile, StorageError, Overloaded; then nothing is left behind.
        """
        if self._closing.is_set():
            raise EngineError("the server is shutting down")
        async with self._creating:
            unfinished = [job.record.owner for job in self._jobs.values() if not job.record.ended]
            own = 0 if access.is_operator else unfinished.count(access.owner)
            if len(unfinished) >= MAX_UNFINISHED or own >= MAX_UNFINISHED_OF_TENANT:
                whose = f"{own} of your" if own >= MAX_UNFINISHED_OF_TENANT else str(MAX_UNFINISHED)
                raise Overloaded(f"{whose} jobs are unfinished already; cancel one or try again later")
            job = await asyncio.to_thread(self._create, request, base, initial, access.owner)
            self._jobs[job.id] = job
        self._begin_validation(job)
        logger.info("fine-tuning job %s is created", job.id)
        return job

    def all(self, access: Access = OPERATOR) -> Sequence[Job]:
        """Newest first."""
        return [job for job in self._jobs.values() if access.owns(job.record.owner)][::-1]

    def get(self, job_id: str, access: Access = OPERATOR) -> Job:
        job = self._jobs.get(job_id)
        if job is None or not access.owns(job.record.owner):
            raise UnknownJob(f"id: there is no fine-tuning job {job_id[:64]!a}", param="id")
        return job

    async def checkpoints(self, job: Job) -> list[CheckpointRecord]:
        """Newest first."""
        return await asyncio.to_thread(self.database.checkpoints, job.id)

    async def cancel(self, job_id: str) -> Job:
        """Raises TrainingError for a job that has ended."""
        event = JobEvent.saying("The job was cancelled")
        job = self.get(job_id)
        before: tuple[Status, ...] = tuple(status for status in STATUSES if status not in FINAL)
        if not await job.change(event, only=before, status="cancelled", finished=time.time()):
            raise _refusal(job, "cancelled")
        if job is self._current:
            await self._runner.stop(job)
        else:
            await asyncio.to_thread(job.folder.remove)
        return job

    async def pause(self, job_id: str) -> Job:
        """From here on it waits; the trainer ends its slice. Raises TrainingError if it cannot be paused."""
        job = self.get(job_id)
        event = JobEvent.saying("The job is paused")
        if not await job.change(event, only={"validating_files", "queued", "running"}, status="paused"):
            raise _refusal(job, "paused")
        if job is self._current:
            await self._runner.stop(job)
        return job

    async def resume(self, job_id: str) -> Job:
        """Back into the queue, behind the others. Raises TrainingError for a job that is not paused."""
        job = self.get(job_id)
        event = JobEvent.saying("The job is resumed")
        status: Status = "queued" if job.record.validated else "validating_files"
        if not await job.change(event, only={"paused"}, status=status, queued=time.time()):
            raise _refusal(job, "resumed")
        if status == "validating_files":
            self._begin_validation(job)
        self._wake.set()
        return job

    async def watch(self, job: Job) -> AsyncGenerator[None, None]:
        """Yields now and after every change, the last time when it has ended or the server closes."""
        while True:
            changed, last = job.changed, job.record.ended or self._closing.is_set()
            yield
            if last:
                return
            await changed.wait()

    def counts(self) -> Counter[str]:
        return Counter(job.record.status for job in self._jobs.values())

    # --- the queue --------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while not self._closing.is_set():
            waiting = [job for job in self._jobs.values() if job.record.status == "queued"]
            if not waiting:
                self._wake.clear()
                await self._wake.wait()
                continue
            if self._engine.state != "ready":
                await asyncio.sleep(POLL_S)
                continue
            job = self._current = min(waiting, key=lambda job: job.record.queued)
            try:
                await self._runner.carry_out(job)
                if job.record.ended:
                    await asyncio.to_thread(job.folder.remove)
            except (StorageError, OSError) as error:
                logger.error("fine-tuning job %s cannot go on: %s", job.id, error)
                job.hold()
            finally:
                self._current = None

    def _begin_validation(self, job: Job) -> None:
        task = asyncio.create_task(self._validate(job))
        self._validations.add(task)
        task.add_done_callback(self._validations.discard)

    async def _validate(self, job: Job) -> None:
        """Read the files' rows. A job that is paused meanwhile stays so, one that has ended too."""
        try:
            async with self._validating:
                await self._validated(job)
        except (StorageError, OSError) as error:
            logger.error("fine-tuning job %s cannot go on: %s", job.id, error)
            job.hold()

    async def _validated(self, job: Job) -> None:
        try:
            await asyncio.to_thread(job.folder.check_rows)
        except TrainingError as error:
            fault = JobFault(error.message, error.code, error.param)
            event = JobEvent.saying(f"The job failed: {error.message}", "error")
            only: tuple[Status, ...] = ("validating_files", "paused")
            if await job.change(event, only=only, status="failed", finished=time.time(), error=fault):
                await asyncio.to_thread(job.folder.remove)
            return
        event = JobEvent.saying("Files validated, moving job to queued state")
        if await job.change(event, only={"validating_files"}, status="queued", validated=True):
            self._wake.set()
        else:
            await job.change(only={"paused"}, validated=True)

    # --- the blocking parts -----------------------------------------------------------------------------------------

    def _open(self) -> None:
        """What the last server left: jobs in the middle, and folders of those that ended or never began."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            for record in self.database.jobs():
                if record.status == "running":
                    record, event = after_a_crash(record)
                    self.database.save_job(record, [event])
                folder = JobFolder(self._root / record.id)
                self._jobs[record.id] = Job(record, folder, self.database)
            for path in self._root.iterdir():
                job = self._jobs.get(path.name)
                if job is None or job.record.ended:
                    shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            raise storage_error("the fine-tuning jobs cannot be opened", error) from error

    def _create(self, request: JobRequest, base: str, initial: AdapterRef | None, owner: str) -> Job:
        job_id, now = new_id("ftjob-"), time.time()
        folder = JobFolder(self._root / job_id)
        with contextlib.ExitStack() as undo:
            undo.callback(folder.remove)
            folder.create()
            folder.keep_file("training_file", self.files, request.training_file)
            if request.validation_file is not None:
                folder.keep_file("validation_file", self.files, request.validation_file)
            if initial is not None:
                folder.keep_adapter(Path(initial.path))
            folder.sync()
            record = JobRecord(
                id=job_id,
                request=request,
                name=model_name(base, request.suffix),
                created=now,
                queued=now,
                initial=None if initial is None else initial.generation,
                owner=owner,
            )
            events = [
                JobEvent.saying(f"Created fine-tuning job: {job_id}"),
                JobEvent.saying(f"Validating training file: {request.training_file}"),
            ]
            self.database.save_job(record, events)
            undo.pop_all()
        return Job(record, folder, self.database)


def _refusal(job: Job, wanted: str) -> TrainingError:
    return TrainingError(
        f"id: the job is {job.record.status}, and cannot be {wanted}", param="id", code="invalid_job_status"
    )
