"""The application over a tiny base that exists as files, with adapters on it, so that real exports can be made.

The engine is a fake; the catalogue, the export manager and its child processes are the real ones.
"""

from __future__ import annotations

import asyncio
import io
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from loramux_adapters.nf4 import NF4Weight, base_identity
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.weights import LoraWeights
from loramux_server.api.app import ApiSettings, create_app
from loramux_server.catalog import AdapterCatalog
from loramux_server.exports.base import ExportBase
from loramux_server.exports.manager import ExportManager
from loramux_server.exports.run import Export
from loramux_server.metrics import Metrics
from tests.adapters.export.conftest import Recipe, make_adapter, make_base
from tests.api.catalog_support import PROBE, TinyEngine

SHORT: dict[str, object] = {"verify": 1, "verify_tokens": 16}
PATIENCE_S = 120


@dataclass(frozen=True)
class TinyBase:
    """A base on disk and two adapters of it."""

    directory: Path
    adapters: dict[str, Path]
    geometry: BaseGeometry

    @property
    def served(self) -> ExportBase:
        return ExportBase(
            model=("--model", str(self.directory)),
            directory=self.directory,
            dtype="bfloat16",
            quantization="nf4",
            device="cpu",
            identity=self.geometry.identity,
        )


def make_tiny_base(root: Path) -> TinyBase:
    directory = make_base(root / "base", "llama")
    tensors = load_file(directory / "model.safetensors")
    linears = {n.removesuffix(".weight"): t for n, t in tensors.items() if "_proj.weight" in n}
    identity = base_identity((name, NF4Weight.quantize(tensor)) for name, tensor in linears.items())
    geometry = BaseGeometry("org/tiny", identity, {n: (t.shape[0], t.shape[1]) for n, t in linears.items()})
    adapters = {
        "plain": make_adapter(root / "plain", directory, Recipe()),
        "team/some": make_adapter(root / "some", directory, Recipe({"target_modules": ["q_proj"]}, seed=2)),
    }
    return TinyBase(directory, adapters, geometry)


@dataclass
class ExportStand:
    """One server's life; several may follow one another on a root."""

    app: FastAPI
    catalog: AdapterCatalog
    exports: ExportManager
    client: httpx.AsyncClient
    root: Path

    @classmethod
    def open(
        cls, root: Path, base: TinyBase, tokenizer: PreTrainedTokenizerFast, served: ExportBase | None = None
    ) -> ExportStand:
        engine = TinyEngine(tokenizer, geometry=base.geometry)
        metrics = Metrics(max_loras=4)
        catalog = AdapterCatalog(
            root / "data", engine, metrics, reserved=("tiny",), max_lora_rank=16, probe=PROBE
        )
        for name, path in base.adapters.items():
            weights = LoraWeights.read(path, base.geometry)
            catalog.registry.put(name, catalog.registry.store.publish(weights), source="upload")
        exports = ExportManager(root / "exports", catalog.registry, served or base.served)
        app = create_app(
            engine=engine,
            adapters=catalog.registry,
            tokenizer=tokenizer,
            settings=ApiSettings(served_model_names=("tiny",), version="9.9"),
            metrics=metrics,
            catalog=catalog,
            exports=exports,
        )
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        return cls(app, catalog, exports, client, root)

    async def close(self) -> None:
        await self.exports.close()
        await self.client.aclose()
        self.catalog.close()

    @property
    def folders(self) -> list[str]:
        return sorted(path.name for path in (self.root / "exports").iterdir())

    async def create(self, name: str = "plain", **body: object) -> dict[str, Any]:
        response = await self.client.post(f"/v1/adapters/{name}/exports", json=body)
        assert response.status_code == 201, response.text
        created: dict[str, Any] = response.json()
        return created

    async def get(self, url: str) -> dict[str, Any]:
        response = await self.client.get(url)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def live(self, job: dict[str, Any]) -> Export:
        return self.exports.get(job["adapter"], job["id"])

    async def ended(self, job: dict[str, Any]) -> dict[str, Any]:
        url = url_of(job)
        deadline = time.monotonic() + PATIENCE_S
        while (shown := await self.get(url))["status"] in ("queued", "running"):
            assert time.monotonic() < deadline, shown
            await asyncio.sleep(0.05)
        return shown

    async def until_running(self, job: dict[str, Any]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.live(job).process is None:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


def url_of(job: dict[str, Any]) -> str:
    return f"/v1/adapters/{job['adapter']}/exports/{job['id']}"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def unpacked(data: bytes) -> tuple[set[str], dict[str, bytes]]:
    """The folders at the top of a tar, and its files by their names in them."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
        files = {m.name.rpartition("/")[2]: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    return {member.name.partition("/")[0] for member in members}, files


torch.set_num_threads(1)
