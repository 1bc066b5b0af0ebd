"""kill -9 while adapters are uploaded: what was acknowledged is there and whole, of the rest nothing is left."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loramux_adapters.registry import AdapterRegistry
from loramux_adapters.store import GenerationStore

KILLS = 4

# Publishes endless variants of one adapter, also over names that are taken, and says each that is acknowledged.
UPLOADER = """
import asyncio, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from loramux_adapters.access import OPERATOR
from loramux_adapters.sources import stage_directory
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.weights import LoraWeights
from loramux_adapters.probe import Probe
from loramux_adapters.verify_report import VerifyReport, WeightFacts
from loramux_server.catalog import AdapterCatalog
from loramux_server.metrics import Metrics
from loramux_server.publishing import Options

data, seed = Path(sys.argv[1]), int(sys.argv[2])
shapes = {f"layers.{i}.q_proj": (64, 64) for i in range(4)}

class Engine:
    stats, state = None, "ready"
    ready = SimpleNamespace(
        base_name="org/tiny", base_identity="nf4:1234", linear_shapes=shapes, max_loras=4, lora_rows=64
    )
    def add_listener(self, listener): ...
    async def pin(self, adapters): ...
    async def verify(self, adapter, probe):
        await asyncio.sleep(0.005)
        facts = WeightFacts((), 1.0, 1.0, (), ())
        return VerifyReport("ok", "", adapter.generation, *[""] * 5, facts, None, None, (), 0.0)

async def main():
    catalog = AdapterCatalog(
        data, Engine(), Metrics(max_loras=4), reserved=("tiny",), max_lora_rank=16, probe=Probe(((1, 2),), "")
    )
    async def upload(worker):
        source = data / f"source-{worker}"
        for number in range(10**6):
            draw = torch.Generator().manual_seed(seed * 10**9 + worker * 10**6 + number)
            tensors = {n: (torch.randn(4, 64, generator=draw), torch.randn(64, 4, generator=draw)) for n in shapes}
            LoraWeights(AdapterSpec(r=4, lora_alpha=8, target_modules=("q_proj",)), tensors).write(source)
            stage = lambda: stage_directory(source, catalog.staging)
            published = await catalog.publish(
                f"w{worker}/{number % 5}", stage, Options(overwrite=True), OPERATOR
            )
            print(published.record.name, published.record.generation, flush=True)
    print("ready", flush=True)
    await asyncio.gather(upload(0), upload(1))

asyncio.run(main())
"""


@pytest.mark.parametrize("number", range(KILLS))
def test_a_kill_loses_nothing_acknowledged(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", UPLOADER, str(tmp_path), str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        first = process.stdout.readline()
        time.sleep(random.Random(number).uniform(0, 0.8))
        process.kill()
        said = [first, *process.stdout.read().splitlines(keepends=True)]
    acknowledged = dict(line.split() for line in said if line.endswith("\n"))
    [root] = (tmp_path / "bases").iterdir()
    store = GenerationStore(root / "generations")
    registry = AdapterRegistry(root / "adapters.sqlite3", store)
    for name, generation in acknowledged.items():
        # The name may have moved on to an upload that was not acknowledged yet when the end came.
        newest = [entry.generation for entry in registry.get(name).history[:2]]
        assert generation in newest, f"{name} is not {generation[:12]}"
        assert registry.verifications.outcome(generation) == "ok"
    for generation in store:  # also those that no name had time to point at
        store.verify(generation)
    for record in registry.list():
        assert {entry.generation for entry in record.history} <= set(store)
    assert list((root / "generations" / ".partial").iterdir()) == []
    registry.close()
