"""From what the trainer wrote to models that can be called: checkpoints while it runs, the adapter at its end.

Every one passes the gate and becomes a generation under a name. Checkpoints are not verified: they are the server's own
work, early ones do next to nothing, and a verification takes time from those who are served. The finished adapter is, and
what was found is kept with it. Where a model comes from is in its manifest, and shortened in its metadata.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loramux_adapters.access import Access
from loramux_adapters.errors import LoramuxError
from loramux_adapters.training.layout import MANIFEST_FILE, PUBLISHED, STATE_FILE
from loramux_server.catalog import AdapterCatalog
from loramux_server.publishing import Options, Published
from loramux_server.training.database import TrainingDatabase
from loramux_server.training.files import FileStore
from loramux_server.training.folder import read_json, stage
from loramux_server.training.job import Job
from loramux_server.training.names import checkpoint_name
from loramux_server.training.records import CheckpointRecord, FileRecord, JobEvent, new_id
from loramux_server.training.results import step_metrics

CURVE_POINTS = 32  # of a loss curve in metadata
LISTED_TARGETS = 64

_CURVE = ("step", "train_loss", "valid_loss")
_OF_THE_GENERATION = {"format", "created_at", "generation"}  # which has these itself


class Publication:
    def __init__(self, catalog: AdapterCatalog, database: TrainingDatabase, files: FileStore) -> None:
        self._catalog = catalog
        self._database = database
        self._files = files

    async def checkpoint(self, job: Job, step: int) -> None:
        """Make a checkpoint callable. If it cannot be, the job is told and goes on. Raises StorageError."""
        name = checkpoint_name(job.record.name, step)
        try:
            directory = job.folder.checkpoint(step)
            state = await asyncio.to_thread(read_json, directory / STATE_FILE)
            facts = _facts(job.id, step, state["provenance"], state["history"])
            options = Options(overwrite=True, verify=False, within_quota=False, metadata=_short(facts))
            published = await self._publish(job, name, directory, facts, options)
        except (LoramuxError, OSError, ValueError, KeyError) as error:
            await job.say(JobEvent.saying(f"The checkpoint of step {step} cannot be served: {error}", "warn"))
            return
        measured = await asyncio.to_thread(self._database.metrics, job.id, step)
        checkpoint = CheckpointRecord(
            id=new_id("ftckpt_"),
            job=job.id,
            step=step,
            created=time.time(),
            model=name,
            generation=published.record.generation,
            metrics=measured.get(step, {}),
        )
        event = JobEvent.saying(f"Checkpoint created at step {step}: {name}")
        await job.change(event, checkpoint=checkpoint, interruptions=0)

    async def missing(self, job: Job) -> None:
        """Make callable what was written when a worker or server ended before it could be published."""
        known = {one.step for one in await asyncio.to_thread(self._database.checkpoints, job.id)}
        for step in await asyncio.to_thread(job.folder.checkpoints):
            if step not in known:
                await self.checkpoint(job, step)

    async def model(self, job: Job) -> None:
        """Publish the finished adapter and end the job with success, unless it is no longer running.

        Raises InvalidAdapter, StorageError, EngineError.
        """
        record, directory = job.record, job.folder.out
        manifest = await asyncio.to_thread(read_json, directory / MANIFEST_FILE)
        measured = await asyncio.to_thread(self._database.metrics, job.id)
        curve = manifest["loss_curve"]
        step = max((entry["step"] for entry in curve), default=0)
        facts = _facts(job.id, step, manifest, curve)
        options = Options(overwrite=True, allow_noop=True, within_quota=False, metadata=_short(facts))
        published = await self._publish(job, record.name, directory, facts, options)
        results = await asyncio.to_thread(self._results, measured, directory / MANIFEST_FILE, record.owner)
        ended = await job.change(
            *self._warnings(published),
            JobEvent.saying(f"New fine-tuned model created: {record.name}"),
            JobEvent.saying("The job has successfully completed"),
            only={"running"},
            results=results,
            status="succeeded",
            finished=time.time(),
            fine_tuned_model=record.name,
            trained_tokens=sum(values.get("trained_tokens", 0) for values in measured.values()),
            result_files=[file.id for file in results],
        )
        if not ended:  # cancelled or paused meanwhile
            for file in results:
                await asyncio.to_thread(self._files.discard, file)
            await self._catalog.delete(record.name, 0, Access(record.owner))

    async def _publish(
        self, job: Job, name: str, directory: Path, facts: dict[str, Any], options: Options
    ) -> Published:
        stage_it = partial(stage, directory, self._catalog.staging, job.id, {PUBLISHED: facts})
        return await self._catalog.publish(name, stage_it, options, Access(job.record.owner))

    def _results(
        self, measured: Mapping[int, Mapping[str, Any]], manifest: Path, owner: str
    ) -> list[FileRecord]:
        written = {"step_metrics.csv": step_metrics(measured), manifest.name: manifest.read_bytes()}
        return [self._files.write(data, name, "fine-tune-results", owner) for name, data in written.items()]

    def _warnings(self, published: Published) -> list[JobEvent]:
        said = list(published.warnings)
        if self._catalog.registry.verifications.outcome(published.record.generation) == "noop":
            said.append("the trained adapter changes nothing: more steps or a higher learning rate may help")
        return [JobEvent.saying(text, "warn") for text in said]


def _facts(
    job: str, step: int, provenance: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The same of a finished adapter as of the checkpoint of its last step: these may be one generation."""
    kept = {key: value for key, value in provenance.items() if key not in _OF_THE_GENERATION}
    return {"job": job, "step": step, **kept, "loss_curve": [dict(entry) for entry in curve]}


def _short(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What fits into an adapter's metadata: a curve of a few points, the last of them the end, no long lists of names."""
    curve = facts["loss_curve"]
    stride = -(-len(curve) // CURVE_POINTS)
    kept = curve[::-1][:: max(1, stride)][::-1]
    points = [{key: entry[key] for key in _CURVE if key in entry} for entry in kept]
    targets = facts["recipe"].get("target_modules", ())
    recipe = {
        key: value
        for key, value in facts["recipe"].items()
        if key != "target_modules" or len(targets) <= LISTED_TARGETS
    }
    data = {key: value for key, value in facts["data"].items() if key != "warnings"}
    told = {key: facts[key] for key in ("job", "step", "base")}
    return {"training": {**told, "recipe": recipe, "data": data, "loss_curve": points}}
