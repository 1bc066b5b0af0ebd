"""Everything here needs a CUDA device; elsewhere each test is skipped, with that as its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_server.base.loading import LoadOptions, load_base
from loramux_server.engine.engine import Engine, EngineOptions
from loramux_server.engine.scheduler import SchedulerLimits
from tests.adapters.training.support import chat, write_jsonl
from tests.server.support import EngineFactory

DEVICE = torch.device("cuda", 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def cuda() -> torch.device:
    return DEVICE


@pytest.fixture
def make_engine(tiny_model: Callable[[str], Path]) -> Iterator[EngineFactory]:
    """`make_engine("llama", dtype=..., num_blocks=...)` on the device."""
    engines: list[Engine] = []

    def make(architecture: str = "llama", *, dtype: str = "float32", **options: Any) -> Engine:
        directory = str(tiny_model(architecture))
        base = load_base(LoadOptions(model=directory, name="tiny", device=str(DEVICE), dtype=dtype))
        limits = SchedulerLimits(options.pop("max_num_seqs", 16), options.pop("max_num_batched_tokens", 48))
        chosen = {"num_blocks": 128, "max_model_len": 256, "lora_rows": 128, **options}
        engines.append(Engine(base, EngineOptions(limits=limits, **chosen)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def training_file(tmp_path: Path) -> Path:
    words = ["red", "green", "blue", "white", "black", "grey", "pink"]
    return write_jsonl(tmp_path / "data.jsonl", [chat(f"colour {w}", w * (1 + len(w) % 3)) for w in words])
