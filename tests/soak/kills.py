"""kill -9 at random points of uploads, and what the next start must find.

An upload is cut at a random byte, or killed at a random moment of its work. Acknowledged uploads are there and whole; one
that was not may be there, whole, or not at all; nothing lies in the staging folders and nothing outside the data directory.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.context
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Protocol
from urllib.parse import urlsplit

import httpx
import torch

from loramux_adapters.adapter_files import ADAPTER_FILES
from loramux_adapters.registry import AdapterRegistry
from loramux_adapters.spec import AdapterSpec, BaseGeometry
from loramux_adapters.store import GenerationStore
from loramux_adapters.weights import LoraWeights
from tests.e2e.conftest import Server, start_server
from tests.soak import front


class Front(Protocol):
    """A server that can be started over the same data directory again and again. `root` holds it and nothing else."""

    root: Path
    own_files: frozenset[str]  # what lies in `root` beside the data directory

    def start(self) -> str: ...

    def kill(self) -> None:
        """kill -9, and wait until nothing of it runs; a second time does nothing."""
        ...


class ForkedFront:
    """`front.serve` in a fresh process."""

    own_files: frozenset[str] = frozenset()

    def __init__(self, root: Path) -> None:
        self.root = root
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([front.__name__])
        self._process: multiprocessing.context.ForkServerProcess | None = None

    def start(self) -> str:
        ours, theirs = self._context.Pipe()
        self._process = self._context.Process(target=front.serve, args=(self.root, theirs), daemon=True)
        self._process.start()
        theirs.close()
        with ours:
            assert ours.poll(120), "the front did not start"
            return str(ours.recv())

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._process = None


class WholeServer:
    """`loramux serve MODEL`: a front and a worker. The front is what gets killed."""

    own_files = frozenset({"server.log"})

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        self._model = model
        self._server: Server | None = None

    def start(self) -> str:
        self._server = start_server(self.root, [str(self._model)])
        return self._server.url

    def kill(self) -> None:
        """The worker is to follow by itself."""
        if self._server is None:
            return
        process, self._server = self._server.process, None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while any(_is_running(child) for child in children):
            assert time.monotonic() < deadline, "the worker outlived its front"
            time.sleep(0.02)


def _is_running(pid: str) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@dataclass
class Ledger:
    """What was sent and what was answered, by name."""

    acknowledged: dict[str, str] = field(default_factory=dict)  # name -> the generation last acknowledged
    sent: dict[str, set[str]] = field(default_factory=dict)  # name -> every generation ever sent under it
    cut: int = 0  # uploads that got no answer


class Killer:
    """Rounds of start, inspection, uploads and kill -9."""

    def __init__(self, front: Front, geometry: BaseGeometry, scratch: Path, seed: int) -> None:
        self.ledger = Ledger()
        self._front = front
        self._geometry = geometry
        self._scratch = scratch
        self._random = Random(seed)
        self._variant = 0

    def run(self, kills: int, said: Callable[[int], None] = lambda number: None) -> None:
        for number in range(kills):
            url = self._front.start()
            try:
                self.inspect(url)
                self._round(url, number)
            finally:
                self._front.kill()
            said(number + 1)
        url = self._front.start()
        try:
            self.inspect(url)
        finally:
            self._front.kill()
        self._nothing_but_the_named()

    def inspect(self, url: str) -> None:
        """After a start: what is listed, what lies on the disk."""
        cards = (
            httpx.get(f"{url}/v1/adapters", params={"limit": 1000}, timeout=60)
            .raise_for_status()
            .json()["data"]
        )
        found = {card["id"]: card["generation"] for card in cards}
        for name, generation in self.ledger.acknowledged.items():
            assert name in found, f"{name} was acknowledged and is gone"
            history = httpx.get(f"{url}/v1/adapters/{name}", timeout=60).json()["generations"]
            assert generation in json.dumps(history), (
                f"{name}: {generation[:12]} was acknowledged and is gone"
            )
        for name, generation in found.items():
            assert generation in self.ledger.sent.get(name, ()), f"{name} means what nobody uploaded"
        assert {entry.name for entry in self._front.root.iterdir()} == {"data"} | self._front.own_files
        for leftovers in ("staging", "generations/.partial"):
            assert _entries(self._front.root.glob(f"data/bases/*/{leftovers}/*")) == []
        damaged = _entries(self._front.root.glob("data/bases/*/**/*.corrupt-*"))
        assert damaged == [], f"a kill left what was set aside at the next start: {damaged}"
        every = {generation for sent in self.ledger.sent.values() for generation in sent}
        for folder in self._bases():
            store = GenerationStore(folder / "generations")
            for generation in store:
                assert generation in every, "the store has what nobody uploaded"
                store.verify(generation)

    def _bases(self) -> list[Path]:
        return list(self._front.root.glob("data/bases/*"))

    def _nothing_but_the_named(self) -> None:
        """Whole generations that had no time to get a name are all that a kill may leave, until a sweep."""
        [folder] = self._bases()
        store = GenerationStore(folder / "generations")
        registry = AdapterRegistry(folder / "adapters.sqlite3", store)
        registry.sweep(min_age=0)
        assert set(store) == {
            entry.generation for record in registry.list(limit=10**6) for entry in record.history
        }
        registry.close()

    def _round(self, url: str, number: int) -> None:
        """One upload in peace, which says how long one takes; then two at once, and the end in the middle of them."""
        peaceful = self._upload(f"round/{number}")
        started = time.perf_counter()
        assert _send(url, peaceful, None), "an upload was not answered"
        usual = time.perf_counter() - started
        self.ledger.acknowledged[peaceful.name] = peaceful.generation
        uploads = [self._upload("replaced"), self._upload(f"cut/{number}")]
        share = self._random.random() if self._random.random() < 0.4 else None
        delay = self._random.uniform(0, 2.2 * usual) if share is None else self._random.uniform(0, 0.01)
        threads = [threading.Thread(target=self._attempt, args=(url, upload, share)) for upload in uploads]
        for thread in threads:
            thread.start()
        time.sleep(delay)
        self._front.kill()
        for thread in threads:
            thread.join()

    def _attempt(self, url: str, upload: _Upload, share: float | None) -> None:
        if _send(url, upload, share):
            self.ledger.acknowledged[upload.name] = upload.generation
        else:
            self.ledger.cut += 1

    def _upload(self, name: str) -> _Upload:
        """A variant that was never sent before."""
        self._variant += 1
        generator = torch.Generator().manual_seed(self._variant)
        spec = AdapterSpec(r=8, lora_alpha=8.0, target_modules=("q_proj",))
        tensors = {}
        for module in spec.targets(self._geometry):
            out_features, in_features = self._geometry.linear_shapes[module]
            a = torch.randn(8, in_features, generator=generator) / in_features**0.5
            tensors[module] = (a, torch.randn(out_features, 8, generator=generator) * 0.1)
        weights = LoraWeights(spec, tensors)
        weights.write(self._scratch)
        files = [(file, (file, (self._scratch / file).read_bytes())) for file in ADAPTER_FILES]
        self.ledger.sent.setdefault(name, set()).add(weights.generation)
        request = httpx.Request(
            "POST", "http://front/v1/adapters", data={"name": name, "overwrite": "true"}, files=files
        )
        return _Upload(name, weights.generation, request.headers["content-type"], request.read())


@dataclass(frozen=True)
class _Upload:
    name: str
    generation: str
    content_type: str
    body: bytes


def _send(url: str, upload: _Upload, share: float | None) -> bool:
    """Send it, or only a share of its bytes and then wait; whether it was acknowledged."""
    address = urlsplit(url)
    head = (
        f"POST /v1/adapters HTTP/1.1\r\nhost: {address.netloc}\r\nconnection: close\r\n"
        f"content-type: {upload.content_type}\r\ncontent-length: {len(upload.body)}\r\n\r\n"
    ).encode()
    answer = b""
    try:
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=120) as connection:
            connection.sendall(head + upload.body[: None if share is None else int(share * len(upload.body))])
            while chunk := connection.recv(65536):
                answer += chunk
    except ConnectionError:
        return False
    if not answer.startswith(b"HTTP/1.1 201"):
        assert not answer.startswith(b"HTTP/1.1"), answer[:500]
        return False
    body = answer.partition(b"\r\n\r\n")[2]
    return f'"{upload.generation}"'.encode() in body


def _entries(paths: Iterable[Path]) -> list[str]:
    return sorted(path.name for path in paths)
