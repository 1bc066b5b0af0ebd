"""Engines on tiny models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux_server.base.loading import LoadOptions, load_base
from loramux_server.engine.engine import Engine, EngineOptions
from loramux_server.engine.scheduler import SchedulerLimits
from tests.adapters.training.support import byte_tokenizer, chat, write_jsonl
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


@pytest.fixture(scope="session")
def model_with_tokenizer(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer."""
    directory = tmp_path_factory.mktemp("with-tokenizer") / "tiny"
    shutil.copytree(tiny_model("llama"), directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def training_file(tmp_path: Path) -> Path:
    words = ["red", "green", "blue", "white", "black", "grey", "pink"]
    return write_jsonl(tmp_path / "data.jsonl", [chat(f"colour {w}", w * (1 + len(w) % 3)) for w in words])
