"""The latency budget of training, with made-up times: what streams wait for, and that training goes on all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, cycle, pairwise, repeat
from random import Random

import pytest

from loramux_server.engine.budget import LatencyBudget


def added(budget: LatencyBudget, slices: Iterator[float], *, gaps: int, step: float = 0.02) -> list[float]:
    """What training adds to each gap of streams that never pause."""
    found = []
    for _ in range(gaps):
        budget.decoded(step)
        found.append(0.0)
        while budget.allows():
            took = next(slices)
            budget.trained(took, decoding=True)
            found[-1] += took
    return found


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))]


def steps() -> Iterator[float]:
    """Two dozen layers forward, as many backward, an update; now and then a checkpoint."""
    step = (*repeat(0.004, 24), 0.01, *repeat(0.012, 24), 0.06)
    return chain.from_iterable(cycle([step, step, (*step, 0.5)]))


def noise() -> Iterator[float]:
    random = Random(1)
    while True:
        yield random.lognormvariate(-5.5, 1.0)


@pytest.mark.parametrize("slices", [steps, noise, lambda: repeat(0.003), lambda: repeat(3.0)])
@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.01, 0.02, 0.1])
def test_the_99th_percentile_is_the_budget(slices: Callable[[], Iterator[float]], seconds: float) -> None:
    found = added(LatencyBudget(seconds), slices(), gaps=20_000)
    assert percentile(found, 0.99) <= seconds + 1e-9
    assert sum(found) > 0


def test_a_gap_is_filled_with_what_fits() -> None:
    budget = LatencyBudget(0.01)
    budget.trained(0.003, decoding=False)
    assert added(budget, repeat(0.003), gaps=3) == pytest.approx([0.009] * 3)


def test_without_a_budget_training_goes_on_now_and_then() -> None:
    found = added(LatencyBudget(0.0), repeat(0.005), gaps=1000)
    assert [place for place, took in enumerate(found) if took] == list(range(127, 1000, 128))
    assert set(found) == {0.0, 0.005}


def test_of_long_slices_decoding_has_three_times_as_much() -> None:
    found = added(LatencyBudget(0.01), repeat(30.0), gaps=40_000)
    assert sum(found) == pytest.approx(40_000 * 0.02 / 3, rel=0.15)
    apart = [place for place, took in enumerate(found) if took]
    assert min(late - early for early, late in pairwise(apart)) >= 30 * 3 / 0.02


def test_a_surprise_is_paid_for() -> None:
    budget = LatencyBudget(0.01)
    budget.trained(0.001, decoding=False)
    assert added(budget, chain([0.05], repeat(0.001)), gaps=150) == pytest.approx(
        [0.05] + [0.0] * 126 + [0.01] * 23
    )


def test_what_runs_while_nobody_waits_is_free() -> None:
    budget = LatencyBudget(0.01)
    for _ in range(50):
        budget.trained(5.0, decoding=False)
    for _ in range(2):  # short slices again
        budget.trained(0.002, decoding=False)
    assert added(budget, repeat(0.002), gaps=2) == pytest.approx([0.01] * 2)
