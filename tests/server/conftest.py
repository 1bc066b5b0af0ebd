"""Engines on tiny models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.adapters.training.support import byte_tokenizer
from tests.server.support import EngineFactory, engines_on, write_colours


@pytest.fixture
def make_engine(tiny_model: Callable[[str], Path]) -> Iterator[EngineFactory]:
    with engines_on(tiny_model, "cpu") as make:
        yield make


@pytest.fixture(scope="session")
def model_with_tokenizer(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer."""
    directory = tmp_path_factory.mktemp("with-tokenizer") / "tiny"
    shutil.copytree(tiny_model("llama"), directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def training_file(tmp_path: Path) -> Path:
    return write_colours(tmp_path)
