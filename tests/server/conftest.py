"""Engines on tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux_server.base.loading import LoadOptions, load_base
from loramux_server.engine.engine import Engine, EngineOptions
from loramux_server.engine.scheduler import SchedulerLimits
from tests.server.support import EngineFactory


@pytest.fixture
def make_engine(tiny_model: Callable[[str], Path]) -> Iterator[EngineFactory]:
    """`make_engine("llama", num_blocks=..., max_loras=...)` in fp32."""
    engines: list[Engine] = []

    def make(architecture: str = "llama", *, dtype: str = "float32", **options: Any) -> Engine:
        base = load_base(
            LoadOptions(model=str(tiny_model(architecture)), name="tiny", device="cpu", dtype=dtype)
        )
        limits = SchedulerLimits(options.pop("max_num_seqs", 16), options.pop("max_num_batched_tokens", 48))
        chosen = {"num_blocks": 128, "max_model_len": 256, "lora_rows": 128, **options}
        engines.append(Engine(base, EngineOptions(limits=limits, **chosen)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
