"""How long the long forms run: `make soak`, or `pytest tests/soak -m soak --steps N --kills N --seed N`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("soak")
    group.addoption(
        "--steps", type=int, default=1_000_000, help="engine steps of the churn test, all shards together"
    )
    group.addoption(
        "--shards", type=int, default=1, help="parts of the churn test, each with a seed of its own"
    )
    group.addoption("--kills", type=int, default=200, help="kill -9, all shards together")
    group.addoption("--server-kills", type=int, default=40, help="kill -9 of whole servers during uploads")
    group.addoption("--seed", type=int, default=0)


@pytest.fixture
def soak_seed(request: pytest.FixtureRequest) -> int:
    seed: int = request.config.getoption("--seed", default=0)
    return seed


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shard" in metafunc.fixturenames:
        metafunc.parametrize("shard", range(metafunc.config.getoption("--shards", default=1)))
