"""The stack holds the active adapters' own rows, wherever they lie in the pool, and the mask says whose is whose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.layers import AdapterBatch, MultiLoraLinear
from loramux_adapters.pool import DevicePool
from loramux_adapters.residency import Slot
from loramux_adapters.stack import AdapterStack

GROUPS = [("q", "k"), ("o",)]
SHAPES = {"q": (5, 3), "k": (2, 3), "o": (3, 4)}  # out, in


def make_pool(rows: int) -> DevicePool:
    batch = AdapterBatch()
    layers = {
        name: MultiLoraLinear(torch.nn.Linear(inputs, outputs), name, batch)
        for name, (outputs, inputs) in SHAPES.items()
    }
    return DevicePool(layers, GROUPS, batch, rows, torch.float32, torch.device("cpu"))


def fill(pool: DevicePool, slot: Slot) -> None:
    """With values that name the adapter, the linear and the row."""
    number = float(slot.generation)
    factors = {
        name: (
            (1000 * number + torch.arange(float(slot.rows)))[:, None].expand(-1, inputs),
            (1000 * number + torch.arange(float(slot.rows)))[:, None].expand(-1, outputs),
        )
        for name, (outputs, inputs) in SHAPES.items()
    }
    pool.fill(slot, factors)


def check(stack: AdapterStack, pool: DevicePool, slots: list[Slot], rows: int) -> None:
    """Of every adapter, the rows that its mask leaves are its own, in all linears."""
    stack.select(rows, None)
    for slot in slots:
        own = ~stack.foreign([slot.generation])[0]
        assert own.shape == (rows,)
        assert int(own.sum()) == slot.rows
        expected = 1000 * float(slot.generation) + torch.arange(float(slot.rows))
        for number, group in enumerate(GROUPS):
            kernel = pool.batch.shrinks[number].kernel
            stacked = kernel(torch.eye(SHAPES[group[0]][1])).T.view(len(group), rows, -1)
            for member, name in enumerate(group):
                expand = pool.batch.expands[name]
                assert (expand.group, expand.columns) == (number, slice(member * rows, (member + 1) * rows))
                for held in (stacked[member][own], expand.b[own]):
                    assert torch.equal(held, expected[:, None].expand_as(held))
    assert bool(stack.foreign([None]).all())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    turns=st.lists(st.sets(st.integers(0, 7), max_size=5), min_size=1, max_size=12),
    data=st.data(),
)
def test_every_arrangement_holds_what_is_active(
    sizes: list[int], turns: list[set[int]], data: st.DataObject
) -> None:
    pool = make_pool(sum(sizes))
    offsets = [sum(sizes[:number]) for number in range(len(sizes))]
    slots = [Slot(str(n), offset, size) for n, (offset, size) in enumerate(zip(offsets, sizes, strict=True))]
    for slot in slots:
        fill(pool, slot)
    stack = AdapterStack(pool)
    for turn in turns:
        active = [slots[number] for number in sorted(turn) if number < len(slots)]
        needed = sum(slot.rows for slot in active)
        if not needed:
            continue
        rows = data.draw(st.sampled_from(sorted({needed, min(sum(sizes), 2 * needed), sum(sizes)})))
        stack.arrange(active, rows)
        check(stack, pool, active, rows)


def test_what_lies_there_is_not_copied_again() -> None:
    pool = make_pool(8)
    slots = [Slot("1", 0, 3), Slot("2", 3, 3)]
    for slot in slots:
        fill(pool, slot)
    stack = AdapterStack(pool)
    stack.arrange(slots, 8)
    for tensor in (*pool.a, *pool.b.values()):
        tensor.fill_(-1.0)
    stack.arrange(slots[1:], 8)
    stack.arrange(slots, 8)
    check(stack, pool, slots, 8)


def test_addresses_stay() -> None:
    pool = make_pool(8)
    slot = Slot("1", 0, 3)
    fill(pool, slot)
    stack = AdapterStack(pool)

    def addresses() -> list[int]:
        stack.arrange([slot], 4)
        stack.select(4, None)
        return [expand.b.data_ptr() for expand in pool.batch.expands.values()]

    first = addresses()
    stack.arrange([slot], 8)
    assert addresses() == first


def test_more_than_fits_is_an_error() -> None:
    stack = AdapterStack(make_pool(8))
    with pytest.raises(AssertionError, match="6 rank rows do not fit 4"):
        stack.arrange([Slot("1", 0, 3), Slot("2", 3, 3)], 4)


def test_no_rows_is_the_base_alone() -> None:
    pool = make_pool(8)
    AdapterStack(pool).select(0, None)
    assert (pool.batch.shrinks, pool.batch.expands, pool.batch.foreign) == ({}, {}, None)
