"""Rows times their own adapters by our Triton kernels, interpreted, against each row's product by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramux_adapters.nf4 import ROUNDING
from loramux_adapters.residency import Slot
from loramux_adapters.row_adapters import Tiles, probe, tiles_of
from tests.adapters.support import check_rows, exact_rows, multiply_by_mask
from tests.interpreted import Interpreter
from tests.interpreted import interpreter as interpreter  # a fixture

pytest.importorskip("triton")

TILE = 16
SLOTS = [Slot("a", 0, 1), Slot("b", 4, 16), Slot("c", 20, 7), Slot("d", 30, 70), Slot("e", 100, 32)]
RANKS = 140
LENIENT = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SHAPES = st.sampled_from([(96, 64), (1184, 40), (512, 130), (16, 3)])  # inputs, outputs
NAMES = st.lists(st.sampled_from([None, *(slot.generation for slot in SLOTS)]), min_size=1, max_size=40)


def lora(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, y: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """In the interpreter's process."""
    from loramux_adapters import triton_lora

    assert triton_lora.TILE == TILE
    triton_lora.lora(a, b, x, y, tiles)
    return y


def probed(dtype: torch.dtype) -> float:
    """In the interpreter's process."""
    from loramux_adapters import triton_lora

    return probe(triton_lora.lora, triton_lora.TILE, dtype, torch.device("cpu"))


def case(rows: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """A, B, x and y. Rank rows of nobody are not numbers."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = shape
    a, b, x, y = (
        torch.randn(size, generator=generator)
        for size in ((RANKS, inputs), (RANKS, outputs), (rows, inputs), (rows, outputs))
    )
    nobodys = torch.ones(RANKS, dtype=torch.bool)
    for slot in SLOTS:
        nobodys[slot.offset : slot.offset + slot.rows] = False
    a[nobodys], b[nobodys] = float("nan"), float("nan")
    return [one.to(dtype) for one in (a, b, x, y)]


@LENIENT
@given(rows=NAMES, shape=SHAPES, dtype=st.sampled_from([torch.float32, torch.float16]))
def test_each_row_is_multiplied_with_its_own(
    interpreter: Interpreter, rows: list[str | None], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    a, b, x, y = case(len(rows), shape, dtype)
    tiles = tiles_of(rows, SLOTS, TILE).with_room(len(rows))
    result = interpreter(__name__, "lora", a, b, x, y, tiles)[0]
    assert result.dtype == dtype
    check_rows(result, exact_rows(a, b, x, y, rows, SLOTS), y, rows, ROUNDING[dtype])


def test_a_row_does_not_depend_on_the_rows_beside_it(interpreter: Interpreter) -> None:
    rows = ["d", *["b"] * 20, "d", "c"]
    a, b, x, y = case(len(rows), (1184, 130))
    together = interpreter(__name__, "lora", a, b, x, y, tiles_of(rows, SLOTS, TILE))[0]
    for number in (0, 1, 17, 21, 22):
        alone = tiles_of([rows[number]], SLOTS, TILE)
        one = slice(number, number + 1)
        assert torch.equal(interpreter(__name__, "lora", a, b, x[one], y[one], alone)[0], together[one])
    overflown = x.clone()
    overflown[3] = float("inf")
    result = interpreter(__name__, "lora", a, b, overflown, y, tiles_of(rows, SLOTS, TILE))[0]
    others = [number for number in range(len(rows)) if number != 3]
    assert torch.equal(result[others], together[others])
    assert not bool(result[3].isfinite().all())


def test_no_rows_are_no_work(interpreter: Interpreter) -> None:
    a, b, x, y = case(2, (96, 64))
    for tiles in (tiles_of([None, None], SLOTS, TILE), tiles_of([None, None], SLOTS, TILE).with_room(2)):
        assert torch.equal(interpreter(__name__, "lora", a, b, x, y, tiles)[0], y)


def test_what_is_not_contiguous_is_refused() -> None:
    a, b, x, _ = case(2, (96, 64))
    wide = torch.zeros(2, 128)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        lora(a, b, x, wide[:, :64], tiles_of(["a", "b"], SLOTS, TILE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_pass_their_own_check(interpreter: Interpreter, dtype: torch.dtype) -> None:
    assert interpreter(__name__, "probed", dtype)[0] <= ROUNDING[dtype]


@LENIENT
@given(rows=NAMES, shape=SHAPES)
def test_the_reference_of_recorded_steps_is_the_same(rows: list[str | None], shape: tuple[int, int]) -> None:
    """Of the kernels' tests and of those that record without a device: one cannot be right without the other."""
    a, b, x, y = (one.nan_to_num() for one in case(len(rows), shape))
    found = y.clone()
    multiply_by_mask(a, b, x, found, tiles_of(rows, SLOTS, TILE).with_room(len(rows)), TILE)
    check_rows(found, exact_rows(a, b, x, y, rows, SLOTS), y, rows, ROUNDING[torch.float32])
