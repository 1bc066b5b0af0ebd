"""Churn, short for every run and long for `make soak`; and that it would notice an answer of the wrong generation."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression

import pytest

from loramux_adapters.errors import StorageError
from loramux_adapters.registry import AdapterRegistry
from loramux_adapters.store import GenerationStore
from loramux_adapters.weights import LoraWeights
from loramux_server.base.loading import LoadOptions, load_base
from loramux_server.engine.engine import Engine, EngineOptions
from loramux_server.engine.scheduler import SchedulerLimits
from tests.server.support import Recipe, Reference, write_adapter
from tests.soak.churn import Churn, Expected, open_descriptors, resident_bytes

SHORT_STEPS = 1000
PROMPTS = [[1, *range(40, 45)], [1, *range(60, 77)], [1, *range(100, 141)]]
TOKENS = 10
LEAK_MIB = 64


@dataclass
class World:
    """A model, adapters of many shapes, and what each answers to each prompt."""

    model: Path
    adapters: list[LoraWeights]
    expected: Expected


@pytest.fixture(scope="module")
def world(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    model = tiny_model(
        "llama", layers=1
    )  # what changes hands is the same with one layer, three times as often
    geometry = load_base(LoadOptions(model=str(model), name="tiny", device="cpu", dtype="float32")).geometry
    directory = tmp_path_factory.mktemp("churn")
    targets: Sequence[tuple[str, ...] | None] = (None, ("q_proj", "v_proj"), ("down_proj", "up_proj"))
    recipes = [Recipe(r=1 + seed % 8, seed=seed, targets=targets[seed % 3], scale=1.5) for seed in range(12)]
    refs = {f"a{r.seed}": write_adapter(directory / str(r.seed), geometry, r) for r in recipes}
    reference = Reference(model, geometry, refs)
    reference.end_tokens = set()
    names: dict[str | None, str | None] = {ref.generation: name for name, ref in refs.items()} | {None: None}
    expected = {
        (generation, number): reference.greedy(prompt, TOKENS, name)
        for generation, name in names.items()
        for number, prompt in enumerate(PROMPTS)
    }
    for number in range(len(PROMPTS)):
        answers = [tuple(tokens) for (_, prompt), tokens in expected.items() if prompt == number]
        assert len(set(answers)) == len(answers), "two adapters answer alike: a wrong one would go unseen"
    adapters = [LoraWeights.read(Path(ref.path), geometry) for ref in refs.values()]
    return World(model, adapters, expected)


@pytest.fixture
def engine(world: World) -> Iterator[Engine]:
    """Too small for everybody on every tier: adapters are loaded, evicted and read again all the time."""
    base = load_base(LoadOptions(model=str(world.model), name="tiny", device="cpu", dtype="float32"))
    options = EngineOptions(
        num_blocks=10,
        limits=SchedulerLimits(8, 48),
        max_model_len=128,
        max_loras=3,
        lora_rows=16,
        max_cpu_loras=4,
    )
    engine = Engine(base, options)
    yield engine
    engine.close()


@pytest.fixture
def registry() -> Iterator[AdapterRegistry]:
    memory = Path("/dev/shm")  # durability is tested elsewhere: no waiting for a disk
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        registry = AdapterRegistry(
            Path(folder) / "adapters.sqlite3", GenerationStore(Path(folder) / "generations"), keep_history=3
        )
        yield registry
        registry.close()


def test_answers_are_of_the_generation_they_began_with(
    world: World, engine: Engine, registry: AdapterRegistry
) -> None:
    churn = Churn(engine, registry, world.adapters, PROMPTS, world.expected, seed=0)
    churn.run(SHORT_STEPS, check_every=250)
    churn.drain()
    seen = churn.done
    assert seen["answers"] > SHORT_STEPS / 10, seen
    assert (
        min(seen[kind] for kind in ("loaded", "replaced", "rolled back", "deleted", "aborted", "pins")) > 2
    ), seen
    assert engine.scheduler.preemptions > 0
    assert engine.blocks.hits > 0, "no prompt came from the prefix cache"


def test_an_answer_of_another_generation_is_noticed(
    world: World, engine: Engine, registry: AdapterRegistry
) -> None:
    """One adapter's rows on the device are those of another: some answer must betray it."""
    churn = Churn(engine, registry, world.adapters, PROMPTS, world.expected, seed=0)
    read = engine.bank._read

    def confused(generation: str, path: str) -> LoraWeights:
        weights = read(generation, path)
        return world.adapters[0] if generation == world.adapters[3].generation else weights

    engine.bank._read = confused
    with pytest.raises(
        AssertionError, match=f"these are the tokens of .*{world.adapters[0].generation[:12]}"
    ):
        churn.run(SHORT_STEPS)


def test_a_generation_swept_under_a_request_is_noticed(
    world: World, engine: Engine, registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    churn = Churn(engine, registry, world.adapters, PROMPTS, world.expected, seed=0)
    monkeypatch.setattr(registry, "sweep", lambda min_age: registry.store.sweep((), min_age=0))
    with pytest.raises((AssertionError, StorageError), match="store"):
        churn.run(SHORT_STEPS)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_churn_for_long(
    request: pytest.FixtureRequest,
    soak_seed: int,
    shard: int,
    world: World,
    engine: Engine,
    registry: AdapterRegistry,
) -> None:
    option = request.config.getoption
    steps, seed = option("--steps") // option("--shards"), soak_seed * option("--shards") + shard
    churn = Churn(engine, registry, world.adapters, PROMPTS, world.expected, seed=seed)
    descriptors = open_descriptors()
    started, resident = time.monotonic(), list[tuple[float, float]]()
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        _say(f"\nchurn {shard}: {steps} steps, seed {seed}")
        while churn.steps < steps:
            churn.run(min(10_000, steps - churn.steps), check_every=1000)
            passed = time.monotonic() - started
            resident.append((passed / 3600, resident_bytes() / 2**20))
            _say(
                f"  churn {shard}: {churn.steps} steps, {churn.steps / passed:.0f} a second, {dict(churn.done)}"
            )
        churn.drain()
        # The first tenth fills caches.
        settled = resident[len(resident) // 10 :]
        grown = settled[-1][1] - settled[0][1]
        slope = linear_regression(*zip(*settled, strict=True)).slope if len(settled) > 1 else 0.0
        slots = sum(slot.references for slot in engine.bank.tier.slots.values())
        _say(
            f"  churn {shard}: resident memory: {grown:+.1f} MiB, {slope:+.1f} MiB an hour; left over: "
            f"{open_descriptors() - descriptors} descriptors, {engine.blocks.num_used} blocks, {slots} slots"
        )
    assert grown < LEAK_MIB, "memory grew while nothing did"
    assert open_descriptors() <= descriptors + 4, "descriptors leak"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # the output of a process of pytest-xdist is lost
