"""Everything here needs a CUDA device; elsewhere each test is skipped, with that as its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.server.support import EngineFactory, engines_on, write_colours

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
    with engines_on(tiny_model, str(DEVICE)) as make:
        yield make


@pytest.fixture
def training_file(tmp_path: Path) -> Path:
    return write_colours(tmp_path)
