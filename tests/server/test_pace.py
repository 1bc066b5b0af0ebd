"""How much of long prompts goes beside streams: what their steps took decides, on machines made of a formula."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_server.engine.pace import Mix, PromptPace

LEAST, MOST = 16, 256
Machine = Callable[[Mix], float]  # seconds of a step


def machine(*, decoding: float = 30.0, more: float = 0.5, each: float = 0.4, host: float = 4.0) -> Machine:
    """Milliseconds of a step that only decodes, of each stream in it, of each token of a prompt, of steps with prompts."""

    def took(mix: Mix) -> float:
        prompts = mix.long + mix.other
        return 1e-3 * (decoding + more * mix.decoding + each * prompts + (host if prompts else 0.0))

    return took


def run(pace: PromptPace, machine: Machine, streams: int, steps: int, noise: float = 0.0) -> list[Mix]:
    """Long prompts without end beside so many streams; what each step was made of."""
    chance = Random(0)
    mixes = []
    for _ in range(steps):
        mix = Mix(streams, pace.tokens(streams), 0)
        pace.took(mix, machine(mix) * (1 + noise * chance.random()))
        mixes.append(mix)
    return mixes


def known(streams: int, machine: Machine) -> PromptPace:
    """Of streams that talked before the prompt came."""
    pace = PromptPace(LEAST, MOST)
    for _ in range(3):
        pace.took(Mix(streams, 0, 0), machine(Mix(streams, 0, 0)))
    return pace


@given(
    streams=st.integers(1, 64),
    decoding=st.floats(20, 80),
    each=st.floats(0.05, 1.0),
    noise=st.sampled_from([0.0, 0.1]),
)
def test_no_step_takes_more_than_twice_as_long(
    streams: int, decoding: float, each: float, noise: float
) -> None:
    this = machine(decoding=decoding, each=each, host=2.0)
    alone = this(Mix(streams, 0, 0))
    for mix in run(known(streams, this), this, streams, 100, noise):
        assert mix.long in (0, LEAST) or this(mix) < 2 * alone
        assert mix.long <= MOST


def test_prompts_get_all_that_fits() -> None:
    this = machine()
    mixes = run(known(8, this), this, 8, 100)
    parts = [mix.long for mix in mixes if mix.long]
    assert mixes[0].long == LEAST  # of unknown cost
    usual, alone = round(median(parts)), this(Mix(8, 0, 0))
    assert usual % LEAST == 0
    assert this(Mix(8, usual, 0)) < 2 * alone < this(Mix(8, usual + LEAST, 0)) + 0.2 * alone


@pytest.mark.parametrize(("each", "expected"), [(0.001, MOST), (0.0, MOST), (9.0, LEAST)])
def test_what_costs_nothing_or_too_much(each: float, expected: int) -> None:
    this = machine(each=each, host=0.0)
    assert {mix.long for mix in run(known(8, this), this, 8, 50)[1:]} == {expected, 0}


def test_now_and_then_a_step_only_decodes() -> None:
    this = machine()
    mixes = run(known(8, this), this, 8, 170)
    places = [number for number, mix in enumerate(mixes) if mix.long == 0]
    assert places == list(range(16, 170, 17))


def test_streams_that_talk_between_two_prompts_say_how_long_that_takes() -> None:
    this = machine()
    pace = known(8, this)
    run(pace, this, 8, 10)
    pace.took(Mix(8, 0, 0), this(Mix(8, 0, 0)))
    assert [mix.long > 0 for mix in run(pace, this, 8, 17)] == [True] * 16 + [False]


def test_what_decoding_takes_now_counts() -> None:
    """Its contexts grow, or another program takes half of the machine."""
    slow = machine(decoding=90.0)
    pace = known(8, machine())
    before = run(pace, machine(), 8, 40)[-1].long
    after = run(pace, slow, 8, 120)[-1].long
    assert after > 1.5 * before
    assert slow(Mix(8, after, 0)) < 2 * slow(Mix(8, 0, 0))


def test_other_numbers_of_streams_are_other_steps() -> None:
    this = machine(more=4.0)
    pace = known(40, this)
    beside_many = run(pace, this, 40, 40)[-1].long
    changed = run(pace, this, 2, 4)
    assert [mix.long == 0 for mix in changed] == [True, False, False, False]
    assert changed[-1].long < beside_many / 2
    assert pace.tokens(3) == 0


def test_it_goes_on_where_no_step_only_decodes() -> None:
    """Short prompts in every step, and streams of which nothing is known."""
    pace = PromptPace(LEAST, MOST)
    found = []
    for _ in range(6):
        found.append(pace.tokens(8))
        pace.took(Mix(8, found[-1], 100), 1.0)
    assert found == [MOST, 0, MOST, 0, MOST, 0]


def test_a_single_slow_step_changes_nothing() -> None:
    this = machine()
    pace = known(8, this)
    usual = run(pace, this, 8, 40)[-1].long
    pace.took(Mix(8, 0, 0), 10.0)
    pace.took(Mix(8, usual, 0), 10.0)
    assert pace.tokens(8) == usual


def test_no_more_than_there_is() -> None:
    """Limits smaller than what is worth a step."""
    pace = PromptPace(128, 8)
    pace.took(Mix(1, 0, 0), 0.01)
    assert pace.tokens(1) == 8
