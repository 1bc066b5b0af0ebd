"""How long the long forms run: `make soak`, or `pytest tests/soak -m soak --steps N --kills N --seed N`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("soak")
    group.addoption("--steps", type=int, default=1_000_000, help="engine steps of the churn test")
    group.addoption("--kills", type=int, default=200, help="kill -9 of a real server")
    group.addoption("--seed", type=int, default=0)


@pytest.fixture
def soak_seed(request: pytest.FixtureRequest) -> int:
    seed: int = request.config.getoption("--seed", default=0)
    return seed
