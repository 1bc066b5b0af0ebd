"""The tiers on paper: rows are never shared, what is in use stays, and whoever waits gets a turn."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.errors import AdapterConflict, AdapterUnavailable
from loramux_adapters.residency import DeviceTier, Eviction, RowPool, Slot


def place(tier: DeviceTier, generation: str, rows: int) -> Slot | None:
    """Place and finish the copy at once."""
    slot = tier.place(generation, rows)
    if slot is not None:
        slot.filling = False
    return slot


# --- rank rows ---------------------------------------------------------------------------------------------------------


def test_row_pool_is_first_fit_and_merges_neighbours() -> None:
    pool = RowPool(32)
    assert [pool.allocate(8) for _ in range(4)] == [0, 8, 16, 24]
    assert pool.allocate(1) is None
    pool.release(0, 8)
    pool.release(16, 8)
    assert pool.free_rows == 16
    assert pool.allocate(16) is None  # free, but not in one piece
    pool.release(8, 8)
    assert pool.allocate(24) == 0


def test_row_pool_notices_a_double_release() -> None:
    pool = RowPool(16)
    pool.allocate(8)
    pool.release(0, 8)
    with pytest.raises(AssertionError, match="free already"):
        pool.release(4, 4)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12), st.integers(0, 99)), max_size=60))
def test_row_pool_never_hands_out_a_row_twice(moves: list[tuple[bool, int, int]]) -> None:
    pool = RowPool(24)
    owned: list[tuple[int, int]] = []
    for allocating, rows, pick in moves:
        if allocating:
            offset = pool.allocate(rows)
            taken = {row for start, length in owned for row in range(start, start + length)}
            if offset is None:
                free = sorted(set(range(24)) - taken)
                runs = [free[i : i + rows] for i in range(len(free))]
                assert not any(len(run) == rows and run[-1] - run[0] == rows - 1 for run in runs)
            else:
                assert not taken & set(range(offset, offset + rows))
                assert offset + rows <= 24
                owned.append((offset, rows))
        elif owned:
            pool.release(*owned.pop(pick % len(owned)))
        assert pool.free_rows == 24 - sum(length for _, length in owned)


# --- slots -------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_idle_adapter_goes() -> None:
    tier = DeviceTier(max_loras=2, rows=64)
    place(tier, "a", 8)
    place(tier, "b", 8)
    tier.acquire("a")
    tier.release("a")
    place(tier, "c", 8)
    assert list(tier.slots) == ["a", "c"]
    assert tier.take_evictions() == [Eviction("b", "device", "capacity")]
    assert tier.take_evictions() == []


def test_rows_run_out_before_slots_do() -> None:
    tier = DeviceTier(max_loras=8, rows=32)
    place(tier, "a", 16)
    place(tier, "b", 16)
    tier.acquire("b")
    assert place(tier, "c", 16) is not None
    assert set(tier.slots) == {"b", "c"}
    assert place(tier, "d", 32) is None  # b is in use
    tier.check()


def test_what_could_never_fit_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(AdapterUnavailable, match="--max-lora-rank"):
        DeviceTier(max_loras=8, rows=32).place("a", 33)


def test_an_adapter_being_copied_or_used_or_pinned_stays() -> None:
    tier = DeviceTier(max_loras=3, rows=64)
    tier.place("copying", 8)
    place(tier, "used", 8)
    tier.acquire("used")
    place(tier, "pinned", 8)
    tier.pin("pinned", True)
    assert tier.place("d", 8) is None
    tier.pin("pinned", False)
    assert tier.place("d", 8) is not None
    assert set(tier.slots) == {"copying", "used", "d"}


def test_one_slot_is_never_pinned() -> None:
    tier = DeviceTier(max_loras=2, rows=64)
    place(tier, "a", 8)
    place(tier, "b", 8)
    tier.pin("a", True)
    with pytest.raises(AdapterConflict, match="all 2 slots"):
        tier.pin("b", True)
    tier.pin("a", True)  # again: it is pinned already, nothing more is taken
    tier.pin("a", False)
    tier.pin("b", True)


def test_release_more_often_than_acquire_is_noticed() -> None:
    tier = DeviceTier(max_loras=2, rows=64)
    place(tier, "a", 8)
    with pytest.raises(AssertionError, match="released more often"):
        tier.release("a")


def test_check_notices_lost_rows() -> None:
    tier = DeviceTier(max_loras=2, rows=64)
    place(tier, "a", 8)
    del tier.slots["a"]
    with pytest.raises(AssertionError, match="0 rows owned"):
        tier.check()


Move = tuple[str, str, int]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["place", "wait", "filled", "acquire", "release", "remove", "pin", "unpin", "tick"]
            ),
            st.sampled_from("abcdefg"),
            st.integers(1, 12),
        ),
        max_size=80,
    )
)
def test_any_interleaving_keeps_rows_and_users(moves: list[Move]) -> None:
    """Only legal calls are made; `held` is who must stay, kept by the test itself."""
    tier = DeviceTier(max_loras=3, rows=24, patience=3, min_admitted=1)
    held: Counter[str] = Counter()
    pinned: set[str] = set()
    copying: set[str] = set()
    for action, generation, rows in moves:
        slot = tier.get(generation)
        stay = {g for g in tier.slots if held[g] or g in pinned or g in copying}
        match action:
            case "place" if slot is None:
                if tier.place(generation, rows) is not None:
                    copying.add(generation)
            case "wait" if slot is None:
                tier.wait(generation)
            case "filled" if slot is not None:
                slot.filling = False
                copying.discard(generation)
            case "acquire" if slot is not None and generation not in copying:
                tier.acquire(generation)
                held[generation] += 1
            case "release" if held[generation]:
                tier.release(generation)
                held[generation] -= 1
            case "remove" if slot is not None and not held[generation] and generation not in pinned:
                tier.remove(generation)
                copying.discard(generation)
                stay.discard(generation)
            case "pin" if slot is not None:
                try:
                    tier.pin(generation, True)
                    pinned.add(generation)
                except AdapterConflict:
                    assert len(pinned - {generation}) == tier.max_loras - 1
            case "unpin" if slot is not None:
                tier.pin(generation, False)
                pinned.discard(generation)
            case "tick":
                tier.tick += 1
        tier.check()
        assert stay <= set(tier.slots), f"{action} {generation} evicted one that had to stay"
        assert len(tier.slots) <= tier.max_loras
        assert len(pinned) < tier.max_loras
        spans = sorted((s.offset, s.offset + s.rows) for s in tier.slots.values())
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
        assert [s.references for s in tier.slots.values()] == [held[g] for g in tier.slots]


@settings(deadline=None)
@given(
    placed=st.lists(st.tuples(st.integers(1, 12), st.sampled_from(["idle", "used", "pinned"])), max_size=6),
    rows=st.integers(1, 24),
)
def test_the_forecast_of_evictions_is_what_happens(placed: list[tuple[int, str]], rows: int) -> None:
    tier = DeviceTier(max_loras=4, rows=24)
    for number, (length, state) in enumerate(placed):
        if place(tier, str(number), length) is not None:
            if state == "used":
                tier.acquire(str(number))
            elif state == "pinned" and sum(slot.pinned for slot in tier.slots.values()) < 3:
                tier.pin(str(number), True)
    tier.take_evictions()
    forecast = tier.evicted_by(rows)
    slot = tier.place("new", rows)
    assert (slot is None) == (forecast is None)
    if forecast is not None:
        assert tuple(eviction.generation for eviction in tier.take_evictions()) == forecast


def test_a_pinned_adapter_gives_way_only_if_a_request_could_never_be_placed() -> None:
    tier = DeviceTier(max_loras=4, rows=24)
    place(tier, "a", 8)
    place(tier, "idle", 8)
    tier.pin("a", True)
    assert tier.place("large", 24) is None  # for another pin nothing pinned goes
    assert set(tier.slots) == {"a"}  # the idle one went in the attempt
    assert tier.place("large", 24, before_pins=True) is not None
    assert set(tier.slots) == {"large"}


def test_a_request_waits_for_idle_adapters_before_it_takes_a_pinned_ones_place() -> None:
    tier = DeviceTier(max_loras=3, rows=24)
    place(tier, "pinned", 8)
    tier.pin("pinned", True)
    place(tier, "used", 8)
    tier.acquire("used")
    assert tier.place("large", 16, before_pins=True) is None
    assert "pinned" in tier.slots
    tier.release("used")
    assert tier.place("large", 16, before_pins=True) is not None
    assert set(tier.slots) == {"pinned", "large"}


# --- fairness ----------------------------------------------------------------------------------------------------------


def simulate(
    tier: DeviceTier,
    hot: dict[str, int],
    waiting: dict[str, int],
    *,
    ticks: int,
    lasts: Callable[[], int],
    order: Callable[[list[str]], object] = lambda names: None,
) -> dict[str, int]:
    """Hot adapters always have another request; the waiting ones ask in every tick until they are placed.

    A request lasts `lasts()` ticks; `order` shuffles who is asked first. Returns when each waiting one got its slot.
    """
    got: dict[str, int] = {}
    running: list[tuple[int, str]] = []
    ranks = hot | waiting
    names = list(ranks)
    for _ in range(ticks):
        tier.tick += 1
        for end, generation in [entry for entry in running if entry[0] <= tier.tick]:
            running.remove((end, generation))
            tier.release(generation)
        order(names)
        for generation in names:
            if generation in got:
                continue
            if tier.get(generation) is None and place(tier, generation, ranks[generation]) is None:
                tier.wait(generation)
            elif generation in waiting:
                got[generation] = tier.tick
            elif tier.accepts(generation):
                tier.acquire(generation)
                running.append((tier.tick + lasts(), generation))
        tier.check()
    return got


def test_a_waiting_adapter_gets_its_turn_among_hot_ones() -> None:
    tier = DeviceTier(max_loras=2, rows=64, patience=10, min_admitted=2)
    got = simulate(tier, {"h1": 8, "h2": 8}, {"cold": 8}, ticks=60, lasts=lambda: 5)
    assert got["cold"] <= 10 + 5 + 2
    assert tier.evictions[0].reason == "fairness"


def test_a_large_adapter_is_not_starved_by_small_ones() -> None:
    """It needs the rows of several; small ones must not refill what was drained for it."""
    tier = DeviceTier(max_loras=8, rows=32, patience=8, min_admitted=1)
    hot = {f"h{i}": 8 for i in range(6)}
    assert "large" in simulate(tier, hot, {"large": 32}, ticks=100, lasts=lambda: 6)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**20),
    hot=st.lists(st.integers(1, 16), min_size=1, max_size=6),
    cold=st.lists(st.integers(1, 16), min_size=1, max_size=5),
    max_loras=st.integers(1, 4),
)
def test_every_waiting_adapter_gets_its_turn(
    seed: int, hot: list[int], cold: list[int], max_loras: int
) -> None:
    """Whoever asks first in a tick, however much the hot ones ask; bounded by patience and the longest requests."""
    rng = random.Random(seed)
    longest = 9
    tier = DeviceTier(max_loras=max_loras, rows=16, patience=6, min_admitted=2)
    waiting = {f"cold{i}": rows for i, rows in enumerate(cold)}
    got = simulate(
        tier,
        {f"hot{i}": rows for i, rows in enumerate(hot)},
        waiting,
        ticks=200,
        lasts=lambda: rng.randint(1, longest),
        order=rng.shuffle,
    )
    # hot ones that lost their slot in the very first tick have waited as long, and may go first
    bound = tier.patience + len(hot + cold) * max_loras * (longest + tier.min_admitted)
    assert all(got.get(name, 10**6) <= bound for name in waiting), f"{got}, not within {bound} ticks"


def test_a_freshly_resident_adapter_serves_some_requests_before_it_is_drained() -> None:
    tier = DeviceTier(max_loras=1, rows=8, patience=4, min_admitted=3)
    place(tier, "a", 8)
    tier.acquire("a")
    for _ in range(20):
        tier.tick += 1
        tier.wait("b")
    assert tier.accepts("a")
    tier.acquire("a")
    tier.acquire("a")
    tier.wait("b")
    assert not tier.accepts("a")


def test_a_closed_slot_reopens_when_nobody_waits_any_more() -> None:
    tier = DeviceTier(max_loras=1, rows=8, patience=4, min_admitted=1)
    place(tier, "a", 8)
    tier.acquire("a")
    for _ in range(6):
        tier.tick += 1
        tier.wait("b")
    assert not tier.accepts("a")
    tier.tick += tier.patience  # b's request was aborted: nobody asks
    assert tier.accepts("a")
    tier.tick += 1
    tier.wait("b")  # a new request for b starts its wait from zero
    assert tier.accepts("a")


def test_an_adapter_nobody_asks_for_any_more_is_not_waited_for() -> None:
    tier = DeviceTier(max_loras=1, rows=8, patience=4, min_admitted=1)
    place(tier, "a", 8)
    tier.acquire("a")
    for _ in range(6):
        tier.tick += 1
        tier.wait("b")
    tier.release("a")
    assert tier.place("c", 8) is None  # b has waited past its patience: the room is b's
    tier.tick += tier.patience + 1
    assert tier.place("c", 8) is not None


def test_a_place_found_reopens_what_was_closed_for_it() -> None:
    tier = DeviceTier(max_loras=2, rows=16, patience=4, min_admitted=1)
    for name in "ab":
        place(tier, name, 8)
        tier.acquire(name)
    for _ in range(6):
        tier.tick += 1
        tier.wait("c")
    closed = [name for name in "ab" if not tier.accepts(name)]
    assert len(closed) == 1
    other = "b" if closed == ["a"] else "a"
    tier.release(other)  # a slot came free elsewhere
    assert place(tier, "c", 8) is not None
    assert tier.accepts(closed[0])
