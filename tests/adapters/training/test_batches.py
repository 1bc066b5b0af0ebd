"""Packing, and the order in which samples are seen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.training.batches import Batches, pack

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(LENGTHS)
def test_packing_keeps_every_sample_once_and_no_row_too_long(lengths: list[int]) -> None:
    units = pack(lengths, 50)
    assert sorted(sample for unit in units for sample in unit) == list(range(len(lengths)))
    totals = sorted(sum(lengths[sample] for sample in unit) for unit in units)
    assert totals[-1] <= 50
    assert len(totals) == 1 or totals[0] + totals[1] > 50  # no two rows would have fitted into one


def test_packing_fills_the_tightest_gap() -> None:
    assert pack([6, 4, 3, 7], 10) == [(3, 2), (0, 1)]


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_shows_every_unit_once(count: int, size: int, accumulation: int, seed: int) -> None:
    units = [(2 * index, 2 * index + 1) for index in range(count)]
    batches = Batches(units, size, accumulation, seed)
    for epoch in range(2):
        first = epoch * batches.steps_per_epoch
        steps = [batches.of_step(first + place) for place in range(batches.steps_per_epoch)]
        assert sorted(sample for step in steps for micro in step for sample in micro) == list(
            range(2 * count)
        )
        assert all(len(step) <= accumulation and step for step in steps)
        assert all(0 < len(micro) <= 2 * size for step in steps for micro in step)


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    units = [(index,) for index in range(50)]
    first, second = Batches(units, 50, 1, 7), Batches(units, 50, 1, 7)
    late = second.of_step(1)
    assert first.of_step(0) == second.of_step(0)
    assert first.of_step(1) == late
    assert first.of_step(0) != late
    assert Batches(units, 50, 1, 8).of_step(0) != first.of_step(0)
