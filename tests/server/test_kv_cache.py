"""KV blocks on paper: one owner or free, the right number for any length, and a leak is noticed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_server.engine.kv_cache import BlockManager
from loramux_server.engine.messages import SamplingParams
from loramux_server.engine.sequence import Scheduled, Sequence


def sequence(prompt: int = 1, output: int = 0) -> Sequence:
    made = Sequence("id", list(range(prompt)), SamplingParams(max_tokens=1))
    made.output = list(range(100, 100 + output))
    return made


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockManager(10, 16).blocks_for(tokens) == blocks


def test_grow_gives_only_what_is_missing() -> None:
    blocks = BlockManager(4, 16)
    one, two = sequence(), sequence()
    blocks.grow(one, 17)
    assert blocks.num_used == 2
    blocks.grow(one, 32)
    assert blocks.num_used == 2
    assert blocks.can_grow(two, 32)
    assert not blocks.can_grow(two, 33)
    assert blocks.can_grow(one, 64)
    blocks.grow(one, 64)
    assert not blocks.can_grow(two, 1)
    assert blocks.can_grow(two, 0)
    blocks.check([one, two])


def test_released_blocks_are_used_again_first() -> None:
    blocks = BlockManager(8, 16)
    one, two = sequence(), sequence()
    blocks.grow(one, 40)
    mine = list(one.blocks)
    blocks.release(one)
    assert one.blocks == []
    blocks.grow(two, 40)
    assert two.blocks == mine


def test_check_notices_a_leak_and_a_double_owner() -> None:
    blocks = BlockManager(4, 16)
    one, two = sequence(), sequence()
    blocks.grow(one, 32)
    with pytest.raises(AssertionError, match="0 owned, 2 free of 4"):
        blocks.check([two])
    two.blocks = list(one.blocks)
    with pytest.raises(AssertionError, match="leaked"):
        blocks.check([one, two])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), max_size=40))
def test_any_interleaving_leaks_nothing(moves: list[tuple[int, int]]) -> None:
    """Grow a sequence to a length if that fits, release it if the length is 0."""
    blocks = BlockManager(12, 8)
    sequences = [sequence() for _ in range(4)]
    for index, tokens in moves:
        if tokens == 0:
            blocks.release(sequences[index])
        elif blocks.can_grow(sequences[index], tokens):
            blocks.grow(sequences[index], tokens)
            assert len(sequences[index].blocks) * 8 >= tokens
        blocks.check(sequences)
        assert blocks.num_used == sum(len(s.blocks) for s in sequences)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 9), st.data())
def test_tokens_are_prompt_then_output(prompt: int, output: int, data: st.DataObject) -> None:
    made = sequence(prompt, output)
    start = data.draw(st.integers(0, made.num_tokens))
    stop = data.draw(st.integers(start, made.num_tokens))
    assert made.tokens(start, stop) == (made.prompt + made.output)[start:stop]


def test_what_is_pending_and_what_samples() -> None:
    made = sequence(10, 0)
    made.num_computed = 4
    assert made.num_pending == 6
    assert not Scheduled(made, 5).samples
    assert Scheduled(made, 6).samples
    made.num_computed = 10
    made.output.append(7)
    assert made.num_pending == 1
    assert Scheduled(made, 1).samples
