"""An adapter is copied beside the computation, and is whole when it counts as ready."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import AdapterRef
from tests.server.support import EngineFactory, Recipe, request, run, step, tokens_of, write_adapter

_LONG = 3_000_000_000  # device cycles: a second and more


def wait_until_resident(engine: Engine, adapter: AdapterRef) -> None:
    deadline = time.monotonic() + 60
    while adapter.generation not in engine.bank.resident():
        assert time.monotonic() < deadline
        engine.bank.tier.tick += 1
        engine.bank.prepare(adapter.generation, adapter.path)
        time.sleep(0.001)


def test_a_copy_to_the_device_does_not_wait_for_what_is_computed(
    make_engine: EngineFactory, tmp_path: Path
) -> None:
    engine = make_engine("llama", max_loras=1, lora_rows=16)
    one, other = (
        write_adapter(tmp_path / str(seed), engine.base.geometry, Recipe(r=16, seed=seed)) for seed in (1, 2)
    )
    # Pinning host memory may itself wait for the device, so the files are read before it is busy.
    for adapter in (one, other):
        wait_until_resident(engine, adapter)
    assert engine.bank.resident() == [other.generation]
    assert one.generation in engine.bank.on_host()
    torch.cuda.synchronize()
    torch.cuda._sleep(_LONG)
    computed = torch.cuda.Event()
    computed.record()
    wait_until_resident(engine, one)
    assert not computed.query(), "the copy waited for the computation"
    computed.synchronize()


def test_adapters_that_take_turns_in_the_same_rows_give_their_own_answers(
    make_engine: EngineFactory, tmp_path: Path
) -> None:
    """Two fit, four take turns: every load overwrites rows that were multiplied with just before."""
    engine = make_engine("llama", max_loras=2, lora_rows=32)
    adapters = [
        write_adapter(tmp_path / str(seed), engine.base.geometry, Recipe(r=16, seed=seed))
        for seed in range(4)
    ]
    prompts = [list(range(5 + i, 40)) for i in range(4)]
    alone = [
        tokens_of(run(engine, [(0, request("alone", prompt, adapter))])["alone"])
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    for turn in range(3):
        arrivals = [(turn + i % 3, request(f"r{i}", prompts[i % 4], adapters[i % 4])) for i in range(12)]
        answers = run(engine, arrivals)
        for i in range(12):
            assert tokens_of(answers[f"r{i}"]) == alone[i % 4]
    assert engine.bank.pool.device.type == "cuda"
    engine.check_integrity()


def test_streams_go_on_while_an_adapter_loads(make_engine: EngineFactory, tmp_path: Path) -> None:
    engine = make_engine("llama")
    adapter = write_adapter(tmp_path / "one", engine.base.geometry, Recipe(r=64, seed=1))
    engine.add(request("stream", list(range(5, 20)), max_tokens=200, ignore_eos=True))
    step(engine)
    engine.add(request("cold", list(range(5, 20)), adapter, max_tokens=4, ignore_eos=True))
    before_cold = 0
    while "cold" in engine.sequences:
        named = {output.id for output in step(engine).outputs}
        before_cold += "stream" in named and "cold" not in named
    assert before_cold > 0
    while engine.has_work:
        step(engine)
    engine.check_integrity()
