"""Carrying one fine-tuning job out: what the worker says becomes events, checkpoints, metrics and the job's end.

Promises: when `carry_out` returns, the trainer is free. A job whose worker died is back in the queue, to go on from its last
checkpoint; one that could not be written to the disk is paused with all it has, to be resumed when there is room. Only what
is still `running` is given a new status: a job that was cancelled or paused meanwhile stays so. Does not know of other jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from contextlib import aclosing
from pathlib import Path

import msgspec

from loramux_adapters.errors import EngineError, LoramuxError, StorageError, StorageFull
from loramux_adapters.training.tensorboard import TensorBoardLog
from loramux_server.engine.interface import EngineClient
from loramux_server.engine.messages import (
    AdapterRef,
    StartTraining,
    TrainingCheckpoint,
    TrainingDiagnosis,
    TrainingEnded,
    TrainingEval,
    TrainingEvent,
    TrainingPrepared,
    TrainingStep,
)
from loramux_server.training.job import Job, Progress
from loramux_server.training.publication import Publication
from loramux_server.training.records import JobEvent, JobFault, JobRecord
from loramux_server.training_metrics import TrainingMetrics

logger = logging.getLogger(__name__)

MAX_INTERRUPTIONS = 5  # ends of the worker, or of the server, without a checkpoint between them


def after_a_crash(record: JobRecord) -> tuple[JobRecord, JobEvent]:
    """A job that was running when the server died, to the next one. One that may be why is paused, with all it has."""
    count = record.interruptions + 1
    if count > MAX_INTERRUPTIONS:
        text = f"Paused: the server ended {count} times while this job ran, and no checkpoint came between"
        return msgspec.structs.replace(record, status="paused", interruptions=0), JobEvent.saying(
            text, "error"
        )
    text = "Interrupted by the end of the server, back in the queue to go on from the last checkpoint"
    return msgspec.structs.replace(record, status="queued", interruptions=count), JobEvent.saying(
        text, "warn"
    )


class TrainingRunner:
    """`closing` is set when the server ends; below `tensorboard` each job gets a folder of its curves."""

    def __init__(
        self,
        engine: EngineClient,
        publication: Publication,
        metrics: TrainingMetrics,
        closing: asyncio.Event,
        tensorboard: Path | None = None,
    ) -> None:
        self._engine = engine
        self._publication = publication
        self._metrics = metrics
        self._closing = closing
        self._tensorboard = tensorboard
        self._log: TensorBoardLog | None = None  # of the job that is carried out

    async def carry_out(self, job: Job) -> None:
        """Raises StorageError if not even the job's record can be written."""
        again = job.record.started is not None
        event = JobEvent.saying("Fine-tuning job goes on" if again else "Fine-tuning job started")
        started = job.record.started or time.time()
        if not await job.change(event, only={"queued"}, status="running", started=started):
            return
        try:
            await self._publication.missing(job)
            if job.folder.trained or await self._train(job):
                await self._publication.model(job)
        except StorageError as error:
            event = JobEvent.saying(
                f"{error.message}; the job is paused, resume it when this is mended", "error"
            )
            await job.change(event, only={"running"}, status="paused")
        except EngineError as error:
            await self._interrupted(job, error.message)
        except LoramuxError as error:
            await self._fail(job, JobFault(error.message, error.code, error.param))
        # Whatever is wrong with one job, the next one is to be trained.
        except Exception:
            logger.exception("fine-tuning job %s failed", job.id)
            message = "internal error; the server's log has the details"
            await self._fail(job, JobFault(message, "internal_error"))
        finally:
            job.progress = None
            self._metrics.idle()
            log, self._log = self._log, None
            if log is not None:
                await asyncio.to_thread(log.close)
        logger.info("fine-tuning job %s is %s", job.id, job.record.status)

    async def stop(self, job: Job) -> None:
        """End the training of a job that is to be something else than running, keeping its steps unless cancelled."""
        with contextlib.suppress(EngineError):  # without a worker nothing is trained
            await self._engine.stop_training(job.id, save=job.record.status != "cancelled")

    async def _train(self, job: Job) -> bool:
        """Whether the run is complete, and still wanted."""
        ended: TrainingEnded | None = None
        stopping = False
        async with aclosing(self._engine.train(_command(job))) as events:
            async for event in events:
                if isinstance(event, TrainingEnded):
                    ended = event
                    continue
                await self._observe(job, event)
                if not stopping and self._is_unwanted(job):  # since before the worker knew of it, maybe
                    stopping = True
                    await self.stop(job)
        if ended is None:
            raise EngineError("training ended without a result")
        if ended.status == "failed":
            message = ended.error or "training failed"
            if ended.code in (StorageError.code, StorageFull.code):
                raise StorageError(message, code=ended.code)
            await self._fail(job, JobFault(message, ended.code or "training_failed", ended.param))
            return False
        if ended.status == "stopped":
            await self._stopped(job, ended.step)
            return False
        return job.record.status == "running"

    def _is_unwanted(self, job: Job) -> bool:
        return job.record.status != "running" or self._closing.is_set()

    async def _stopped(self, job: Job, step: int) -> None:
        if job.record.status == "running" and not self._closing.is_set():
            raise EngineError("training was stopped by the worker")
        if job.record.status == "cancelled":
            return
        text = f"Stopped after step {step}, with a checkpoint"
        if self._closing.is_set():
            text += "; it goes on when the server is back"
        if not await job.change(JobEvent.saying(text), only={"running"}, status="queued"):
            await job.say(JobEvent.saying(text))

    async def _interrupted(self, job: Job, reason: str) -> None:
        count = job.record.interruptions + 1
        if count > MAX_INTERRUPTIONS:
            text = (
                f"the worker ended {count} times while this job ran, and no checkpoint came between: {reason}"
            )
            await self._fail(job, JobFault(text, "training_interrupted"))
            return
        text = f"Interrupted, back in the queue to go on from the last checkpoint: {reason}"
        event = JobEvent.saying(text, "warn")
        await job.change(event, only={"running"}, status="queued", interruptions=count)

    async def _fail(self, job: Job, fault: JobFault) -> None:
        param = fault.param
        path = None if param is None else job.record.request.paths.get(param, param)
        error = JobFault(fault.message, fault.code, path)
        event = JobEvent.saying(f"The job failed: {fault.message}", "error")
        await job.change(event, only={"running"}, status="failed", finished=time.time(), error=error)

    # --- what the worker says ---------------------------------------------------------------------------------------

    async def _observe(self, job: Job, event: TrainingEvent) -> None:
        if isinstance(event, TrainingStep):
            await self._step(job, event)
        elif isinstance(event, TrainingEval):
            if self._log is not None:
                self._log.evaluated(event)
            await job.say(_evaluated(event))
        elif isinstance(event, TrainingCheckpoint):
            if job.record.status != "cancelled":
                await self._publication.checkpoint(job, event.step)
        elif isinstance(event, TrainingDiagnosis):
            data = {"step": event.step, "code": event.code, "param": event.param}
            warning = JobEvent.saying(f"Step {event.step}: {event.message}", "warn", data)
            await job.say(warning)
        elif isinstance(event, TrainingPrepared):
            await self._prepared(job, event)

    async def _prepared(self, job: Job, event: TrainingPrepared) -> None:
        job.progress = Progress(event.total_steps, event.step)
        if self._tensorboard is not None:
            self._log = await asyncio.to_thread(TensorBoardLog, self._tensorboard / job.id, event.step)
        plan = event.plan
        events = []
        if job.record.resolved is None:
            text = f"Training {plan['trainable_parameters']:,} parameters for {event.total_steps} steps"
            shown = {"recipe": plan["recipe"], "auto": plan["auto"], "data": plan["data"]}
            events = [JobEvent.saying(text, data=shown)]
            events += [JobEvent.saying(text, "warn") for text in plan["warnings"]]
        elif event.step:
            events = [JobEvent.saying(f"Goes on from step {event.step} of {event.total_steps}")]
        await job.change(*events, resolved=plan["recipe"], total_steps=event.total_steps)

    async def _step(self, job: Job, step: TrainingStep) -> None:
        self._metrics.observe(step)
        if self._log is not None:
            self._log.trained(step)
        if job.progress is not None:
            job.progress.advance(step.step)
        data = {
            "step": step.step,
            "total_steps": step.total_steps,
            "epoch": step.epoch,
            "train_loss": step.train_loss,
            "train_mean_token_accuracy": step.train_mean_token_accuracy,
            "learning_rate": step.learning_rate,
            "grad_norm": step.grad_norm,
            "tokens": step.tokens,
            "trained_tokens": step.trained_tokens,
            "tokens_per_second": step.tokens / max(step.seconds, 1e-9),
            "seconds": step.seconds,
            "waited": step.waited,
            "memory_bytes": step.memory_bytes,
        }
        text = f"Step {step.step}/{step.total_steps}: training loss={step.train_loss:.4f}"
        await job.say(JobEvent.metrics(step.step, text, data))


def _command(job: Job) -> StartTraining:
    record, folder = job.record, job.folder
    initial = None
    if record.initial is not None:
        initial = AdapterRef(record.initial, str(folder.initial))
    training_file, validation_file = folder.file("training_file"), folder.file("validation_file")
    if training_file is None:
        raise StorageError("the job's training file is gone")
    return StartTraining(
        id=record.id,
        out=str(folder.out),
        recipe=record.request.recipe,
        training_file=str(training_file),
        validation_file=None if validation_file is None else str(validation_file),
        initial=initial,
    )


def _evaluated(event: TrainingEval) -> JobEvent:
    """The whole validation file is read each time, so that the figures of OpenAI's two kinds are equal."""
    loss, accuracy = event.valid_loss, event.valid_mean_token_accuracy
    data = {
        "step": event.step,
        "valid_loss": loss,
        "valid_mean_token_accuracy": accuracy,
        "full_valid_loss": loss,
        "full_valid_mean_token_accuracy": accuracy,
    }
    return JobEvent.metrics(event.step, f"Step {event.step}: validation loss={loss:.4f}", data)
