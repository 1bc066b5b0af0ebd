"""kill -9 of the front at random moments of uploads, jobs and exports: what was acknowledged is there after the next start.

Adapters by name and generation, files by their bytes, fine-tuning jobs and exports by their ids. What was under way goes on:
no job and no export may have failed because a server ended.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil

from loramux_adapters.adapter_files import ADAPTER_FILES
from loramux_adapters.demo import demo_adapters
from tests.e2e.conftest import Server, start_server

_ADAPTER = "pirate"
_EXPORTS = f"/v1/adapters/{_ADAPTER}/exports"
_EXPORT = {"format": "bf16", "verify": 0}
_ENDED = ("succeeded", "failed", "cancelled")


class FrontKills:
    """Rounds of start, inspection, work and kill -9 over one directory."""

    def __init__(self, directory: Path, flags: Sequence[str], seed: int) -> None:
        self._directory = directory
        self._flags = flags
        self._random = Random(seed)
        self._numbers = itertools.count()
        self.adapters: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self.jobs: set[str] = set()
        self.exports: set[str] = set()
        self.cut = 0

    def run(self, kills: int) -> dict[str, object]:
        for _ in range(kills):
            server = self._start()
            try:
                self._work(server)
            finally:
                self._kill(server)
        last = self._start()
        last.openai.close()
        assert last.stop() == 0
        acknowledged = {name: len(getattr(self, name)) for name in ("adapters", "files", "jobs", "exports")}
        return {"kills": kills, **acknowledged, "cut off": self.cut}

    def _start(self) -> Server:
        server = start_server(self._directory, self._flags)
        try:
            with httpx.Client(base_url=server.url, timeout=120) as client:
                self._inspect(client)
        except BaseException:
            self._kill(server)
            raise
        return server

    def _inspect(self, client: httpx.Client) -> None:
        listed = client.get("/v1/adapters", params={"limit": 1000}).raise_for_status().json()["data"]
        found = {card["id"]: card["generation"] for card in listed}
        for name, generation in self.adapters.items():
            assert found.get(name) == generation, f"adapter {name} was acknowledged and is {found.get(name)}"
        for file_id, digest in self.files.items():
            content = client.get(f"/v1/files/{file_id}/content").raise_for_status().content
            assert hashlib.sha256(content).hexdigest() == digest, f"file {file_id} has other bytes"
        for job_id in self.jobs:
            job = client.get(f"/v1/fine_tuning/jobs/{job_id}").raise_for_status().json()
            assert job["status"] != "failed", job
        for export_id in self.exports:
            export = client.get(f"{_EXPORTS}/{export_id}").raise_for_status().json()
            assert export["status"] != "failed", export
        left = [path.name for path in self._directory.glob("data/bases/*/**/*.corrupt-*")]
        assert left == [], f"a kill left what was set aside at the next start: {left}"

    def _work(self, server: Server) -> None:
        """Everything at once, and the end in the middle of it."""
        actions = (self._upload_adapter, self._upload_file, self._create_job, self._create_export)
        faults: list[BaseException] = []
        threads = [threading.Thread(target=self._repeat, args=(server.url, one, faults)) for one in actions]
        for thread in threads:
            thread.start()
        time.sleep(self._random.uniform(0.2, 6.0))
        self._kill(server)
        for thread in threads:
            thread.join()
        assert not faults, faults[0]

    def _repeat(self, url: str, action: Callable[[httpx.Client], None], faults: list[BaseException]) -> None:
        try:
            with httpx.Client(base_url=url, timeout=120) as client:
                while True:
                    action(client)
        except httpx.TransportError:
            self.cut += 1  # the front is gone
        except (AssertionError, httpx.HTTPStatusError) as error:
            faults.append(error)

    def _upload_adapter(self, client: httpx.Client) -> None:
        source = demo_adapters()[_ADAPTER]
        name = f"uploaded/{next(self._numbers)}"
        files = [(file, (file, (source / file).read_bytes())) for file in ADAPTER_FILES]
        answer = client.post("/v1/adapters", data={"name": name}, files=files).raise_for_status().json()
        self.adapters[name] = answer["generation"]

    def _upload_file(self, client: httpx.Client) -> None:
        rows = [{"prompt": f"number {next(self._numbers)}?", "completion": " " + "yes " * 50}] * 40
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        parts = {"file": ("rows.jsonl", data)}
        answer = client.post("/v1/files", data={"purpose": "fine-tune"}, files=parts).raise_for_status()
        self.files[answer.json()["id"]] = hashlib.sha256(data).hexdigest()
        time.sleep(0.05)

    def _create_job(self, client: httpx.Client) -> None:
        jobs = client.get("/v1/fine_tuning/jobs").raise_for_status().json()["data"]
        if self.files and sum(job["status"] not in _ENDED for job in jobs) < 3:
            chosen = {"n_epochs": 1, "max_steps": 4, "save_steps": 1, "batch_size": 2, "r": 4}
            method: dict[str, Any] = {"type": "supervised", "supervised": {"hyperparameters": chosen}}
            body = {"model": "demo", "training_file": next(iter(self.files)), "method": method}
            answer = client.post("/v1/fine_tuning/jobs", json=body).raise_for_status()
            self.jobs.add(answer.json()["id"])
        time.sleep(0.2)

    def _create_export(self, client: httpx.Client) -> None:
        """One at a time, because each is as large as the base; those that have ended make room."""
        exports = client.get(_EXPORTS).raise_for_status().json()["data"]
        for export in exports:
            if export["status"] in _ENDED:
                assert export["status"] == "succeeded", export
                self.exports.discard(export["id"])
                client.delete(f"{_EXPORTS}/{export['id']}").raise_for_status()
        if all(export["status"] in _ENDED for export in exports):
            self.exports.add(client.post(_EXPORTS, json=_EXPORT).raise_for_status().json()["id"])
        time.sleep(0.2)

    def _kill(self, server: Server) -> None:
        """The front; what it had started follows by itself."""
        server.openai.close()
        children = psutil.Process(server.process.pid).children() if server.process.poll() is None else []
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(children, timeout=30)
        for child in alive:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        assert not alive, "a child outlived its front"
