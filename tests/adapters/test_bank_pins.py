"""Pinned adapters come by themselves, stay, and never make the engine spin."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from loramux_adapters.errors import AdapterUnavailable
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.weights import LoraWeights
from tests.adapters.support import Harness

MakeWeights = Callable[..., LoraWeights]


@pytest.fixture
def harness(tiny_geometry: BaseGeometry, make_lora_weights: MakeWeights) -> Iterator[Harness]:
    made = Harness(tiny_geometry, [make_lora_weights(seed, r=4) for seed in range(4)], max_loras=3, rows=12)
    yield made
    made.bank.close()


def pin(harness: Harness, *generations: str) -> None:
    """Tell the bank, and step until it has nothing left to do by itself."""
    harness.bank.pin(dict.fromkeys(generations, "/somewhere"))
    for _ in range(100):
        if not harness.bank.is_pinning:
            return
        harness.tier.tick += 1
        harness.bank.keep_pinned()
        harness.settle()
    pytest.fail("the engine would spin")


def pinned(harness: Harness) -> set[str]:
    return {name for name, slot in harness.tier.slots.items() if slot.pinned}


def test_a_pinned_adapter_comes_without_a_request_and_stays(harness: Harness) -> None:
    a, b, c, d = harness.adapters
    assert not harness.bank.is_pinning
    pin(harness, a)
    assert (pinned(harness), harness.bank.resident()) == ({a}, [a])
    for name in (b, c, d):
        harness.make_ready(name)
        harness.bank.release(name)
    assert a in harness.bank.resident()
    harness.bank.acquire(a)
    harness.run([a])


def test_the_next_set_replaces_the_last(harness: Harness) -> None:
    a, b, c, d = harness.adapters
    pin(harness, a, b)
    assert pinned(harness) == {a, b}
    pin(harness, b, c)
    assert pinned(harness) == {b, c}
    pin(harness)
    assert pinned(harness) == set()
    harness.make_ready(d)
    assert len(harness.bank.resident()) == 3


def test_one_pin_too_many_is_dropped(harness: Harness) -> None:
    pin(harness, *list(harness.adapters)[:3])
    assert len(pinned(harness)) == 2


def test_a_pin_that_cannot_be_loaded_is_tried_once_a_request(harness: Harness) -> None:
    a, b, *_ = harness.adapters
    works = harness.reader

    def fails(generation: str, path: str) -> LoraWeights:
        if generation == a:
            raise AdapterUnavailable("damaged")
        return works(generation, path)

    harness.reader = fails
    pin(harness, a, b)
    assert pinned(harness) == {b}
    assert harness.reads.count(a) == 1
    assert [event.error for event in harness.bank.take_events() if event.error] == ["damaged"]
    harness.reader = works
    pin(harness, a, b)
    assert pinned(harness) == {a, b}


def test_a_pin_without_room_waits_quietly_and_comes_when_there_is(harness: Harness) -> None:
    a, b, c, d = harness.adapters
    harness.make_ready(a, b, c)  # all in use
    pin(harness, d)
    assert pinned(harness) == set()
    assert not harness.bank.is_pinning
    harness.bank.release(b)
    harness.tier.tick += 1
    harness.bank.keep_pinned()  # as every step does while requests run
    pin(harness, d)
    assert pinned(harness) == {d}
    assert set(harness.bank.resident()) == {a, c, d}


def test_a_request_that_nothing_else_makes_room_for_displaces_a_pin(
    tiny_geometry: BaseGeometry, make_lora_weights: MakeWeights
) -> None:
    """A pinned adapter in the middle of the rows splits them, so that a large one fits on neither side."""
    low, middle = make_lora_weights(1, r=4), make_lora_weights(2, r=4)
    large = make_lora_weights(3, r=8)
    harness = Harness(tiny_geometry, [low, middle, large], max_loras=3, rows=11)
    harness.make_ready(low.generation)
    harness.bank.release(low.generation)
    pin(harness, middle.generation)
    harness.make_ready(large.generation)
    assert harness.bank.resident() == [large.generation]
    harness.bank.release(large.generation)
    pin(harness, middle.generation)
    assert pinned(harness) == {middle.generation}
    harness.tier.check()
    harness.bank.close()
