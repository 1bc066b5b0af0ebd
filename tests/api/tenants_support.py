"""The whole application (catalogue, files, jobs, exports) with keys: an admin's, two tenants', and whatever a test makes.

The engine is the fake trainer of `training_support.py`; exports are queued and never carried out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import BaseRoute, Route
from transformers import PreTrainedTokenizerFast

from loramux_adapters.spec import BaseGeometry
from loramux_server.api.app import ApiSettings, create_app
from loramux_server.api.gate import every_route
from loramux_server.catalog import AdapterCatalog
from loramux_server.exports.base import ExportBase
from loramux_server.exports.manager import ExportManager
from loramux_server.keys.guard import Guard, open_guard
from loramux_server.keys.limits import Limits
from loramux_server.keys.principal import Scope
from loramux_server.keys.store import KeyRecord, KeyStore, NewKey
from loramux_server.metrics import Metrics
from loramux_server.quotas import Quota
from loramux_server.training.manager import JobManager
from tests.api.catalog_support import PROBE
from tests.api.training_support import PATIENCE_S, ROWS, TrainingEngine

ADMIN = "lmx-the-admins"
TENANT_SCOPES: tuple[Scope, ...] = ("infer", "adapters", "train")
BASES = ("tiny", "gpt-4")


@dataclass
class TenantStand:
    app: FastAPI
    engine: TrainingEngine
    catalog: AdapterCatalog
    jobs: JobManager
    exports: ExportManager
    metrics: Metrics
    guard: Guard
    client: httpx.AsyncClient
    data: Path
    _held: ExitStack
    keys: dict[str, str] = field(default_factory=dict)  # by who has them

    @classmethod
    def open(
        cls,
        root: Path,
        geometry: BaseGeometry,
        tokenizer: PreTrainedTokenizerFast,
        *,
        admin_keys: Sequence[str] = (ADMIN,),
        limits: Limits | None = None,
        quota: Quota | None = None,
        roots: tuple[Path, ...] = (),
    ) -> TenantStand:
        engine = TrainingEngine(tokenizer, geometry=geometry, gate=asyncio.Semaphore(0))
        metrics, data = Metrics(max_loras=4), root / "data"
        catalog = AdapterCatalog(
            data, engine, metrics, reserved=BASES, max_lora_rank=16, probe=PROBE, quota=quota
        )
        jobs = JobManager(catalog.staging.parent, catalog)
        (root / "base").mkdir(exist_ok=True)
        base = ExportBase(("--model", "x"), root / "base", "float32", "nf4", "cpu", geometry.identity)
        exports = ExportManager(root / "exports", catalog.registry, base)
        held = ExitStack()
        guard = held.enter_context(open_guard(data, admin_keys, limits or Limits()))
        app = create_app(
            engine=engine,
            adapters=catalog.registry,
            tokenizer=tokenizer,
            settings=ApiSettings(served_model_names=BASES, version="9.9", adapter_roots=roots),
            metrics=metrics,
            catalog=catalog,
            exports=exports,
            jobs=jobs,
            guard=guard,
        )
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        return cls(app, engine, catalog, jobs, exports, metrics, guard, client, data, held)

    async def close(self) -> None:
        await self.jobs.stop(PATIENCE_S)
        await self.exports.close()
        await self.client.aclose()
        self.jobs.close()
        self.catalog.close()
        self._held.close()

    def key(self, tenant: str = "default", *scopes: Scope, **more: Any) -> tuple[KeyRecord, str]:
        """As `loramux keys create` makes one: through a connection of its own."""
        store = KeyStore(self.data)
        record, key = store.create(NewKey(tenant=tenant, scopes=scopes or TENANT_SCOPES, **more))
        store.close()
        return record, key

    def revoke(self, key_id: str) -> None:
        store = KeyStore(self.data)
        store.revoke(key_id)
        store.close()

    async def ask(self, who: str, method: str, url: str, **request: Any) -> httpx.Response:
        """`who` is a tenant, whose key is made when it is first needed, or "admin"."""
        if who not in self.keys:
            self.keys[who] = ADMIN if who == "admin" else self.key(who)[1]
        headers = {"authorization": f"Bearer {self.keys[who]}", **request.pop("headers", {})}
        return await self.client.request(method, url, headers=headers, **request)

    async def ok(self, who: str, method: str, url: str, **request: Any) -> dict[str, Any]:
        response = await self.ask(who, method, url, **request)
        assert response.is_success, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def upload(self, who: str, name: str, files: Mapping[str, bytes], **fields: str) -> httpx.Response:
        parts = [(part, (part, data)) for part, data in files.items()]
        return await self.ask(who, "POST", "/v1/adapters", data={"name": name, **fields}, files=parts)

    async def upload_rows(self, who: str, name: str = "train.jsonl") -> str:
        parts = {"file": (name, ROWS, "application/octet-stream")}
        answer = await self.ok(who, "POST", "/v1/files", files=parts, data={"purpose": "fine-tune"})
        return str(answer["id"])

    async def until_checkpoint(self, job: str) -> str:
        """The model of its first one."""
        assert self.engine.gate is not None
        for _ in range(2):
            self.engine.gate.release()
        async with asyncio.timeout(PATIENCE_S):
            while not (found := self.jobs.database.checkpoints(job)):
                await asyncio.sleep(0.01)
        return found[0].model


def refused(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    return response.status_code, error["code"]


def served(app: FastAPI) -> list[tuple[str, str]]:
    """Every method and template that something answers to; those that only say 405 are left out."""
    found = []
    for route in every_route(app.routes):
        assert isinstance(route, Route), f"{route} is a kind of route that this test does not know"
        if not _only_refuses(route):
            found += [(method, route.path) for method in sorted(route.methods or ())]
    return found


def _only_refuses(route: BaseRoute) -> bool:
    return getattr(getattr(route, "endpoint", None), "__name__", "") == "refuse"


@pytest.fixture
async def stand(
    tmp_path: Path, tiny_geometry: BaseGeometry, tokenizer: PreTrainedTokenizerFast
) -> AsyncIterator[TenantStand]:
    stand = TenantStand.open(tmp_path, tiny_geometry, tokenizer)
    yield stand
    await stand.close()
