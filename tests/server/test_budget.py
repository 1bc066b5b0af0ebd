"""The latency budget of training, with made-up times: what streams wait for, and that training goes on all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, count, cycle, pairwise, repeat
from random import Random

import pytest

from loramux_server.engine.budget import LatencyBudget

Slice = tuple[str, float]


def added(budget: LatencyBudget, slices: Iterator[Slice], *, gaps: int, step: float = 0.02) -> list[float]:
    """What training adds to each gap of streams that never pause."""
    found = []
    kind, took = next(slices)
    for _ in range(gaps):
        budget.decoded(step)
        found.append(0.0)
        while budget.allows(kind):
            budget.trained(kind, took, decoding=True)
            found[-1] += took
            kind, took = next(slices)
    return found


def same(seconds: float) -> Iterator[Slice]:
    return repeat(("layer", seconds))


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))]


def steps() -> Iterator[Slice]:
    """Two dozen layers forward, as many backward, an update; now and then a checkpoint."""
    layers = [*repeat(("forward", 0.004), 24), ("loss", 0.01), *chain.from_iterable(repeat(BACK, 24))]
    return chain.from_iterable(cycle([[*layers, ("update", 0.06)]] * 2 + [[*layers, ("update", 0.5)]]))


BACK = (("again", 0.004), ("back", 0.008))


def noise() -> Iterator[Slice]:
    random = Random(1)
    while True:
        yield "layer", random.lognormvariate(-5.5, 1.0)


@pytest.mark.parametrize("slices", [steps, noise, lambda: same(0.003), lambda: same(3.0)])
@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.01, 0.02, 0.1])
def test_the_99th_percentile_is_the_budget(slices: Callable[[], Iterator[Slice]], seconds: float) -> None:
    found = added(LatencyBudget(seconds), slices(), gaps=20_000)
    assert percentile(found, 0.99) <= seconds + 1e-9
    assert sum(found) > 0


def test_a_gap_is_filled_with_what_fits() -> None:
    budget = LatencyBudget(0.01)
    budget.trained("layer", 0.003, decoding=False)
    assert added(budget, same(0.003), gaps=3) == pytest.approx([0.009] * 3)


def test_slices_that_all_fit_leave_no_gap_empty() -> None:
    """Short and long kinds by turns, an update that fits nowhere among them: the job keeps nearly what the gaps hold."""
    layers = chain.from_iterable(cycle([[*BACK] * 100 + [("update", 0.04)]]))
    found = added(LatencyBudget(0.01), layers, gaps=10_000)
    assert sum(found) / 10_000 > 0.005


def test_noise_does_not_stop_training() -> None:
    random = Random(1)
    uneven = (
        ("layer", random.lognormvariate(-5.8, 0.3)) for _ in count()
    )  # 3 milliseconds, most within 2 and 5
    found = added(LatencyBudget(0.012), uneven, gaps=20_000)
    assert sum(found) / 20_000 > 0.004
    assert percentile(found, 0.99) <= 0.012


def test_without_a_budget_training_goes_on_now_and_then() -> None:
    found = added(LatencyBudget(0.0), same(0.005), gaps=1000)
    assert [place for place, took in enumerate(found) if took] == list(range(127, 1000, 128))
    assert set(found) == {0.0, 0.005}


def test_slices_that_do_not_fit_share_a_gap() -> None:
    found = added(LatencyBudget(0.01), same(0.03), gaps=1000)
    assert [place for place, took in enumerate(found) if took] == list(range(127, 1000, 128))
    assert {round(took, 9) for took in found} == {0.0, 0.09}, "as many as ten budgets hold"


def test_of_long_slices_decoding_has_three_times_as_much() -> None:
    found = added(LatencyBudget(0.01), same(30.0), gaps=40_000)
    assert sum(found) == pytest.approx(40_000 * 0.02 / 3, rel=0.15)
    apart = [place for place, took in enumerate(found) if took]
    assert min(late - early for early, late in pairwise(apart)) >= 30 * 3 / 0.02


def test_surprises_are_paid_for() -> None:
    """Five slices that took longer than what was left for them: from then on nothing, until the share is kept again."""
    budget = LatencyBudget(0.01)
    budget.trained("layer", 0.001, decoding=False)
    added(budget, same(0.001), gaps=1000)  # none for long
    for _ in range(5):
        budget.decoded(0.02)
        assert budget.allows("layer")
        budget.trained("layer", 0.05, decoding=True)
        for _ in range(40):
            budget.trained("layer", 0.001, decoding=False)
    found = added(budget, same(0.001), gaps=200)
    assert found[:90] == [0.0] * 90
    assert found[-1] > 0


def test_what_runs_while_nobody_waits_is_free() -> None:
    budget = LatencyBudget(0.01)
    for _ in range(50):
        budget.trained("layer", 5.0, decoding=False)
    for _ in range(80):  # short slices again
        budget.trained("layer", 0.002, decoding=False)
    assert added(budget, same(0.002), gaps=2) == pytest.approx([0.008] * 2)
