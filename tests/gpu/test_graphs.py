"""Decoding steps as CUDA graphs, on the device: recorded, proven, and the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.support import EngineFactory
from tests.server.test_decode_graphs import ARCHITECTURES, adapters, answers, mixed


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_are_those_of_steps_that_are_not_recorded(
    architecture: str, make_engine: EngineFactory, tmp_path: Path
) -> None:
    options = {"lora_rows": 32, "max_loras": 4}
    plain = make_engine(architecture, enforce_eager=True, **options)
    engine = make_engine(architecture, **options)
    assert plain.runner.graphs is None
    assert engine.runner.graphs is not None
    wanted = mixed(adapters(plain, tmp_path))
    assert answers(engine, wanted) == answers(plain, wanted)
    assert engine.runner.graphs.works
    assert {ranks for _, ranks in engine.runner.graphs._recordings} >= {0, 16, 32}


def test_an_adapter_is_loaded_while_a_graph_is_recorded(make_engine: EngineFactory, tmp_path: Path) -> None:
    """Every request brings an adapter that others' steps must not wait for, and every size is new once."""
    engine = make_engine("llama", lora_rows=32, max_loras=2, max_cpu_loras=1)
    wanted = mixed(adapters(engine, tmp_path))
    found = answers(engine, wanted)
    assert engine.runner.graphs is not None
    assert engine.runner.graphs.works
    assert found == answers(make_engine("llama", enforce_eager=True), wanted)
