"""The application over a real catalogue in a temporary folder, for a base small enough to write down.

The engine is a fake that remembers its pins and verifies without a model; registry, store, gate and staging are real.
"""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from transformers import PreTrainedTokenizerFast

from loramux_adapters.adapter_files import ADAPTER_FILES
from loramux_adapters.errors import EngineError
from loramux_adapters.probe import Probe
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.training.memory import DecoderShape
from loramux_adapters.verify.facts import summarize, update_norm
from loramux_adapters.verify_report import ModuleFacts, Verdict, VerifyReport
from loramux_adapters.weights import LoraWeights
from loramux_server.api.app import ApiSettings, create_app
from loramux_server.catalog import AdapterCatalog
from loramux_server.engine.messages import AdapterRef, EngineStats, Ready
from loramux_server.metrics import Metrics
from tests.adapters.conftest import AdapterFiles
from tests.api.conftest import FakeEngine

Files = dict[str, bytes]
PROBE = Probe(((1, 2, 3),), "three tokens")


# of the model that tiny_geometry is of
DECODER = DecoderShape(64, 128, 2, 320, 64, 32)


@dataclass
class TinyEngine(FakeEngine):
    """The base is `tiny_geometry`. Verification looks at the files alone: zeros are a noop, all else is ok."""

    geometry: BaseGeometry | None = None
    finding: tuple[Verdict, str] | None = None  # what verifications find instead
    failure: EngineError | None = None  # what they end with instead
    held: asyncio.Event | None = None  # what they wait for
    verified: list[AdapterRef] = field(default_factory=list)

    async def verify(self, adapter: AdapterRef, probe: Probe) -> VerifyReport:
        assert self.geometry is not None
        assert probe is PROBE
        self.verified.append(adapter)
        if self.held is not None:
            await self.held.wait()
        if self.failure is not None:
            raise self.failure
        weights = LoraWeights.read(Path(adapter.path), self.geometry)
        assert weights.generation == adapter.generation
        return report_on(weights, self.geometry, self.finding)

    @property
    def ready(self) -> Ready:
        assert self.geometry is not None
        return msgspec.structs.replace(
            super().ready,
            base_name=self.geometry.name,
            base_identity=self.geometry.identity,
            linear_shapes=dict(self.geometry.linear_shapes),
            decoder=DECODER,
            context_length=512,
        )


def report_on(
    weights: LoraWeights, geometry: BaseGeometry, finding: tuple[Verdict, str] | None
) -> VerifyReport:
    modules: list[ModuleFacts | None] = []
    for name, (a, b) in weights.tensors.items():
        scaling = weights.spec.scaling(name)
        delta = scaling * update_norm(a, b)
        modules.append(ModuleFacts(name, a.shape[0], scaling, delta, 10.0, delta / 10))
    facts = summarize(weights, modules)
    is_noop = len(facts.zero_modules) == len(modules)
    plain: tuple[Verdict, str] = ("noop", "it is zero") if is_noop else ("ok", "it is not zero")
    verdict, reason = finding or plain
    return VerifyReport(
        verdict=verdict,
        reason=reason,
        generation=weights.generation,
        base=geometry.name,
        base_identity=geometry.identity,
        dtype="float32",
        device="cpu",
        tokens_from=PROBE.origin,
        weights=facts,
        shift=None,
        peft=None,
        warnings=(),
        seconds=0.5,
    )


@dataclass
class CatalogStand:
    app: FastAPI
    engine: TinyEngine
    catalog: AdapterCatalog
    metrics: Metrics
    client: httpx.AsyncClient
    root: Path

    @property
    def staged(self) -> list[str]:
        """What lies in the staging folder; nothing, unless an upload is under way."""
        staging = self.catalog.staging
        return [entry.name for entry in staging.iterdir()] if staging.exists() else []

    async def upload(
        self, name: str, files: Mapping[str, bytes], *, key: str | None = None, **fields: str
    ) -> httpx.Response:
        headers = {"idempotency-key": key} if key else {}
        parts = [(part, (part, data)) for part, data in files.items()]
        data = {"name": name, **fields}
        return await self.client.post("/v1/adapters", data=data, files=parts, headers=headers)

    async def show(self, name: str) -> dict[str, Any]:
        response = await self.client.get(f"/v1/adapters/{name}")
        assert response.status_code == 200, response.text
        shown: dict[str, Any] = response.json()
        return shown


def make_stand(
    root: Path, geometry: BaseGeometry, tokenizer: PreTrainedTokenizerFast, *, roots: tuple[Path, ...] = ()
) -> CatalogStand:
    engine = TinyEngine(tokenizer, geometry=geometry)
    metrics = Metrics(max_loras=4)
    catalog = AdapterCatalog(
        root / "data", engine, metrics, reserved=("tiny", "gpt-4"), max_lora_rank=16, probe=PROBE
    )
    app = create_app(
        engine=engine,
        adapters=catalog.registry,
        tokenizer=tokenizer,
        settings=ApiSettings(served_model_names=("tiny", "gpt-4"), version="9.9", adapter_roots=roots),
        metrics=metrics,
        catalog=catalog,
    )
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    return CatalogStand(app, engine, catalog, metrics, client, root)


def contents(files: AdapterFiles, directory: Path) -> dict[str, bytes]:
    """The files as an uploader would send them; what is not there is left out."""
    files.write(directory)
    return {name: (directory / name).read_bytes() for name in ADAPTER_FILES if (directory / name).exists()}


def variant(files: AdapterFiles, number: int) -> AdapterFiles:
    """Another content: another generation."""
    return replace(files, tensors={name: tensor + number for name, tensor in files.tensors.items()})


def tarred(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def stats(**fields: Any) -> EngineStats:
    plain: dict[str, Any] = dict.fromkeys(
        ("step", "running", "waiting", "kv_blocks_used", "kv_blocks_total", "batch_tokens", "batch_adapters"),
        0,
    )
    plain |= {"preemptions": 0, "device_adapters": [], "host_adapters": []}
    return EngineStats(**(plain | fields))


def fault(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    return error


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, ...]:
    return (tmp_path / "shelf", tmp_path / "second")


@pytest.fixture
async def stand(
    tmp_path: Path,
    tiny_geometry: BaseGeometry,
    tokenizer: PreTrainedTokenizerFast,
    roots: tuple[Path, ...],
) -> AsyncIterator[CatalogStand]:
    stand = make_stand(tmp_path, tiny_geometry, tokenizer, roots=roots)
    async with stand.client:
        yield stand
    assert stand.staged == []
    stand.catalog.close()


@pytest.fixture
def make_files(adapter_files: AdapterFiles, tmp_path: Path) -> Callable[[int], Files]:
    """Adapter number n; equal numbers are equal files."""
    return lambda number: contents(variant(adapter_files, number), tmp_path / f"adapter-{number}")


@pytest.fixture
def files(make_files: Callable[[int], Files]) -> Files:
    return make_files(0)
