"""The application over real files, jobs and a real catalogue, with a trainer that learns nothing.

`TrainingEngine` plays the worker: steps, checkpoints that are continued from, a finished adapter, its death.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from transformers import PreTrainedTokenizerFast

from loramux_adapters.errors import EngineError
from loramux_adapters.spec import AdapterSpec, BaseGeometry
from loramux_adapters.training.layout import CHECKPOINTS, MANIFEST_FILE, STATE_FILE
from loramux_adapters.training.start import stamped
from loramux_adapters.weights import LoraWeights
from loramux_server.api.app import ApiSettings, create_app
from loramux_server.catalog import AdapterCatalog
from loramux_server.engine.messages import (
    StartTraining,
    TrainingCheckpoint,
    TrainingDiagnosis,
    TrainingEnded,
    TrainingEval,
    TrainingEvent,
    TrainingPrepared,
    TrainingStep,
)
from loramux_server.metrics import Metrics
from loramux_server.training.job import Job
from loramux_server.training.manager import JobManager
from loramux_server.training.records import FINAL
from tests.api.catalog_support import PROBE, TinyEngine

PATIENCE_S = 60
STEPS = 4
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
RECIPE = {"n_epochs": 1, "batch_size": 1, "r": 4, "target_modules": ["q_proj", "v_proj"], "seed": 42}
ROWS = (json.dumps(CHAT) + "\n").encode() * 3


def weights_at(step: int, geometry: BaseGeometry, *, r: int = 4) -> LoraWeights:
    """What this trainer has after so many steps; the same in every run."""
    spec = stamped(AdapterSpec(r=r, lora_alpha=8.0, target_modules=("q_proj", "v_proj")), geometry)
    generator = torch.Generator().manual_seed(step)
    tensors = {}
    for module in spec.targets(geometry):
        out_features, in_features = geometry.linear_shapes[module]
        a, b = (r, in_features), (out_features, r)
        tensors[module] = (torch.randn(a, generator=generator), torch.randn(b, generator=generator))
    return LoraWeights(spec, tensors)


@dataclass
class TrainingEngine(TinyEngine):
    """`gate` lets that many steps pass; None lets all. Every second step is validated and saved."""

    gate: asyncio.Semaphore | None = None
    ending: TrainingEnded | None = None  # instead of the first step
    dies: list[int] = field(default_factory=list)  # steps in the middle of which the worker ends, each once
    started: list[StartTraining] = field(default_factory=list)
    stopped: list[tuple[str, bool]] = field(default_factory=list)
    training: str | None = None
    _stop: dict[str, bool] = field(default_factory=dict)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def train(self, command: StartTraining) -> AsyncGenerator[TrainingEvent, None]:
        assert self.training is None, "one job at a time"
        self.training = command.id
        self.started.append(command)
        self._stopping.clear()
        try:
            async for event in self._train(command):
                yield event
        finally:
            self.training = None

    async def stop_training(self, job_id: str, *, save: bool) -> None:
        self.stopped.append((job_id, save))
        if job_id == self.training:
            self._stop[job_id] = save
            self._stopping.set()

    async def _train(self, command: StartTraining) -> AsyncGenerator[TrainingEvent, None]:
        out, job = Path(command.out), command.id
        total = command.recipe.get("max_steps", STEPS)
        step = max(
            (int(path.name.removeprefix("step-")) for path in (out / CHECKPOINTS).glob("step-*")), default=0
        )
        plan = {
            "recipe": RECIPE | {"total_steps": total},
            "auto": {"n_epochs": "3 rows"},
            "data": {"rows": 3},
            "trainable_parameters": 1234,
            "warnings": ["1 row was cut"],
        }
        yield TrainingPrepared(job, plan, total, step)
        if self.ending is not None:
            yield self.ending
            return
        if step == 0 and command.validation_file:
            yield TrainingEval(job, 0, 3.0, 0.1)
        while step < total:
            if not await self._may_go_on():
                if self._stop.pop(job) and step:
                    yield self._save(command, step)
                yield TrainingEnded(job, "stopped", step)
                return
            if step + 1 in self.dies:
                self.dies.remove(step + 1)
                raise EngineError("the engine failed (it was killed) and is restarting")
            step += 1
            yield TrainingStep(
                job, step, total, step / total, 2.0 / step, 0.5, 1e-3, 0.9, 30, 20, 0.5, 0.25, 10**6
            )
            if step % 2 == 0:
                if command.validation_file:
                    yield TrainingEval(job, step, 2.5 / step, 0.4)
                yield self._save(command, step)
        yield TrainingDiagnosis(job, step, "loss_not_moving", "learning_rate", "the loss does not move")
        self._finish(command, total)
        yield TrainingEnded(job, "finished", step)

    async def _may_go_on(self) -> bool:
        """False when it is to stop."""
        stopping = asyncio.create_task(self._stopping.wait())
        passing = asyncio.create_task(self.gate.acquire() if self.gate else asyncio.sleep(0))
        await asyncio.wait({stopping, passing}, return_when=asyncio.FIRST_COMPLETED)
        go_on = not stopping.done()
        for task in (stopping, passing):
            task.cancel()
        await asyncio.gather(stopping, passing, return_exceptions=True)
        return go_on

    def _save(self, command: StartTraining, step: int) -> TrainingCheckpoint:
        path = Path(command.out) / CHECKPOINTS / f"step-{step}"
        path.mkdir(parents=True, exist_ok=True)
        assert self.geometry is not None
        weights_at(step, self.geometry).write(path)
        state = {
            "format": 1,
            "step": step,
            "provenance": self._provenance(command),
            "history": self._curve(step),
        }
        (path / STATE_FILE).write_text(json.dumps(state))
        return TrainingCheckpoint(command.id, step, str(path))

    def _finish(self, command: StartTraining, step: int) -> None:
        assert self.geometry is not None
        out = Path(command.out)
        out.mkdir(exist_ok=True)
        manifest = {"format": 1, **self._provenance(command), "loss_curve": self._curve(step)}
        (out / MANIFEST_FILE).write_text(json.dumps(manifest))
        weights_at(step, self.geometry).write(out)

    def _provenance(self, command: StartTraining) -> dict[str, Any]:
        assert self.geometry is not None
        data = {
            "file": Path(command.training_file).name,
            "sha256": "5ha",
            "digest": "d1ge57",
            "warnings": ["one"],
        }
        valid = command.validation_file
        return {
            "base": {"name": self.geometry.name, "identity": self.geometry.identity},
            "recipe": RECIPE,
            "data": data,
            "validation": None if valid is None else {"file": Path(valid).name, "sha256": "5hav"},
            "versions": {"loramux": "9.9"},
        }

    def _curve(self, step: int) -> list[dict[str, float]]:
        return [{"step": n, "train_loss": 2.0 / n} for n in range(1, step + 1)]


@dataclass
class TrainingStand:
    """One server's life; several may follow one another on a root."""

    app: FastAPI
    engine: TrainingEngine
    catalog: AdapterCatalog
    jobs: JobManager
    metrics: Metrics
    client: httpx.AsyncClient
    root: Path

    @classmethod
    def open(
        cls, root: Path, geometry: BaseGeometry, tokenizer: PreTrainedTokenizerFast, *, gated: bool = False
    ) -> TrainingStand:
        engine = TrainingEngine(tokenizer, geometry=geometry, gate=asyncio.Semaphore(0) if gated else None)
        metrics = Metrics(max_loras=4)
        names = ("tiny", "gpt-4")
        catalog = AdapterCatalog(
            root / "data", engine, metrics, reserved=names, max_lora_rank=16, probe=PROBE
        )
        jobs = JobManager(catalog.staging.parent, catalog)
        app = create_app(
            engine=engine,
            adapters=catalog.registry,
            tokenizer=tokenizer,
            settings=ApiSettings(served_model_names=names, version="9.9"),
            metrics=metrics,
            catalog=catalog,
            jobs=jobs,
        )
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        return cls(app, engine, catalog, jobs, metrics, client, root)

    async def close(self, grace: float = PATIENCE_S) -> None:
        await self.jobs.stop(grace)
        await self.client.aclose()
        self.jobs.close()
        self.catalog.close()

    @property
    def base(self) -> Path:
        return self.catalog.staging.parent

    def left(self, folder: str) -> list[str]:
        return sorted(path.name for path in (self.base / folder).iterdir())

    def steps(self, count: int) -> None:
        """Let the trainer go on for so many steps."""
        assert self.engine.gate is not None
        for _ in range(count):
            self.engine.gate.release()

    async def upload(self, data: bytes = ROWS, name: str = "train.jsonl") -> str:
        parts = {"file": (name, data, "application/octet-stream")}
        response = await self.client.post("/v1/files", files=parts, data={"purpose": "fine-tune"})
        assert response.status_code == 200, response.text
        return str(response.json()["id"])

    async def create(self, **body: Any) -> dict[str, Any]:
        fields = {"model": "tiny", **body}
        if "training_file" not in fields:
            fields["training_file"] = await self.upload()
        response = await self.client.post("/v1/fine_tuning/jobs", json=fields)
        assert response.status_code == 200, response.text
        job: dict[str, Any] = response.json()
        return job

    async def get(self, url: str) -> dict[str, Any]:
        response = await self.client.get(url)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def post(self, job: dict[str, Any], verb: str) -> dict[str, Any]:
        response = await self.client.post(
            f"{url_of(job)}/{verb}", headers={"content-type": "application/json"}
        )
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def live(self, job: dict[str, Any]) -> Job:
        return self.jobs.get(job["id"])

    async def until(self, job: dict[str, Any], *statuses: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while (shown := await self.get(url_of(job)))["status"] not in statuses:
            assert time.monotonic() < deadline, (shown, await self.messages(job))
            await asyncio.sleep(0.01)
        while shown["status"] in FINAL and self.jobs._current is self.live(job):  # its folder goes
            await asyncio.sleep(0.01)
        return shown

    async def until_step(self, job: dict[str, Any], step: int) -> None:
        """Until what came of that step is told, its checkpoint included."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            metrics = self.jobs.database.metrics(job["id"])
            saved = {one.step for one in self.jobs.database.checkpoints(job["id"])}
            if step in metrics and (step % 2 or step in saved):
                return
            assert time.monotonic() < deadline, metrics
            await asyncio.sleep(0.01)

    async def until_training(self, job: dict[str, Any]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.engine.training != job["id"]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    async def idle(self) -> None:
        """Until nothing is trained, and what the last job left is tidied up."""
        deadline = time.monotonic() + PATIENCE_S
        while self.engine.training is not None or self.jobs._current is not None:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    async def messages(self, job: dict[str, Any]) -> list[str]:
        """Of all events, oldest first."""
        page = await self.get(f"{url_of(job)}/events?limit=1000")
        return [event["message"] for event in page["data"]][::-1]


@contextmanager
def serving(stand: TrainingStand) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """The application on a real loopback port and its queue, in a thread with its own event loop."""
    server = uvicorn.Server(uvicorn.Config(stand.app, log_level="warning", lifespan="off"))
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve(sock: socket.socket) -> None:
        loops.append(asyncio.get_running_loop())
        stand.jobs.start()
        await server.serve(sockets=[sock])
        await stand.jobs.stop(PATIENCE_S)

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: asyncio.run(serve(sock)))
        thread.start()
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", loops[0]
        server.should_exit = True
        thread.join()


def url_of(job: dict[str, Any]) -> str:
    return f"/v1/fine_tuning/jobs/{job['id']}"


Make = Callable[..., TrainingStand]


@pytest.fixture
async def make(
    tmp_path: Path, tiny_geometry: BaseGeometry, tokenizer: PreTrainedTokenizerFast
) -> AsyncIterator[Make]:
    """Servers on one data directory, one after the other."""
    stands: list[TrainingStand] = []

    def make(*, gated: bool = False, start: bool = True) -> TrainingStand:
        stands.append(TrainingStand.open(tmp_path, tiny_geometry, tokenizer, gated=gated))
        if start:
            stands[-1].jobs.start()
        return stands[-1]

    yield make
    for stand in stands:
        await stand.close()
