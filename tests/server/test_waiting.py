"""The waiting line: nobody's queue keeps another's waiting, long prompts pay their length, a turn is not lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_server.engine.messages import AdapterRef, SamplingParams
from loramux_server.engine.sequence import Sequence
from loramux_server.engine.waiting import Verdict, WaitingLine, WaitingQueue

QUANTUM = 64


def sequence(name: str, adapter: str | None, tokens: int = 10, priority: int = 0) -> Sequence:
    ref = None if adapter is None else AdapterRef(adapter, f"/{adapter}")
    return Sequence(name, [1] * tokens, SamplingParams(max_tokens=1, priority=priority), ref)


def serve(
    line: WaitingQueue | WaitingLine, room: int, verdict: Callable[[Sequence], Verdict] | None = None
) -> list[Sequence]:
    """One step in which `room` sequences fit; returns those admitted, in order."""
    admitted: list[Sequence] = []

    def admit(item: Sequence) -> Verdict:
        answer = Verdict.ADMITTED if verdict is None else verdict(item)
        if answer is Verdict.ADMITTED:
            if len(admitted) == room:
                return Verdict.FULL
            admitted.append(item)
        return answer

    line.serve(admit)
    return admitted


def filled(*entries: tuple[str | None, int, int]) -> WaitingQueue:
    """Entries (adapter, how many, tokens of each); ids are adapter-number."""
    line = WaitingQueue(QUANTUM)
    for adapter, count, tokens in entries:
        for number in range(count):
            line.push(sequence(f"{adapter}-{number}", adapter, tokens))
    return line


def test_one_queue_is_first_come_first_served() -> None:
    line = filled(("a", 5, 10))
    assert [s.id for s in serve(line, 99)] == [f"a-{i}" for i in range(5)]
    assert len(line) == 0
    assert list(line) == []


def test_a_cold_adapters_head_is_admitted_within_one_round() -> None:
    """A hundred prompts of a hot adapter came first; a turn is worth 64 tokens, so six of them go ahead."""
    line = filled(("hot", 100, 10), ("cold", 1, 10))
    order = [s.id for s in serve(line, 99)]
    assert order.index("cold-0") <= QUANTUM // 10


@pytest.mark.parametrize("room", [1, 2, 7])
def test_a_cold_adapters_head_is_admitted_soon_when_few_fit_into_a_step(room: int) -> None:
    line = filled(("hot", 100, 10), ("cold", 1, 10), (None, 100, 10))
    order: list[str] = []
    while "cold-0" not in order:
        order += [s.id for s in serve(line, room)]
    assert len(order) <= 3 * (QUANTUM // 10) + room


@pytest.mark.parametrize("room", [1, 3, 1000])
def test_shares_are_tokens_and_not_requests(room: int) -> None:
    """While both wait, an adapter with long prompts gets as many tokens as one with short ones, not as many requests."""
    line = filled(("long", 200, 50), ("short", 2000, 5))
    tokens: Counter[str | None] = Counter()
    while sum(tokens.values()) < 4000:
        for item in serve(line, min(room, 20)):
            tokens[item.generation] += item.num_pending
    assert tokens["long"] == pytest.approx(tokens["short"], rel=0.1)


def test_tokens_of_the_prefix_cache_cost_nothing() -> None:
    """Turns are about what is left to compute: nine of ten tokens of "known" prompts are there already."""
    line = filled(("known", 1000, 10), ("new", 1000, 10))

    def admit(item: Sequence) -> Verdict:
        item.num_computed = 9 if item.generation == "known" else 0
        return Verdict.ADMITTED

    served = [item.generation for item in serve(line, 700, admit)]
    assert served.count("known") == pytest.approx(10 * served.count("new"), rel=0.2)


def test_a_long_prompt_is_admitted_after_enough_rounds() -> None:
    line = filled(("long", 1, 10 * QUANTUM), ("short", 300, 8))
    order = [s.id for s in serve(line, 1000)]
    assert order.index("long-0") <= 10 * (QUANTUM // 8)


def test_a_head_that_does_not_fit_is_not_overtaken_for_ever() -> None:
    """The big head needs all the memory: small ones of another adapter must not take it bit by bit as it comes free."""
    line = filled(("big", 1, QUANTUM), ("small", 1000, 8))
    for step in range(40):
        # memory for two small ones comes free in every step, and would add up if it were left alone
        free = 16 * (step + 1) - 8 * (1000 - sum(1 for s in line if s.generation == "small"))

        def fits(item: Sequence, free: int = free) -> Verdict:
            return Verdict.ADMITTED if item.num_pending <= free else Verdict.FULL

        if any(s.generation == "big" for s in serve(line, 1000, fits)):
            return
    pytest.fail("the big prompt starved")


def test_a_queue_that_cannot_go_on_yet_keeps_its_turn() -> None:
    """Its adapter is being loaded: others go ahead meanwhile, and it is first as soon as it can."""
    line = filled(("loading", 3, 10), ("a", 100, 10), ("b", 100, 10))

    def not_yet(item: Sequence) -> Verdict:
        return Verdict.NOT_YET if item.generation == "loading" else Verdict.ADMITTED

    for _ in range(5):
        assert len(serve(line, 4, not_yet)) == 4
    assert serve(line, 4)[0].id == "loading-0"


def test_waiting_for_capacity_piles_up_no_credit() -> None:
    line = filled(("a", 100, 10), ("b", 100, 10))
    for _ in range(50):
        serve(line, 0)
        serve(line, 99, lambda item: Verdict.NOT_YET)
    order = [s.generation for s in serve(line, 40)]
    assert order.count("a") == pytest.approx(20, abs=QUANTUM // 10)


def test_a_dropped_head_makes_way_for_the_next() -> None:
    line = filled(("a", 3, 10))
    admitted = serve(line, 9, lambda item: Verdict.DROPPED if item.id == "a-0" else Verdict.ADMITTED)
    assert [s.id for s in admitted] == ["a-1", "a-2"]
    assert len(line) == 0


def test_the_preempted_go_first_in_their_queue() -> None:
    line = filled(("a", 2, 10))
    line.push(sequence("preempted", "a"), front=True)
    assert [s.id for s in serve(line, 9)] == ["preempted", "a-0", "a-1"]


def test_remove_from_anywhere() -> None:
    line = filled(("a", 3, 10), ("b", 1, 10))
    for item in [s for s in line if s.id in ("a-1", "b-0")]:
        line.remove(item)
    assert [s.id for s in line] == ["a-0", "a-2"]
    assert [s.id for s in serve(line, 9)] == ["a-0", "a-2"]


@settings(deadline=None)
@given(
    entries=st.lists(
        st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.integers(1, 300)), min_size=1, max_size=40
    ),
    rooms=st.lists(st.integers(0, 5), min_size=1, max_size=10),
    data=st.data(),
)
def test_everyone_is_served_once_and_in_the_order_of_their_queue(
    entries: list[tuple[str | None, int]], rooms: list[int], data: st.DataObject
) -> None:
    line = WaitingQueue(QUANTUM)
    sequences = [sequence(str(number), adapter, tokens) for number, (adapter, tokens) in enumerate(entries)]
    for item in sequences:
        line.push(item)
    served: list[Sequence] = []
    for room in rooms:
        blocked = data.draw(st.sampled_from([frozenset(), frozenset({"a"}), frozenset({None, "b"})]))
        served += serve(
            line,
            room,
            lambda item, blocked=blocked: Verdict.NOT_YET if item.generation in blocked else Verdict.ADMITTED,
        )
    served += serve(line, len(sequences))
    assert len(line) == 0
    assert len(served) == len(sequences)
    for adapter in {s.generation for s in sequences}:
        mine = [s.id for s in served if s.generation == adapter]
        assert mine == [s.id for s in sequences if s.generation == adapter]


# --- priorities --------------------------------------------------------------------------------------------------------


def line_of(*entries: tuple[str, str | None, int]) -> WaitingLine:
    """Entries (id, adapter, priority)."""
    line = WaitingLine(QUANTUM)
    for name, adapter, priority in entries:
        line.push(sequence(name, adapter, priority=priority))
    return line


def test_lower_numbers_go_first() -> None:
    line = line_of(("x", "a", 3), ("y", "b", 0), ("z", "a", -2), ("w", None, 0))
    assert {s.id for s in line} == {"x", "y", "z", "w"}
    assert len(line) == 4
    assert [s.id for s in serve(line, 99)] == ["z", "y", "w", "x"]
    assert len(line) == 0


def test_nobody_gets_the_room_that_was_too_little_for_one_who_is_more_urgent() -> None:
    line = line_of(("usual", "a", 0), ("urgent", "b", -1))

    def too_large(item: Sequence) -> Verdict:
        return Verdict.FULL if item.id == "urgent" else Verdict.ADMITTED

    assert serve(line, 99, too_large) == []


def test_one_that_has_to_wait_keeps_its_place_and_lets_others_pass() -> None:
    line = line_of(("first", "a", 0), ("second", "a", 0), ("third", "b", 0))
    answer = serve(line, 99, lambda item: Verdict.LATER if item.id == "first" else Verdict.ADMITTED)
    assert [s.id for s in answer] == ["second", "third"]
    line.push(sequence("fourth", "a"))
    assert [s.id for s in serve(line, 99)] == ["first", "fourth"]


def test_only_so_many_are_asked_in_vain() -> None:
    line = line_of(*((f"r{number}", None, 0) for number in range(100)))
    asked = []

    def later(item: Sequence) -> Verdict:
        asked.append(item.id)
        return Verdict.LATER

    for _ in range(2):
        serve(line, 99, later)
    assert asked == 2 * [f"r{number}" for number in range(len(asked) // 2)]
    assert len(asked) // 2 < 20


def test_one_whose_adapter_is_loading_keeps_nobody_waiting() -> None:
    line = line_of(("usual", "a", 0), ("urgent", "b", -1))
    loading = serve(line, 99, lambda item: Verdict.NOT_YET if item.id == "urgent" else Verdict.ADMITTED)
    assert [s.id for s in loading] == ["usual"]
    assert [s.id for s in serve(line, 99)] == ["urgent"]


def test_priorities_that_nobody_has_any_more_are_forgotten() -> None:
    line = WaitingLine(QUANTUM)
    for priority in range(5):
        one = sequence(f"r{priority}", None, priority=priority)
        line.push(one)
        if priority % 2:
            line.remove(one)
    serve(line, 99)
    assert line._by_priority == {}
