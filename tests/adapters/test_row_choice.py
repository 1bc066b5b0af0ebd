"""Which form adapters are multiplied in is decided by measuring both, and said with the figures."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from loramux_adapters import row_choice
from loramux_adapters.layers import AdapterBatch, MultiLoraLinear
from loramux_adapters.pool import DevicePool
from loramux_adapters.row_adapters import RowAdapters, Tiles
from loramux_adapters.row_choice import choose_by_rows, chosen, relative_times
from loramux_adapters.stack import AdapterStack
from tests.adapters.support import UNUSABLE, by_mask, measuring

SHAPES = {"q": (8, 16), "k": (4, 16), "o": (16, 8)}  # out, in
SIZES = [16, 32, 40]
ROWS = 4


class Device:
    """Where a pool says that it lies, on machines that have none."""

    type = "cuda"


@pytest.fixture
def pool() -> DevicePool:
    return make_pool(40)


def make_pool(rows: int) -> DevicePool:
    batch = AdapterBatch()
    layers = {
        name: MultiLoraLinear(torch.nn.Linear(inputs, outputs), name, batch)
        for name, (outputs, inputs) in SHAPES.items()
    }
    made = DevicePool(layers, [("q", "k"), ("o",)], batch, rows, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for a, b in made.memory.values():
        a.copy_(torch.randn(a.shape, generator=generator))
        b.copy_(torch.randn(b.shape, generator=generator))
    return made


def filled(pool: DevicePool) -> AdapterStack:
    """A stack that holds what the pool holds, at the same places."""
    stack = AdapterStack(pool)
    for flat, a in zip(stack._a, pool.a, strict=True):
        flat.copy_(a.flatten())
    for name, b in pool.b.items():
        stack._b[name].copy_(b)
    return stack


def clock(
    times: list[float], seen: list[torch.Tensor] | None = None
) -> Callable[[Callable[[], torch.Tensor]], float]:
    def seconds(work: Callable[[], torch.Tensor]) -> float:
        result = work()
        if seen is not None:
            seen.append(result.clone())
        result.zero_()
        return times.pop(0)

    return seconds


def test_both_forms_are_timed_on_the_same_work(pool: DevicePool) -> None:
    """What is compared is the same sum: of each row with the adapter that it names."""
    seen: list[torch.Tensor] = []
    found = relative_times(pool, filled(pool), by_mask(pool.memory), [40], ROWS, clock([1.0, 4.0], seen))
    assert found == {40: 0.25}
    ours, dense = seen
    assert float(ours.norm()) > 0
    torch.testing.assert_close(ours, dense)
    assert (
        len({tuple(row) for row in ours.tolist()}) == 2
    )  # rows of two adapters, as ones are their only input
    assert not pool.batch.shrinks
    assert pool.batch.by_rows is None


def test_no_adapter_is_timed_that_could_not_be() -> None:
    """One row and a pool for many: the kernel's memory is for one adapter's rank rows."""
    pool = make_pool(1100)
    ranks: list[int] = []

    def product(*arguments: object) -> None:
        assert isinstance(arguments[4], Tiles)
        ranks.extend(arguments[4].tiles[:, 3].tolist())

    by_rows = RowAdapters(product, pool.memory, tile=16)
    relative_times(pool, AdapterStack(pool), by_rows, [16, 1100], 1, clock([1.0] * 4))
    assert set(ranks) == {16, 512}


def test_timing_that_fails_leaves_no_adapter_behind(pool: DevicePool) -> None:
    def seconds(work: Callable[[], torch.Tensor]) -> float:
        work()
        raise RuntimeError("a step cannot be recorded")

    with pytest.raises(RuntimeError, match="cannot be recorded"):
        relative_times(pool, AdapterStack(pool), by_mask(pool.memory), SIZES, ROWS, seconds)
    assert pool.batch.by_rows is None


def test_sizes_that_are_clearly_faster_are_chosen(pool: DevicePool, caplog: pytest.LogCaptureFixture) -> None:
    times = [2.0, 1.0, 0.95, 1.0, 0.5, 1.0]
    relative = relative_times(pool, AdapterStack(pool), by_mask(pool.memory), SIZES, ROWS, clock(times))
    assert not times
    with caplog.at_level(logging.INFO):
        found = chosen(by_mask(pool.memory), relative)
    assert found is not None
    assert found.sizes == {32, 40}
    assert "row by row with 32, 40 active rank rows" in caplog.text
    assert "16: 2.00, 32: 0.95, 40: 0.50" in caplog.text


def test_nothing_is_chosen_where_nothing_is_faster(
    pool: DevicePool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert chosen(by_mask(pool.memory), {16: 0.96, 32: 1.0}) is None
    assert "with no number of active rank rows" in caplog.text


def test_nothing_is_tried_without_cuda(pool: DevicePool, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(*_: object) -> float:
        raise AssertionError("a product was tried")

    monkeypatch.setattr(row_choice, "probe", tried)
    assert choose_by_rows(pool, AdapterStack(pool), SIZES, ROWS, clock([])) is None


@UNUSABLE
def test_a_product_that_is_wrong_or_does_not_run_is_not_tried_for_speed(
    distance: float | RuntimeError,
    said: str,
    pool: DevicePool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("triton")

    monkeypatch.setattr(row_choice, "probe", measuring(distance))
    stack = AdapterStack(pool)
    monkeypatch.setattr(pool, "device", Device())
    with caplog.at_level(logging.WARNING):
        assert choose_by_rows(pool, stack, SIZES, ROWS, clock([])) is None
    assert said in caplog.text


def test_one_that_is_right_is_timed_and_fails_loudly(
    pool: DevicePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(row_choice, "probe", lambda *_: 0.0)
    given: list[RowAdapters] = []

    def timed(*arguments: object) -> dict[int, float]:
        assert isinstance(arguments[2], RowAdapters)
        given.append(arguments[2])
        if len(given) == 2:
            raise RuntimeError("a step cannot be recorded")
        return {16: 0.5}

    monkeypatch.setattr(row_choice, "relative_times", timed)
    stack = AdapterStack(pool)
    monkeypatch.setattr(pool, "device", Device())
    found = choose_by_rows(pool, stack, SIZES, ROWS, clock([]))
    assert found is not None
    assert found.adapters is given[0]
    assert (found.sizes, found.adapters.tile, found.adapters.names) == ({16}, 16, set(SHAPES))
    assert choose_by_rows(pool, stack, SIZES, ROWS, clock([])) is None
    assert "does not run here (a step cannot be recorded)" in caplog.text
