"""Decoding steps as CUDA graphs, on the device: recorded, proven, and the same tokens."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters import row_choice
from loramux_adapters.row_adapters import RowAdapters
from loramux_adapters.row_choice import ByRows
from loramux_server.engine.decode_graphs import CudaRecorder
from loramux_server.engine.sampler import Sampled, Sampling
from tests.server.support import EngineFactory, Recipe, request, step, write_adapter
from tests.server.test_decode_graphs import ARCHITECTURES, adapters, answers, mixed, same_tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_are_those_of_steps_that_are_not_recorded(
    architecture: str, make_engine: EngineFactory, tmp_path: Path
) -> None:
    options = {"lora_rows": 32, "max_loras": 4}
    plain = make_engine(architecture, enforce_eager=True, **options)
    engine = make_engine(architecture, **options)
    assert plain.runner.graphs is None
    assert engine.runner.graphs is not None
    same_tokens(engine, plain, tmp_path)
    assert 0 in {kind for _, kind in engine.runner.graphs._recordings}


@pytest.mark.parametrize("sizes", [set(), {16}, {16, 32}])
def test_row_by_row_and_as_one_are_the_same_tokens(
    sizes: set[int],
    make_engine: EngineFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both forms are timed, and then each is made to be the faster one."""
    options = {"lora_rows": 32, "max_loras": 4}
    plain = make_engine("llama", enforce_eager=True, **options)
    real = row_choice.chosen

    def chosen(by_rows: RowAdapters, relative: dict[int, float]) -> ByRows | None:
        real(by_rows, relative)
        return ByRows(by_rows, frozenset(sizes)) if sizes else None

    monkeypatch.setattr(row_choice, "chosen", chosen)
    with caplog.at_level(logging.INFO):
        engine = make_engine("llama", **options)
    assert "its time over one product's, by rank rows: 16: " in caplog.text
    assert engine.runner.graphs is not None
    same_tokens(engine, plain, tmp_path)
    kinds = {kind for _, kind in engine.runner.graphs._recordings}
    assert {kind for kind in kinds if isinstance(kind, int)} == {0, 16, 32} - sizes
    assert any(isinstance(kind, frozenset) for kind in kinds) == bool(sizes)


def test_an_adapter_is_loaded_while_a_graph_is_recorded(make_engine: EngineFactory, tmp_path: Path) -> None:
    """Every request brings an adapter that others' steps must not wait for, and every size is new once."""
    engine = make_engine("llama", lora_rows=32, max_loras=2, max_cpu_loras=1)
    wanted = mixed(adapters(engine, tmp_path))
    found = answers(engine, wanted)
    assert engine.runner.graphs is not None
    assert engine.runner.graphs.works
    assert found == answers(make_engine("llama", enforce_eager=True), wanted)


def test_recordings_that_are_gone_do_not_end_recording(cuda: torch.device) -> None:
    """As when the first one proves nothing, or was only timed."""
    record = CudaRecorder(cuda)
    x = torch.ones(1000, device=cuda)

    def work() -> torch.Tensor:
        return (x * 2).sqrt()

    work()
    for number in range(4):
        recording = record(work)
        x.fill_(number)
        recording.replay()
        assert torch.equal(recording.result, work())
        del recording
        gc.collect()
    kept = [record(work) for _ in range(2)]
    x.fill_(8.0)
    for recording in kept:
        recording.replay()
        assert float(recording.result[0]) == 4.0


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_decoding_step_waits_for_the_device_once(
    enforce_eager: bool, make_engine: EngineFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its tokens are read the host goes on: torch refuses all that would wait."""
    engine = make_engine("llama", lora_rows=32, max_loras=2, enforce_eager=enforce_eager)
    ref = write_adapter(tmp_path / "one", engine.base.geometry, Recipe(r=8))
    params: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "logprobs": 2},
        {"repetition_penalty": 1.2, "logit_bias": {7: 1.0}, "min_tokens": 90},
    ]
    for number, one in enumerate(params):
        adapter = ref if number % 2 else None
        engine.add(request(f"r{number}", [5, 6, 7 + number], adapter, max_tokens=99, ignore_eos=True, **one))
    for _ in range(20):
        step(engine)
    assert len(engine.scheduler.running) == len(params)
    real, waited = Sampling.read, list[bool]()

    def read(sampling: Sampling) -> list[Sampled]:
        torch.cuda.set_sync_debug_mode("default")
        waited.append(True)
        return real(sampling)

    monkeypatch.setattr(Sampling, "read", read)
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(waited) == 3
