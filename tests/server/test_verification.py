"""Verification in a running worker: decoding goes on unchanged, answers come in order, no failure is the worker's end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import PreTrainedModel

from loramux_adapters.errors import EngineError
from loramux_adapters.probe import Probe
from loramux_adapters.twin import twin_of
from loramux_adapters.verify import VerifyReport
from loramux_adapters.weights import WEIGHTS_FILE
from loramux_server.engine import verification
from loramux_server.engine.client import WorkerClient
from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import AdapterRef, SamplingParams, Verified, VerifyAdapter
from loramux_server.engine.verification import Verifications
from tests.server.support import EngineFactory, Recipe, request, run, tokens_of, write_adapter
from tests.server.test_client import collect, options, until

PROBE = Probe.of_ids(320, prompts=2, length=16)
PROMPT = list(range(5, 25))


def answers(verifications: Verifications) -> Iterator[Verified]:
    """Until nothing is left to verify."""
    while verifications.has_work:
        answer = verifications.advance(decoding=False)
        if answer is not None:
            yield answer


@pytest.fixture
def engine(make_engine: EngineFactory) -> Engine:
    return make_engine("llama")


@pytest.fixture
def verifications(engine: Engine) -> Iterator[Verifications]:
    made = Verifications(engine.base)
    yield made
    made.close()


@pytest.fixture
def adapters(engine: Engine, tmp_path: Path) -> list[AdapterRef]:
    """Two that do something, and one that does nothing."""
    return [
        write_adapter(tmp_path / str(i), engine.base.geometry, Recipe(r=4, seed=i, scale=scale))
        for i, scale in enumerate((0.6, 0.3, 0.0))
    ]


# --- beside an engine ----------------------------------------------------------------------------------------------


def test_running_requests_get_the_same_tokens(
    engine: Engine, verifications: Verifications, adapters: list[AdapterRef]
) -> None:
    arrivals = [
        (i, request(f"r{i}", list(range(9 + i, 30)), adapters[0] if i % 2 else None, max_tokens=60))
        for i in range(4)
    ]
    expected = {name: tokens_of(outputs) for name, outputs in run(engine, arrivals).items()}
    step = engine.step
    found: list[Verified] = []
    slices = 0

    def step_and_verify() -> Any:
        nonlocal slices
        verifications._credit = 0.0  # no debts: slices after every step, as tightly interleaved as can be
        slices += not verifications.is_waiting
        answer = verifications.advance(decoding=True)
        if answer is not None:
            found.append(answer)
            verifications.add(VerifyAdapter(f"v{len(found)}", adapters[len(found) % 3], PROBE))
        return step()

    verifications.add(VerifyAdapter("v0", adapters[0], PROBE))
    engine.step = step_and_verify  # type: ignore[method-assign]
    assert {name: tokens_of(outputs) for name, outputs in run(engine, arrivals).items()} == expected
    engine.step = step  # type: ignore[method-assign]
    assert slices > 20
    found += answers(verifications)
    verdicts = [one.report.verdict for one in found if one.report]
    assert verdicts == [("ok", "ok", "noop")[number % 3] for number in range(len(found))]
    engine.check_integrity()


def test_one_after_another_in_order(verifications: Verifications, adapters: list[AdapterRef]) -> None:
    for number, adapter in enumerate(adapters):
        verifications.add(VerifyAdapter(f"v{number}", adapter, PROBE))
    found = list(answers(verifications))
    assert [one.id for one in found] == ["v0", "v1", "v2"]
    assert [one.report.generation for one in found if one.report] == [one.generation for one in adapters]
    assert [one.report.verdict for one in found if one.report] == ["ok", "ok", "noop"]
    assert verifications.advance(decoding=False) is None


def test_what_nobody_waits_for_is_dropped(verifications: Verifications, adapters: list[AdapterRef]) -> None:
    for number, adapter in enumerate(adapters):
        verifications.add(VerifyAdapter(f"v{number}", adapter, PROBE))
    while verifications._steps is None:
        verifications.advance(decoding=False)
    verifications.abort("v1")
    verifications.abort("v0")
    verifications.abort("unknown")
    assert [one.id for one in answers(verifications)] == ["v2"]


@pytest.mark.parametrize(("step", "slice_"), [(1.0, 0.01), (0.01, 1.0), (0.1, 0.1)])
def test_decoding_has_three_quarters_of_the_time(
    step: float, slice_: float, engine: Engine, adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long its steps and the slices are; and its pauses are no longer than a slice or a third of a step."""
    now = spent = 0.0

    def slices(*_: object) -> Iterator[None]:
        nonlocal now, spent
        for _ in range(300):
            now += slice_
            spent += slice_
            yield

    monkeypatch.setattr(verification, "verification_steps", slices)
    verifications = Verifications(engine.base, lambda: now)
    verifications.add(VerifyAdapter("v", adapters[0], PROBE))
    while verifications._reading is None or verifications.is_waiting:
        assert verifications.advance(decoding=True) is None
    began, pauses = now, []
    while spent < 200 * slice_:
        now += step  # an engine's step
        before = now
        verifications.advance(decoding=True)
        pauses.append(now - before)
    assert 0.2 < spent / (now - began) < 0.3
    assert max(pauses) <= max(slice_, step / 3) + slice_
    verifications.close()


def test_damaged_files_are_told(verifications: Verifications, adapters: list[AdapterRef]) -> None:
    files = Path(adapters[1].path) / WEIGHTS_FILE
    files.write_bytes(files.read_bytes()[:-4] + b"\0\0\0\1")
    (Path(adapters[2].path) / WEIGHTS_FILE).unlink()
    for number, adapter in enumerate((adapters[1], adapters[2], adapters[0])):
        verifications.add(VerifyAdapter(f"v{number}", adapter, PROBE))
    damaged, missing, good = answers(verifications)
    assert damaged.error == "its files are damaged: their hash differs"
    assert "is missing" in str(missing.error)
    assert good.report is not None


def broken(*_: object) -> Iterator[object]:
    yield None
    raise RuntimeError("out of luck\nand more")


def test_what_fails_unforeseen_is_an_answer(
    verifications: Verifications, adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    verifications.add(VerifyAdapter("v0", adapters[0], PROBE))
    with monkeypatch.context() as patch:
        patch.setattr(verification, "verification_steps", broken)
        [answer] = answers(verifications)
    assert (answer.report, answer.error) == (None, "RuntimeError: out of luck")
    verifications.add(VerifyAdapter("v1", adapters[0], PROBE))
    [answer] = answers(verifications)
    assert answer.report is not None


def test_on_an_accelerator_such_a_failure_ends_the_worker(
    engine: Engine, adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "verification_steps", broken)
    verifications = Verifications(replace(engine.base, device=torch.device("cuda")))
    verifications.add(VerifyAdapter("v0", adapters[0], PROBE))
    with pytest.raises(RuntimeError, match="out of luck"):
        list(answers(verifications))
    verifications.close()


def test_a_tokenizer_that_does_not_fit_is_told(
    verifications: Verifications, adapters: list[AdapterRef]
) -> None:
    verifications.add(VerifyAdapter("v", adapters[0], Probe(((1, 999),), "nonsense")))
    [answer] = answers(verifications)
    assert "tokenizer does not fit its vocabulary of 320 tokens" in str(answer.error)


def test_its_models_are_gone_afterwards(
    verifications: Verifications, adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loramux_adapters.verify import check

    twins: list[weakref.ref[PreTrainedModel]] = []
    make = twin_of

    def watched(model: PreTrainedModel) -> PreTrainedModel:
        twin = make(model)
        twins.append(weakref.ref(twin))
        return twin

    monkeypatch.setattr(check, "twin_of", watched)
    verifications.add(VerifyAdapter("v", adapters[0], PROBE))
    assert len(list(answers(verifications))) == 1
    gc.collect()
    assert len(twins) == 2
    assert [twin() for twin in twins] == [None, None]


# --- in a worker process -------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(tiny_model: Callable[[str], Path]) -> AsyncIterator[WorkerClient]:
    made = WorkerClient(options(tiny_model("llama")))
    with pytest.raises(EngineError, match="the engine is starting"):
        await made.verify(AdapterRef("0", "/nowhere"), PROBE)
    await made.start()
    yield made
    await made.close()


def ref(client: WorkerClient, directory: Path, **recipe: Any) -> AdapterRef:
    geometry: Any = SimpleNamespace(linear_shapes=client.ready.linear_shapes)
    return write_adapter(directory, geometry, Recipe(r=4, **recipe))


@pytest.mark.asyncio(loop_scope="module")
async def test_streams_go_on_while_a_worker_verifies(client: WorkerClient, tmp_path: Path) -> None:
    adapter, zero = ref(client, tmp_path / "a"), ref(client, tmp_path / "zero", scale=0.0)
    long = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)

    async def streams(tag: str) -> list[list[int]]:
        outputs = await asyncio.gather(
            *(collect(client, f"{tag}{i}", long, adapter if i % 2 else None) for i in range(4))
        )
        return [tokens_of(one) for one in outputs]

    expected = await streams("before")
    reports: list[VerifyReport] = []

    async def keep_verifying(decoding: asyncio.Task[Any]) -> None:
        while not decoding.done():
            reports.extend(await asyncio.gather(client.verify(adapter, PROBE), client.verify(zero, PROBE)))

    decoding = asyncio.create_task(streams("during"))
    await asyncio.gather(decoding, keep_verifying(decoding))
    assert decoding.result() == expected
    assert {(report.generation, report.verdict) for report in reports} == {
        (adapter.generation, "ok"),
        (zero.generation, "noop"),
    }
    assert reports[0].peft is not None
    assert reports[0].base == "tiny"
    assert await streams("after") == expected


@pytest.mark.asyncio(loop_scope="module")
async def test_a_verification_that_fails_is_an_engine_error(client: WorkerClient) -> None:
    with pytest.raises(EngineError, match="the adapter could not be verified: .*is missing"):
        await client.verify(AdapterRef("0" * 64, "/no/such/adapter"), PROBE)


@pytest.mark.asyncio(loop_scope="module")
async def test_giving_up_makes_room_for_the_next(client: WorkerClient, tmp_path: Path) -> None:
    adapter = ref(client, tmp_path / "a")
    long = Probe.of_ids(320, prompts=8, length=400)
    waiting = [asyncio.create_task(client.verify(adapter, long)) for _ in range(40)]
    await asyncio.sleep(0.05)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    began = time.monotonic()
    assert (await client.verify(adapter, PROBE)).verdict == "ok"
    alone = time.monotonic() - began
    assert client._pending.verifications == {}
    assert alone < 60  # forty of the long ones take minutes


@pytest.mark.asyncio(loop_scope="module")
async def test_a_worker_killed_while_verifying_fails_it_and_comes_back(
    client: WorkerClient, tmp_path: Path
) -> None:
    adapter = ref(client, tmp_path / "a")
    long = Probe.of_ids(320, prompts=8, length=400)
    verifying = [asyncio.create_task(client.verify(adapter, long)) for _ in range(3)]
    await asyncio.sleep(0.1)
    pid = client.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for failed in await asyncio.gather(*verifying, return_exceptions=True):
        assert isinstance(failed, EngineError)
        assert "restarting" in str(failed)
    with pytest.raises(EngineError, match="the engine is restarting"):
        await client.verify(adapter, PROBE)
    await until(lambda: client.state == "ready")
    assert (await client.verify(adapter, PROBE)).verdict == "ok"
