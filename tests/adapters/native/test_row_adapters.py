"""Rows times their own adapters: right, and blind to everybody else's."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.native import row_adapters
from loramux_adapters.native.library import Native
from loramux_adapters.native.row_adapters import TILE
from loramux_adapters.residency import Slot
from loramux_adapters.row_adapters import RowAdapters, probe, tiles_of
from tests.adapters.support import check_rows, exact_rows

IN, OUT, ROWS = 96, 64, 48
SLOTS = [Slot("a", 0, 1), Slot("b", 4, 16), Slot("c", 20, 7), Slot("d", 30, 18)]
NAMES = st.sampled_from([None, "a", "b", "c", "d"])


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


A, B = random(ROWS, IN, seed=1), random(ROWS, OUT, seed=2)


def added(native: Native, x: torch.Tensor, y: torch.Tensor, rows: list[str | None]) -> torch.Tensor:
    adapters = RowAdapters(native.lora, {"q": (A, B)}, tile=TILE)
    adapters.select(rows, SLOTS, {"q"})
    result = y.clone()
    adapters.add("q", x, result)
    return result


@given(rows=st.lists(NAMES, min_size=1, max_size=40), seed=st.integers(0, 9))
def test_each_row_is_multiplied_with_its_own(native: Native, rows: list[str | None], seed: int) -> None:
    x, y = random(len(rows), IN, seed=seed), random(len(rows), OUT, seed=seed + 10)
    result = added(native, x, y, rows)
    check_rows(result, exact_rows(A, B, x, y, rows, SLOTS), y, rows, 5e-3)
    for number, name in enumerate(rows):
        alone = added(native, x[number : number + 1], y[number : number + 1], [name])
        assert torch.equal(alone[0], result[number])


@pytest.mark.parametrize("rows", [["b"] * 7 + ["a"], [None, None], ["c", None, "d", "d"]])
def test_a_table_with_room_left(native: Native, rows: list[str | None]) -> None:
    """What a recorded step reads: as many tiles as there are rows, the last ones of none."""
    x, y = random(len(rows), IN, seed=5), random(len(rows), OUT, seed=6)
    found = tiles_of(rows, SLOTS, TILE)
    room = found.with_room(len(rows))
    room.rows[len(found.rows) :] = 10**6
    adapters = RowAdapters(native.lora, {"q": (A, B)}, tile=TILE)
    adapters.select_tiles(room, len(rows), {"q"})
    result = y.clone()
    adapters.add("q", x, result)
    assert torch.equal(result, added(native, x, y, rows))
    assert adapters.names == {"q"}


def test_columns_of_a_wider_product(native: Native) -> None:
    x, wide = random(9, IN, seed=3), random(9, 3 * OUT, seed=4)
    rows: list[str | None] = ["b", "c", None] * 3
    expected = added(native, x, wide[:, OUT : 2 * OUT].clone(), rows)
    adapters = RowAdapters(native.lora, {"q": (A, B)}, tile=TILE)
    adapters.select(rows, SLOTS, {"q"})
    result = wide.clone()
    adapters.add("q", x, result[:, OUT : 2 * OUT])
    assert torch.equal(result[:, OUT : 2 * OUT], expected)
    assert torch.equal(result[:, :OUT], wide[:, :OUT])
    assert torch.equal(result[:, 2 * OUT :], wide[:, 2 * OUT :])


def test_inputs_in_another_type_or_order(native: Native) -> None:
    x, y = random(6, IN, seed=3), random(6, OUT, seed=4)
    rows: list[str | None] = ["b", "c", None] * 2
    expected = added(native, x, y, rows)
    assert torch.equal(added(native, x.float(), y, rows), expected)
    assert torch.equal(added(native, x.t().contiguous().t(), y, rows), expected)


def test_other_rows_than_were_selected_are_refused(native: Native) -> None:
    adapters = RowAdapters(native.lora, {"q": (A, B)}, tile=TILE)
    adapters.select(["b", "c"], SLOTS, {"q"})
    for count in (1, 3):
        with pytest.raises(RuntimeError, match=f"q sees {count} rows in torch.bfloat16, a step has 2"):
            adapters.add("q", random(count, IN, seed=1), random(count, OUT, seed=2))
    with pytest.raises(RuntimeError, match=r"in torch\.float32"):
        adapters.add("q", random(2, IN, seed=1), random(2, OUT, seed=2).float())


def test_linears_nobody_targets_are_left_alone(native: Native) -> None:
    adapters = RowAdapters(native.lora, {"q": (A, B), "v": (A, B)}, tile=TILE)
    adapters.select(["b"], SLOTS, {"v"})
    y = random(1, OUT, seed=4)
    result = y.clone()
    adapters.add("q", random(1, IN, seed=3), result)
    assert torch.equal(result, y)
    adapters.add("v", random(1, IN, seed=3), result)
    assert not torch.equal(result, y)


def test_overflow_of_one_row_is_its_own(native: Native) -> None:
    x, y = random(3, IN, seed=5), random(3, OUT, seed=6)
    rows: list[str | None] = ["b", "b", "d"]
    expected = added(native, x, y, rows)
    x[1] = float("inf")
    result = added(native, x, y, rows)
    assert not bool(result[1].isfinite().all())
    assert torch.equal(result[[0, 2]], expected[[0, 2]])


@given(rows=st.lists(NAMES, max_size=60))
def test_tiles_hold_every_row_once(rows: list[str | None]) -> None:
    tiles = tiles_of(rows, SLOTS, TILE)
    found: list[tuple[int, str]] = []
    for first, count, offset, rank in tiles.tiles.tolist():
        assert 1 <= count <= 4
        slot = next(slot for slot in SLOTS if slot.offset == offset)
        assert slot.rows == rank
        found += [(int(row), slot.generation) for row in tiles.rows[first : first + count]]
    assert sorted(found) == [(row, name) for row, name in enumerate(rows) if name is not None]


def error(kernel: Any) -> float:
    return probe(kernel.lora, TILE, torch.bfloat16, torch.device("cpu"))


class Wrong:
    """A kernel that does nothing."""

    def lora(self, *_: Any) -> None: ...


def test_a_wrong_kernel_is_not_used(native: Native, caplog: pytest.LogCaptureFixture) -> None:
    wrong: Any = Wrong()
    assert error(native) < 5e-3 < error(wrong)
    memory = {"q": (A, B)}
    with caplog.at_level(logging.WARNING):
        assert row_adapters.row_adapters(wrong, memory) is None
    assert "the CPU kernel is wrong here" in caplog.text
    assert row_adapters.row_adapters(native, memory) is not None
    assert row_adapters.row_adapters(None, memory) is None
    assert row_adapters.row_adapters(native, {"q": (A.float(), B.float())}) is None
    assert row_adapters.row_adapters(native, {"q": (A[:, :40].contiguous(), B)}) is None
