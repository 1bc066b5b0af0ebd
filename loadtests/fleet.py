"""A server of its own with many registered adapters, for scenarios about how adapters come and go.

The adapters are published straight into the server's data directory before it starts, as earlier uploads would have left
them: registered, on the disk, and in no process's memory. Same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from loadtests import BenchError
from loadtests.adapters import RANK, BenchAdapter, random_tensors, read_geometry
from loadtests.server import ServerProcess, base_name
from loramux_adapters.registry import AdapterRegistry
from loramux_adapters.spec import AdapterSpec, BaseGeometry
from loramux_adapters.store import GenerationStore
from loramux_adapters.weights import LoraWeights

SMALL = 8  # rank of the small ones, on q_proj and v_proj: what PEFT makes when nothing is said
_SMALL_TARGETS = ("q_proj", "v_proj")


class Fleet:
    """Starts and stops servers over one data directory; `register` fills it while none runs."""

    def __init__(self, model: str, model_directory: Path, directory: Path, threads: int) -> None:
        self.adapters: list[BenchAdapter] = []
        self.url = ""
        self.base = ""
        self.start_seconds = 0.0
        self._model, self._model_directory = model, model_directory
        self._directory, self._threads = directory, threads
        self._server: ServerProcess | None = None

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *arguments: str) -> None:
        self._server = ServerProcess(self._model, self._directory, threads=self._threads, arguments=arguments)
        self.url, self.start_seconds = self._server.wait_ready()
        self.base = base_name(self.url, self.adapters[:1])

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def resident_bytes(self) -> int:
        """Of the running server: front and worker."""
        if self._server is None:
            raise BenchError("no server runs")
        return self._server.resident_bytes()

    def register(self, count: int, *, small: bool) -> None:
        """Publish `count` adapters. The server must have run once, because the folder is named by the base it holds."""
        found = list((self._directory / "data" / "bases").glob("*"))
        if len(found) != 1:
            raise BenchError("the server has made no folder for its base")
        geometry = read_geometry(self._model_directory)
        store = GenerationStore(found[0] / "generations")
        registry = AdapterRegistry(found[0] / "adapters.sqlite3", store)
        for index in range(count):
            weights = _weights(geometry, index, small=small)
            generation = store.publish(weights)
            name = f"fleet-{index:04}"
            registry.put(name, generation, source="upload")
            self.adapters.append(BenchAdapter(name, store.path(generation), generation))
        registry.close()

    def paths(self, names: Sequence[str | None]) -> dict[str, str]:
        """Of the adapters among `names`, for the reference."""
        wanted = set(names)
        return {adapter.name: str(adapter.path) for adapter in self.adapters if adapter.name in wanted}


def _weights(geometry: BaseGeometry, index: int, *, small: bool) -> LoraWeights:
    """Small ones: q_proj and v_proj; else every linear, as the other scenarios' adapters."""
    leaves = {name.rpartition(".")[2] for name in geometry.linear_shapes}
    chosen = leaves.intersection(_SMALL_TARGETS) or leaves if small else leaves
    rank = SMALL if small else RANK
    spec = AdapterSpec(r=rank, lora_alpha=rank, target_modules=tuple(chosen))
    targets = dict.fromkeys(spec.targets(geometry))
    shapes = {name: shape for name, shape in geometry.linear_shapes.items() if name in targets}
    with torch.inference_mode():
        return LoraWeights(spec, random_tensors(shapes, rank, seed=1000 + index))
