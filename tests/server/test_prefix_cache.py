"""The prefix cache: what is taken over was computed, whole, under the same weights and salt; answers stay the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_server.engine.engine import Engine
from loramux_server.engine.kv_cache import BlockManager
from loramux_server.engine.messages import AdapterRef, AddRequest, SamplingParams, TokenLogprobs
from loramux_server.engine.prefix_cache import digests
from loramux_server.engine.sequence import Sequence
from tests.server.support import EngineFactory, Recipe, request, run, step, tokens_of, write_adapter
from tests.server.test_parity import LOGPROB_BOUND

SIZE = 8
SHARED = [(11 * k) % 300 + 5 for k in range(70)]  # four blocks of 16, and a rest


def sequence(
    tokens: Iterable[int], *, adapter: str | None = None, salt: str | None = None, **params: int
) -> Sequence:
    ref = None if adapter is None else AdapterRef(adapter, f"/{adapter}")
    return Sequence("id", list(tokens), SamplingParams(max_tokens=9, cache_salt=salt, **params), ref)


def admitted(blocks: BlockManager, tokens: Iterable[int], **kwargs: str) -> Sequence:
    made = sequence(tokens, **kwargs)
    assert blocks.admit(made)
    return made


def compute(blocks: BlockManager, item: Sequence, count: int) -> None:
    start = item.num_computed
    item.num_computed += count
    blocks.publish(item, start)


def finished(blocks: BlockManager, tokens: Iterable[int], **kwargs: str) -> Sequence:
    """Admitted, computed whole, gone."""
    made = admitted(blocks, tokens, **kwargs)
    compute(blocks, made, made.num_pending)
    blocks.release(made)
    return made


# names


def test_a_name_stands_for_everything_before_it() -> None:
    plain = digests(sequence(range(40)), 5, SIZE)
    assert len(set(plain)) == 5
    assert digests(sequence(range(40)), 5, SIZE) == plain
    assert digests(sequence([*range(20), 99]), 2, SIZE) == plain[:2]
    early = digests(sequence([99, *range(1, 40)]), 5, SIZE)
    assert not set(early) & set(plain)
    late = digests(sequence([*range(39), 99]), 5, SIZE)
    assert late[:4] == plain[:4]
    assert late[4] != plain[4]


def test_equal_tokens_of_other_weights_or_salt_have_other_names() -> None:
    seeds = [
        (None, None),
        ("a", None),
        ("b", None),
        (None, "a"),
        ("a", "a"),
        ("a", '", null'),
        ('a", "a', None),
    ]
    names = {digests(sequence(range(8), adapter=a, salt=s), 1, SIZE)[0] for a, s in seeds}
    assert len(names) == len(seeds)


def test_names_go_on_over_the_answer() -> None:
    talking = sequence(range(12))
    digests(talking, 1, SIZE)
    talking.output = list(range(12, 20))
    assert digests(talking, 2, SIZE) == digests(sequence(range(20)), 2, SIZE)


# blocks


def test_whole_blocks_are_taken_over_but_never_the_last_token() -> None:
    blocks = BlockManager(16, SIZE)
    first = finished(blocks, range(24))
    assert (first.num_cached, blocks.num_used, blocks.num_cached) == (0, 0, 3)
    for length, cached in ((26, 24), (25, 24), (24, 16), (23, 16), (9, 8), (8, 0), (3, 0)):
        again = admitted(blocks, range(length))
        assert (again.num_computed, again.num_cached) == (cached, cached)
        blocks.check([again])
        blocks.release(again)
    assert blocks.num_used == 0


def test_only_computed_blocks_can_be_found() -> None:
    blocks = BlockManager(16, SIZE)
    slow = admitted(blocks, range(40))
    compute(blocks, slow, 20)
    other = admitted(blocks, range(40))
    assert other.num_computed == 16
    blocks.check([slow, other])
    blocks.release(slow)  # aborted in its prompt: the third block is half-filled
    assert blocks.num_cached == 0  # `other` holds both that are full
    assert admitted(blocks, range(40)).num_computed == 16


def test_a_block_filled_in_two_chunks_can_be_found() -> None:
    blocks = BlockManager(16, SIZE)
    slow = admitted(blocks, range(40))
    for count in (20, 1, 19):
        compute(blocks, slow, count)
    blocks.check([slow])
    assert admitted(blocks, range(41)).num_computed == 40


def test_the_end_of_a_prompt_goes_before_its_beginning() -> None:
    blocks = BlockManager(4, SIZE)
    finished(blocks, range(24))
    blocks.release(admitted(blocks, range(100, 116)))  # takes the free block and one of the prompt's
    assert admitted(blocks, range(24)).num_computed == 16


def test_shared_blocks_live_until_the_last_holder_goes() -> None:
    blocks = BlockManager(8, SIZE)
    finished(blocks, range(24))
    one, two = admitted(blocks, range(30)), admitted(blocks, range(28))
    assert one.blocks[:3] == two.blocks[:3]
    assert one.blocks[3] != two.blocks[3]
    assert blocks.num_used == 5
    blocks.release(one)
    blocks.check([two])
    assert blocks.num_used == 4
    assert not blocks.can_grow(two, 9 * SIZE)
    blocks.grow(two, 8 * SIZE)
    blocks.check([two])


def test_the_least_recently_used_go_first_and_ends_before_beginnings() -> None:
    blocks = BlockManager(6, SIZE)
    finished(blocks, range(24))
    finished(blocks, range(100, 116))
    finished(blocks, range(9))  # the first block of the first prompt is used again, one other is scratch
    assert blocks.num_cached == 5
    big = admitted(blocks, range(200, 217))  # takes the free block and evicts two
    blocks.check([big])
    blocks.release(big)
    assert admitted(blocks, range(24)).num_computed == 8
    assert admitted(blocks, range(100, 117)).num_computed == 16


def test_admission_does_not_count_what_it_takes_over_as_free() -> None:
    blocks = BlockManager(4, SIZE)
    finished(blocks, range(24))
    assert blocks.num_free == 4
    too_long = sequence(range(40))
    assert not blocks.admit(too_long)
    assert (too_long.blocks, too_long.num_computed, too_long.num_cached) == ([], 0, None)
    fits = admitted(blocks, range(32))
    assert fits.num_computed == 24
    assert blocks.num_free == 0


def test_check_notices_a_block_that_could_be_written_while_shared() -> None:
    blocks = BlockManager(8, SIZE)
    finished(blocks, range(24))
    one = admitted(blocks, range(30))
    blocks.check([one])
    one.num_computed = 20  # as if it went on inside its third block
    with pytest.raises(AssertionError, match="shared before it is full"):
        blocks.check([one])


def test_without_the_cache_nothing_is_kept() -> None:
    blocks = BlockManager(8, SIZE, prefix_caching=False)
    finished(blocks, range(24))
    assert blocks.num_cached == 0
    assert admitted(blocks, range(24)).num_computed == 0
    assert (blocks.queries, blocks.hits) == (0, 0)


def test_looked_up_and_found_tokens_are_counted_once_a_request() -> None:
    blocks = BlockManager(16, SIZE)
    finished(blocks, range(24))
    again = admitted(blocks, range(30))
    compute(blocks, again, again.num_pending)
    assert (blocks.queries, blocks.hits) == (54, 24)
    blocks.release(again)  # preempted
    again.num_computed = 0
    again.output = [7] * 10
    assert blocks.admit(again)
    assert again.num_computed == 24
    assert (blocks.queries, blocks.hits, again.num_cached) == (54, 24, 24)


def test_a_prompt_that_is_scored_finds_only_what_is_scored_already() -> None:
    blocks = BlockManager(16, SIZE)
    finished(blocks, range(40))
    scored = sequence(range(40), prompt_logprobs=0)
    assert scored.num_reusable == 0
    scored.prompt_scores = [TokenLogprobs(0.0, [])] * 20
    assert scored.num_reusable == 20
    scored.prompt_scores *= 2
    scored.prompt_scores.pop()
    assert scored.num_reusable == 39  # every score is there: as any other prompt
    assert sequence(range(40), prompt_logprobs=0).num_reusable == 0
    assert blocks.admit(sequence(range(40), prompt_logprobs=0))
    assert blocks.queries == 40  # of the first, which had no scores to make


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(["admit", "compute", "release"]), st.integers(1, 40)),
        max_size=60,
    )
)
def test_no_interleaving_shares_what_is_written_or_finds_what_was_not_computed(
    moves: list[tuple[int, str, int]],
) -> None:
    """A model of the bytes: every computed token writes its whole prefix to its place; what is found must read so."""
    blocks = BlockManager(10, SIZE)
    memory: dict[tuple[int, int], tuple[int, ...]] = {}
    running: dict[int, Sequence] = {}
    for slot, move, number in moves:
        held = running.get(slot)
        if move == "admit" and held is None:
            made = sequence([slot % 2, *([number % 3] * (number % 50))])  # few families: many begin alike
            if blocks.admit(made):
                running[slot] = made
                assert made.num_computed < made.num_tokens
        elif move == "compute" and held is not None:
            count = min(number, held.num_pending)
            for position in range(held.num_computed, held.num_computed + count):
                place = (held.blocks[position // SIZE], position % SIZE)
                memory[place] = tuple(held.prompt[: position + 1])
            compute(blocks, held, count)
        elif move == "release" and held is not None:
            blocks.release(running.pop(slot))
        for one in running.values():
            for position in range(one.num_computed):
                place = (one.blocks[position // SIZE], position % SIZE)
                assert memory[place] == tuple(one.prompt[: position + 1])
        blocks.check(list(running.values()))


# the engine


def cached(engine: Engine, item: AddRequest) -> tuple[int, list[int]]:
    """Tokens from the cache, and the answer."""
    outputs = run(engine, [(0, item)])[item.id]
    assert not any(output.cached_tokens for output in outputs[1:])
    return outputs[0].cached_tokens, tokens_of(outputs)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma2", "gemma3", "phi3"])
def test_answers_are_those_of_an_engine_without_the_cache(
    architecture: str, make_engine: EngineFactory, tmp_path: Path
) -> None:
    """Windows of 16 tokens included: the cache keeps all keys of such layers, too."""
    engine = make_engine(architecture)
    plain = make_engine(architecture, enable_prefix_caching=False)
    ref = write_adapter(tmp_path / "a", engine.base.geometry, Recipe(r=8, seed=1))
    tails = [[20 + i, 7, 33 + 2 * i] * (i + 1) for i in range(4)]
    requests = [request(f"r{i}", [*SHARED, *tails[i]], ref if i % 2 else None, logprobs=3) for i in range(4)]
    # In pairs: what the second finds must not depend on how fast an adapter was read.
    pairs = [[(0, requests[i]), (4, requests[i + 1])] for i in (0, 2)]
    ours, theirs = (
        {name: outputs for pair in pairs for name, outputs in run(one, pair).items()}
        for one in (engine, plain)
    )
    assert [ours[f"r{i}"][0].cached_tokens for i in range(4)] == [0, 0, 64, 64]
    assert not any(output.cached_tokens for outputs in theirs.values() for output in outputs)
    for item in requests:
        assert tokens_of(ours[item.id]) == tokens_of(theirs[item.id])
        for one, other in zip(ours[item.id], theirs[item.id], strict=True):
            assert one.logprobs is not None
            assert other.logprobs is not None
            expected = dict(other.logprobs[0].top)
            for token, value in one.logprobs[0].top:
                assert value == pytest.approx(expected[token], abs=LOGPROB_BOUND)
    engine.check_integrity()


def test_a_conversation_goes_on_from_its_own_answer(make_engine: EngineFactory) -> None:
    engine, plain = make_engine(), make_engine(enable_prefix_caching=False)
    _, answer = cached(engine, request("first", SHARED, max_tokens=30, ignore_eos=True))
    talk = [*SHARED, *answer, 9, 8, 7]
    count, more = cached(engine, request("second", talk))
    assert count == 96  # of 103; the answer's last token was never computed, so 99 could be there at most
    assert more == cached(plain, request("second", talk))[1]


def test_a_replaced_adapter_answers_with_its_new_weights(make_engine: EngineFactory, tmp_path: Path) -> None:
    engine, plain = make_engine(), make_engine(enable_prefix_caching=False)
    old, new = (
        write_adapter(tmp_path / str(seed), engine.base.geometry, Recipe(r=8, seed=seed)) for seed in (1, 2)
    )
    before = cached(engine, request("r", SHARED, old))
    after = cached(engine, request("r", SHARED, new))
    back = cached(engine, request("r", SHARED, old))
    assert (before[0], after[0], back[0]) == (0, 0, 64)
    assert before[1] == back[1] != after[1]
    assert after[1] == cached(plain, request("r", SHARED, new))[1]


def test_adapters_and_salts_share_nothing(make_engine: EngineFactory, tmp_path: Path) -> None:
    engine = make_engine()
    refs = [None]
    refs += [write_adapter(tmp_path / str(i), engine.base.geometry, Recipe(r=4, seed=i)) for i in range(2)]  # type: ignore[list-item]
    strangers = [
        request(f"{i}{salt}", SHARED, ref, cache_salt=salt)
        for i, ref in enumerate(refs)
        for salt in (None, "x", "y")
    ]
    assert [cached(engine, item)[0] for item in strangers] == [0] * 9
    assert [cached(engine, item)[0] for item in strangers] == [64] * 9
    engine.check_integrity()


def test_eviction_under_pressure_changes_no_answer(make_engine: EngineFactory) -> None:
    engine, plain = make_engine(num_blocks=12), make_engine(enable_prefix_caching=False)
    prompts = [[*SHARED[:40], *range(5 + i, 25 + i)] for i in range(6)]
    requests = [
        (number, request(f"r{number}", prompts[number * 5 % 6], max_tokens=12)) for number in range(12)
    ]
    ours, theirs = run(engine, requests), run(plain, requests)
    for name, outputs in theirs.items():
        assert tokens_of(ours[name]) == tokens_of(outputs)
    engine.check_integrity()
    assert engine.blocks.hits > 0
    assert engine.blocks.num_used == 0
    assert engine.blocks.num_free == 12
    stats = engine.stats()
    assert 0 < stats.kv_blocks_cached <= 12
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (12 * 60, engine.blocks.hits)


def test_an_abort_in_the_prompt_leaves_whole_blocks_only(make_engine: EngineFactory) -> None:
    engine = make_engine(max_num_batched_tokens=40)
    engine.add(request("gone", SHARED))
    step(engine)
    engine.abort("gone")
    engine.check_integrity()
    assert engine.blocks.num_cached == 2  # 40 tokens are two blocks and a half
    count, answer = cached(engine, request("r", SHARED))
    assert count == 32
    assert answer == cached(make_engine(enable_prefix_caching=False), request("r", SHARED))[1]


def test_scored_prompts_are_computed_whole(make_engine: EngineFactory) -> None:
    engine = make_engine()
    cached(engine, request("plain", SHARED))
    (output,) = run(engine, [(0, request("scored", SHARED, prompt_logprobs=1, max_tokens=1))])["scored"]
    assert output.cached_tokens == 0
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(SHARED) - 1


def test_the_preempted_find_their_own_blocks(make_engine: EngineFactory) -> None:
    """12 blocks for two that want 9 each: the younger one gives way, and loses only what is really needed."""
    prompts = {"old": [(7 * k) % 300 + 5 for k in range(60)], "young": SHARED[:60]}
    arrivals = [
        (0, request(name, prompt, max_tokens=80, ignore_eos=True)) for name, prompt in prompts.items()
    ]
    computed, answers = {}, {}
    for caching in (True, False):
        engine = make_engine(num_blocks=12, enable_prefix_caching=caching)
        for _, item in arrivals:
            engine.add(item)
        total, tokens = 0, {name: list[int]() for name in prompts}
        while engine.has_work:
            output = step(engine)
            total += output.stats.batch_tokens
            for one in output.outputs:
                tokens[one.id] += one.tokens
                assert one.cached_tokens == 0  # nothing was there when they came
        assert engine.scheduler.preemptions > 0
        computed[caching], answers[caching] = total, tokens
    assert answers[True] == answers[False]
    assert computed[True] < computed[False]
