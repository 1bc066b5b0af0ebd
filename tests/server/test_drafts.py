"""Drafts on paper: what is proposed, how the setting is read, who gets drafts in a step, and what they cost others."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.errors import ConfigError
from loramux_server.config import read_config
from loramux_server.engine import drafts as drafts_module
from loramux_server.engine.drafts import Drafter, PromptLookup
from loramux_server.engine.kv_cache import BlockManager
from loramux_server.engine.messages import SamplingParams
from loramux_server.engine.options import SpeculativeConfig
from loramux_server.engine.pace import PromptPace
from loramux_server.engine.scheduler import Scheduler, SchedulerLimits
from loramux_server.engine.sequence import Scheduled, Sequence
from tests.server.test_scheduler import BLOCK, FakeResidency


def config(tokens: int = 4, longest: int = 3, shortest: int = 2) -> SpeculativeConfig:
    return SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=tokens,
        prompt_lookup_max=longest,
        prompt_lookup_min=shortest,
    )


def lookup(tokens: SequenceOf[int], *, chosen: SpeculativeConfig | None = None) -> PromptLookup:
    made = PromptLookup(chosen or config())
    made.extend(tokens)
    return made


# --- what is proposed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2], [3, 4, 5, 6]),
        ([1, 2, 3, 4, 5, 6, 7, 8, 2], []),  # one token is not enough
        ([1, 2, 3, 4, 5], []),
        ([], []),
        ([7], []),
        ([9, 1, 2, 30, 8, 1, 2, 40, 9, 1, 2], [30, 8, 1, 2]),  # the longer match, though an older one
        ([8, 1, 2, 30, 7, 8, 1, 2, 40, 9, 8, 1, 2], [40, 9, 8, 1]),  # of equal ones the latest
        ([5, 6, 5, 6, 5, 6], [5, 6, 5, 6]),  # a match that runs into its own end repeats itself
        ([3, 3, 3], [3, 3, 3, 3]),
    ],
)
def test_what_followed_the_last_tokens_before(tokens: list[int], expected: list[int]) -> None:
    assert lookup(tokens).propose(10) == expected
    assert lookup(tokens).propose(2) == expected[:2]
    assert lookup(tokens).propose(0) == []


def by_rescan(tokens: list[int], count: int, longest: int, shortest: int) -> list[int]:
    """The longest match, the latest of those, found by looking everywhere."""
    for length in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                period = len(tokens) - end
                return [tokens[end + offset % period] for offset in range(count)]
    return []


@settings(deadline=None, max_examples=300)
@given(
    tokens=st.lists(st.integers(0, 3), max_size=40),
    cut=st.integers(0, 40),
    shortest=st.integers(1, 3),
    more=st.integers(0, 3),
)
def test_the_index_finds_what_a_search_finds(tokens: list[int], cut: int, shortest: int, more: int) -> None:
    made = PromptLookup(config(5, shortest + more, shortest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafts_module, "_CANDIDATES", 100)
        made.extend(tokens[:cut])
        made.propose(5)
        made.extend(tokens[cut:])
        assert made.propose(5) == by_rescan(tokens, 5, shortest + more, shortest)


def test_the_search_is_bounded() -> None:
    """The only long match is behind more short ones than are looked at: the latest short one is taken."""
    short = [1, 2, 50] * drafts_module._CANDIDATES
    assert lookup([9, 1, 2, 77, *short, 9, 1, 2]).propose(1) == [50]
    assert lookup([9, 1, 2, 77, *short[3:], 9, 1, 2]).propose(1) == [77]


def test_fewer_after_wrong_drafts_and_more_after_right_ones() -> None:
    made = lookup([4, 5] * 20, chosen=config(8))
    assert len(made.propose(99)) == 8
    made.verified(8, 3)
    assert len(made.propose(99)) == 3
    made.verified(3, 0)
    assert len(made.propose(99)) == 1
    for proposed, then in ((1, 2), (2, 4), (4, 8), (8, 8)):
        made.verified(proposed, proposed)
        assert len(made.propose(99)) == then


# --- who gets them -----------------------------------------------------------------------------------------------------


class Anything:
    """A grammar that allows everything."""

    is_ready = True
    error = ""

    def allowed(self) -> bytes:
        return b""

    def accept(self, token: int) -> None: ...


def repeating(name: str, prompt: int = 12, answer: int = 100) -> Sequence:
    return Sequence(name, [1, 2, 3] * (prompt // 3), SamplingParams(max_tokens=answer))


def stepped(scheduler: Scheduler, *, right: bool = True) -> list[Scheduled]:
    """One step of an engine whose model goes on with 1, 2, 3; if not `right`, drafts are thrown away all the same."""
    plan = scheduler.schedule().scheduled
    for item in plan:
        sequence = item.sequence
        samples, start = item.samples, sequence.num_computed
        more = 1 + (len(item.drafts) if right else 0) if samples else 0
        for _ in range(more):
            sequence.output.append(sequence.num_tokens % 3 + 1)
        sequence.num_computed += item.num_known + max(0, more - 1)
        scheduler.blocks.publish(sequence, start)
        scheduler.blocks.trim(sequence)
        if len(sequence.output) >= sequence.params.max_tokens:
            scheduler.finish(sequence)
    scheduler.blocks.check(scheduler.running)
    return plan


def make_scheduler(
    *sequences: Sequence,
    blocks: int = 64,
    step_tokens: int = 16,
    drafts: int = 4,
    budget: int = 64,
    caching: bool = False,  # prompts all begin alike
) -> Scheduler:
    made = Scheduler(
        SchedulerLimits(8, budget),
        BlockManager(blocks, BLOCK, prefix_caching=caching),
        FakeResidency(),
        PromptPace(0, 0),
        Drafter(config(drafts), step_tokens),
    )
    for sequence in sequences:
        made.add(sequence)
    return made


def drafted(plan: list[Scheduled]) -> dict[str, int]:
    return {item.sequence.id: len(item.drafts) for item in plan}


def test_a_decoding_sequence_gets_drafts_and_a_prompt_does_not() -> None:
    scheduler = make_scheduler(repeating("a"))
    assert drafted(stepped(scheduler)) == {"a": 0}
    [item] = stepped(scheduler)
    assert (item.count, item.num_known, item.drafts) == (5, 1, [2, 3, 1, 2])
    assert item.sequence.num_pending == 1


def test_no_more_drafts_than_the_answer_may_have_tokens() -> None:
    scheduler = make_scheduler(repeating("a", answer=4), repeating("b", answer=1))
    stepped(scheduler)
    assert drafted(stepped(scheduler)) == {
        "a": 2
    }  # one was drawn; two drafts and the token behind them are the rest
    assert not scheduler.has_work


def test_a_grammar_keeps_drafts_away() -> None:
    strict = repeating("strict")
    strict.constraint = Anything()
    scheduler = make_scheduler(strict, repeating("free"))
    stepped(scheduler)
    assert drafted(stepped(scheduler)) == {"strict": 0, "free": 4}


def test_fewer_drafts_the_more_sequences_decode() -> None:
    scheduler = make_scheduler(*(repeating(f"r{n}") for n in range(5)), step_tokens=16)
    stepped(scheduler)
    assert list(drafted(stepped(scheduler)).values()) == [3, 2, 2, 2, 2]
    crowd = make_scheduler(*(repeating(f"r{n}") for n in range(8)), step_tokens=8)
    stepped(crowd)
    assert set(drafted(stepped(crowd)).values()) == {0}


def test_what_one_does_not_use_goes_to_the_others() -> None:
    plain = Sequence("plain", list(range(100, 112)), SamplingParams(max_tokens=50))
    scheduler = make_scheduler(plain, repeating("a"), step_tokens=6)
    stepped(scheduler)
    assert drafted(stepped(scheduler)) == {"plain": 0, "a": 4}


def test_prompts_go_before_drafts() -> None:
    scheduler = make_scheduler(repeating("a"), budget=32, step_tokens=32)
    stepped(scheduler)
    scheduler.add(repeating("long", prompt=60))
    assert drafted(stepped(scheduler)) == {"a": 0, "long": 0}
    assert {item.sequence.id: item.count for item in stepped(scheduler)} == {"a": 3, "long": 29}


@pytest.mark.parametrize("right", [True, False])
def test_drafts_take_no_block_from_anybody(right: bool) -> None:
    """Four sequences need more blocks than there are: nothing but what they hold for good may push one out."""

    def preemptions(drafts: int) -> tuple[int, int]:
        sequences = [repeating(f"r{n}", prompt=12, answer=30) for n in range(4)]
        scheduler = make_scheduler(*sequences, blocks=9, drafts=drafts, step_tokens=16 if drafts else 0)
        seen = 0
        while scheduler.has_work:
            plan = stepped(scheduler, right=right)
            seen += sum(len(item.drafts) for item in plan)
            for item in plan:
                assert scheduler.blocks.blocks_for(item.sequence.num_tokens) >= len(item.sequence.blocks)
        assert scheduler.blocks.num_used == 0
        return scheduler.preemptions, seen

    plain, none = preemptions(0)
    with_drafts, some = preemptions(4)
    assert none == 0 < plain
    assert some > 0
    assert with_drafts <= plain


def test_without_a_free_block_a_sequence_decodes_on_without_drafts() -> None:
    scheduler = make_scheduler(repeating("a", prompt=15), blocks=2)
    stepped(scheduler)  # 15 and one drawn: the drafts would need a third block
    assert drafted(stepped(scheduler)) == {"a": 0}
    assert scheduler.preemptions == 0


def test_a_step_without_memory_leaves_drafts_out_first() -> None:
    sequence = repeating("a")
    sequence.num_computed = sequence.num_tokens - 1
    smaller = Scheduled(sequence, 4, [2, 3, 1]).smaller()
    assert smaller == Scheduled(sequence, 1)
    assert smaller.smaller() is None
    sequence.num_computed = 0
    assert Scheduled(sequence, 9).smaller() == Scheduled(sequence, 4)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    blocks=st.integers(8, 20),
    step_tokens=st.integers(0, 40),
    drafts=st.integers(1, 20),
    caching=st.booleans(),
)
def test_no_block_is_lost_whatever_comes_and_goes(
    seed: int, blocks: int, step_tokens: int, drafts: int, caching: bool
) -> None:
    """Arrivals, aborts, right and wrong drafts, preemption; `stepped` checks the blocks after each step."""
    rng = random.Random(seed)
    scheduler = make_scheduler(
        blocks=blocks, step_tokens=step_tokens, drafts=drafts, budget=24, caching=caching
    )
    alive: list[Sequence] = []
    for number in range(60):
        if rng.random() < 0.3:
            alive.append(repeating(str(number), prompt=rng.randrange(3, 30), answer=rng.randrange(1, 30)))
            scheduler.add(alive[-1])
        if alive and rng.random() < 0.1:
            scheduler.finish(alive.pop(rng.randrange(len(alive))))
        for item in stepped(scheduler, right=rng.random() < 0.6):
            assert len(item.drafts) <= drafts
        alive = [one for one in alive if one in scheduler.running or one in set(scheduler.waiting)]
    for _ in range(2000):
        if not scheduler.has_work:
            break
        stepped(scheduler)
    assert not scheduler.has_work
    assert scheduler.blocks.num_used == 0


# --- the setting -------------------------------------------------------------------------------------------------------


def test_the_setting_is_vllms_json(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_config(["m"]).speculative_config is None
    given = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 2}'
    assert read_config(["m", "--speculative-config", given]).speculative_config == config()
    monkeypatch.setenv("LORAMUX_SPECULATIVE_CONFIG", given)
    assert read_config(["m"]).speculative_config == config()


@pytest.mark.parametrize(
    ("bounds", "window"),
    [
        ({}, (5, 5)),
        ({"prompt_lookup_max": 3}, (3, 3)),
        ({"prompt_lookup_min": 2}, (2, 2)),
        ({"prompt_lookup_max": 4, "prompt_lookup_min": 1}, (1, 4)),
    ],
)
def test_what_is_looked_up_by_default(bounds: dict[str, int], window: tuple[int, int]) -> None:
    assert SpeculativeConfig(method="ngram", num_speculative_tokens=1, **bounds).window == window


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("ngram", "give a JSON object such as"),
        ("[]", "Expected `object`, got `array`"),
        ('{"method": "eagle", "num_speculative_tokens": 4}', "Invalid enum value 'eagle' - at `$.method`"),
        ('{"method": "ngram"}', "missing required field `num_speculative_tokens`"),
        ('{"num_speculative_tokens": 4}', "missing required field `method`"),
        ('{"method": "ngram", "num_speculative_tokens": 0}', ">= 1 - at `$.num_speculative_tokens`"),
        ('{"method": "ngram", "num_speculative_tokens": 65}', "<= 64 - at `$.num_speculative_tokens`"),
        ('{"method": "ngram", "num_speculative_tokens": "4"}', "got `str` - at `$.num_speculative_tokens`"),
        ('{"method": "ngram", "num_speculative_tokens": 4, "model": "m"}', "unknown field `model`"),
        (
            '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 3}',
            "prompt_lookup_min: 3 must not be more than prompt_lookup_max, 2",
        ),
    ],
)
def test_a_wrong_setting_is_named(given: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(["m", "--speculative-config", given])
    assert caught.value.param == "speculative_config"
    assert str(caught.value).startswith("speculative_config: ")
    assert sentence in str(caught.value)
