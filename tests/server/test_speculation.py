"""Answers are the same tokens with drafts and without, whatever shares the batch; what is drawn keeps its distribution."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramux_server.engine.drafts import PromptLookup, num_kept
from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import AdapterRef, AddRequest, TokenOutput
from loramux_server.engine.options import SpeculativeConfig
from loramux_server.engine.sampler import Sampling
from loramux_server.engine.sequence import Draw, Scheduled
from tests.server.support import (
    EngineFactory,
    Recipe,
    crowded_engine,
    request,
    run,
    step,
    tokens_of,
    write_adapter,
)
from tests.server.test_sampler import logits_row, reference, sequence

NGRAM = SpeculativeConfig(method="ngram", num_speculative_tokens=5, prompt_lookup_max=3, prompt_lookup_min=1)


def repetitive(seed: int, length: int) -> list[int]:
    """A few phrases over and over, so that something is always found."""
    rng = random.Random(seed)
    phrases = [[rng.randrange(5, 300) for _ in range(rng.randrange(2, 7))] for _ in range(3)]
    tokens: list[int] = []
    while len(tokens) < length:
        tokens += rng.choice(phrases)
    return tokens[:length]


def mixed(refs: list[AdapterRef], **params: Any) -> list[tuple[int, AddRequest]]:
    """Prompts of many lengths on the base and the adapters, arriving while others decode."""
    who = [None, *refs, None, *refs]
    chosen = {"max_tokens": 40, "ignore_eos": True, **params}
    return [(3 * i, request(f"r{i}", repetitive(i, 11 + 13 * i), ref, **chosen)) for i, ref in enumerate(who)]


def adapters(engine: Engine, directory: Path) -> list[AdapterRef]:
    return [
        write_adapter(directory / str(n), engine.base.geometry, Recipe(r=8, seed=n, scale=0.2))
        for n in range(3)
    ]


def counts(engine: Engine) -> tuple[int, int, int]:
    drawn = engine.stats().spec_decode
    assert drawn is not None
    return drawn.num_drafts, drawn.num_draft_tokens, drawn.num_accepted_tokens


def tokens_by_name(answers: dict[str, list[TokenOutput]]) -> dict[str, list[int]]:
    return {name: tokens_of(outputs) for name, outputs in answers.items()}


def logprobs_of(outputs: list[TokenOutput]) -> list[float]:
    return [one.logprob for output in outputs for one in output.logprobs or []]


def top_of(outputs: list[TokenOutput]) -> list[float]:
    return [value for output in outputs for one in output.logprobs or [] for _, value in one.top]


TIGHT = {"num_blocks": 22, "max_num_seqs": 5}
CHUNKS = {"max_num_batched_tokens": 17}
ADJUSTED = {"logprobs": 2, "repetition_penalty": 1.05, "frequency_penalty": 0.02, "logit_bias": {9: 0.5}}
SEEDED = {"temperature": 0.1, "seed": 11, "top_p": 0.95}


@pytest.mark.parametrize(
    ("options", "params"),
    [({}, {}), (TIGHT | CHUNKS, {}), (TIGHT, ADJUSTED), (CHUNKS, SEEDED)],
    ids=["greedy", "greedy-preempted-chunked", "adjusted-preempted", "seeded-chunked"],
)
def test_the_tokens_are_those_without_drafts(
    make_engine: EngineFactory, tmp_path: Path, options: dict[str, int], params: dict[str, Any]
) -> None:
    plain = make_engine(**options)
    wanted = mixed(adapters(plain, tmp_path), **params)
    expected = run(plain, wanted)
    engine = make_engine(speculative_config=NGRAM, **options)
    answers = run(engine, wanted)
    assert tokens_by_name(answers) == tokens_by_name(expected)
    made, proposed, accepted = counts(engine)
    assert made > 10
    assert 0 < accepted < proposed  # both ways were taken
    if "num_blocks" in options:
        assert engine.scheduler.preemptions > 0
    for name, outputs in answers.items():
        scores = logprobs_of(outputs)
        assert len(scores) == (40 if "logprobs" in params else 0)
        assert scores == pytest.approx(logprobs_of(expected[name]), abs=2e-4)
    engine.check_integrity()
    assert engine.blocks.num_used == 0


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])  # sliding windows; capped scores
def test_windows_see_what_they_saw(make_engine: EngineFactory, architecture: str) -> None:
    wanted = [
        (i, request(f"r{i}", repetitive(i, 60 + 13 * i), max_tokens=40, ignore_eos=True, logprobs=5))
        for i in range(2)
    ]
    expected = run(make_engine(architecture), wanted)
    engine = make_engine(architecture, speculative_config=NGRAM)
    answers = run(engine, wanted)
    assert tokens_by_name(answers) == tokens_by_name(expected)
    for name, outputs in answers.items():
        assert top_of(outputs) == pytest.approx(top_of(expected[name]), abs=2e-4)
    assert counts(engine)[2] > 0


def right_drafts(answers: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft is what will come: a request's answer is found by its prompt."""

    def propose(self: PromptLookup, most: int) -> list[int]:
        tokens = tuple(self._tokens)
        for whole in map(tuple, answers.values()):
            if whole[: len(tokens)] == tokens:
                return list(whole[len(tokens) : len(tokens) + min(most, 5)])
        return []

    monkeypatch.setattr(PromptLookup, "propose", propose)


def test_right_drafts_come_many_a_step_and_end_where_the_answer_ends(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end token among the drafts, max_tokens, min_tokens: the same tokens, fewer steps, the same finish."""
    prompt = repetitive(1, 30)
    plain = make_engine()
    free = tokens_of(run(plain, [(0, request("a", prompt, max_tokens=33, ignore_eos=True))])["a"])
    stop = next(token for place, token in enumerate(free) if place >= 9 and token not in free[:place])
    cases: list[dict[str, Any]] = [
        {"max_tokens": 33},
        {"max_tokens": 7},
        {"max_tokens": 33, "stop_token_ids": (stop,)},
        {"max_tokens": 33, "stop_token_ids": (stop,), "min_tokens": 20},
    ]
    for case in cases:
        wanted = [(0, request("a", prompt, **{"ignore_eos": True, **case}))]
        expected = run(plain, wanted)["a"]
        whole = {"a": [*prompt, *tokens_of(expected)]}
        engine = make_engine(speculative_config=NGRAM)
        with monkeypatch.context() as patch:
            right_drafts(whole, patch)
            answer = run(engine, wanted)["a"]
        assert tokens_of(answer) == tokens_of(expected)
        assert [output.finish for output in answer[:-1]] == [None] * (len(answer) - 1)
        assert answer[-1].finish == expected[-1].finish
        assert len(answer) <= 1 + math.ceil(len(expected) / 6) + 1
        _, proposed, accepted = counts(engine)
        assert accepted == proposed
        assert engine.blocks.num_used == 0


def test_wrong_drafts_are_in_no_published_block(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second request takes over what the first left in the prefix cache, and answers as if there were none."""
    prompt = repetitive(2, 40)
    clean = tokens_of(
        run(
            make_engine(enable_prefix_caching=False),
            [(0, request("a", prompt, max_tokens=40, ignore_eos=True))],
        )["a"]
    )
    engine = make_engine(speculative_config=NGRAM)
    monkeypatch.setattr(PromptLookup, "propose", lambda self, most: [7, 8, 9, 10, 11][:most])
    first = tokens_of(run(engine, [(0, request("a", prompt, max_tokens=40, ignore_eos=True))])["a"])
    assert first == clean
    assert counts(engine)[1] > counts(engine)[2]
    longer = [*prompt, *clean[:30]]
    second = run(engine, [(0, request("b", longer, max_tokens=10, ignore_eos=True))])["b"]
    assert second[0].cached_tokens == 64
    assert tokens_of(second) == clean[30:]


def test_drafts_that_are_not_finite_end_no_answer(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a right draft whose own row is not finite, the tokens before it are kept and the next step comes back."""
    engine = make_engine(speculative_config=NGRAM)
    prompt = repetitive(3, 30)
    expected = tokens_of(run(make_engine(), [(0, request("a", prompt, max_tokens=30, ignore_eos=True))])["a"])
    real = engine.runner.run
    poisoned = 0

    def attempt(scheduled: list[Scheduled]) -> torch.Tensor:
        nonlocal poisoned
        logits = real(scheduled)
        if len(logits) > 1:
            poisoned += 1
            logits = logits.clone()
            logits[1:] = math.nan
        return logits

    engine.runner.run = attempt  # type: ignore[assignment,method-assign]
    right_drafts({"a": [*prompt, *expected]}, monkeypatch)
    answer = run(engine, [(0, request("a", prompt, max_tokens=30, ignore_eos=True))])["a"]
    assert tokens_of(answer) == expected
    assert poisoned == 28  # all steps but the prompt's and the last, which has no room for drafts


def test_a_step_without_memory_drops_its_drafts(make_engine: EngineFactory) -> None:
    wanted = mixed([])
    expected = run(make_engine(), wanted)
    engine = make_engine(speculative_config=NGRAM)
    real, refused = engine.runner.run, 0

    def attempt(scheduled: list[Scheduled]) -> torch.Tensor:
        nonlocal refused
        if any(item.drafts for item in scheduled):
            refused += 1
            raise MemoryError
        return real(scheduled)

    engine.runner.run = attempt  # type: ignore[assignment,method-assign]
    assert tokens_by_name(run(engine, wanted)) == tokens_by_name(expected)
    assert refused > 10
    assert counts(engine) == (0, 0, 0)
    engine.check_integrity()


def test_without_the_setting_there_is_nothing(make_engine: EngineFactory) -> None:
    engine = make_engine()
    engine.add(request("a", repetitive(0, 30)))
    for _ in range(5):
        assert [len(output.tokens) for output in step(engine).outputs] == [1]
    assert engine.sequences["a"].lookup is None
    assert engine.stats().spec_decode is None


_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 60), st.integers(0, 2), st.integers(1, 25)),
        st.integers(0, 15).map(lambda n: f"r{n}"),
        st.just(None),
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def crowded(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, list[AdapterRef]]:
    """Two slots for three adapters."""
    engine = crowded_engine(tiny_model, lora_rows=16, speculative_config=NGRAM)
    return engine, adapters(engine, tmp_path_factory.mktemp("adapters"))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=_EVENTS)
def test_no_interleaving_leaks(crowded: tuple[Engine, list[AdapterRef]], events: list[Any]) -> None:
    engine, refs = crowded
    open_requests: dict[str, int] = {}
    added = 0

    def checked_step() -> None:
        for output in step(engine).outputs:
            assert output.error is None
            open_requests[output.id] -= len(output.tokens)
            assert open_requests[output.id] >= 0
            if output.finish:
                del open_requests[output.id]
        engine.check_integrity()
        for one in engine.scheduler.running:  # refused drafts hand their blocks back in the same step
            assert len(one.blocks) <= engine.blocks.blocks_for(one.num_tokens)

    for event in events:
        if isinstance(event, str):
            engine.abort(event)
            open_requests.pop(event, None)
        elif event is not None:
            length, adapter, count = event
            ref = refs[adapter - 1] if adapter else None
            engine.add(request(f"r{added}", repetitive(length % 3, length), ref, max_tokens=count))
            open_requests[f"r{added}"] = count
            added += 1
        else:
            checked_step()
    for _ in range(10_000):
        if not engine.has_work:
            break
        checked_step()
    assert not open_requests
    assert engine.blocks.num_used == 0
    assert all(slot.references == 0 for slot in engine.bank.tier.slots.values())


# --- distribution ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"top_k": 8}, {"top_p": 0.9}, {"min_p": 0.05, "temperature": 1.3}])
@pytest.mark.parametrize("draft", ["likely", "unlikely"])
def test_what_is_taken_has_the_distribution_without_drafts(params: dict[str, Any], draft: str) -> None:
    """Two tokens, the second given the first, over fixed seeds, against the reference's probabilities; chi-square.

    The "model" is a table: the logits of the second token depend on the first one. A draft of the first token is right
    as often as it is likely, and then its row gives the second; else the second comes from a step of its own.
    """
    vocab, count = 8, 2500
    first, second = logits_row(5, 1.5, vocab), [logits_row(50 + token, 1.5, vocab) for token in range(vocab)]
    expected_first = reference(first, sequence(**params))
    ranked = sorted(expected_first, key=lambda token: expected_first[token])
    drafted = ranked[-1] if draft == "likely" else ranked[len(ranked) // 2]
    pairs: Counter[tuple[int, int]] = Counter()
    accepted = 0
    for seed in range(count):
        item = sequence(seed=seed, **params)
        item.num_computed = item.num_tokens - 1
        scheduled = Scheduled(item, 2, [drafted])
        logits = torch.stack([first, second[drafted]])
        drawn = [one.token for one in Sampling(logits, scheduled.draws, ()).read()]
        taken = drawn[: num_kept(scheduled.drafts, drawn)]
        item.output += taken
        accepted += taken[0] == drafted
        if len(taken) == 1:
            [again] = Sampling(second[taken[0]][None].clone(), [Draw(item, item.output)], ()).read()
            taken.append(again.token)
        pairs[taken[0], taken[1]] += 1
    expected = {
        (a, b): p * q
        for a, p in expected_first.items()
        for b, q in reference(second[a], sequence(**params)).items()
    }
    assert set(pairs) <= set(expected)
    share = expected_first[drafted]
    assert abs(accepted / count - share) <= 4 * math.sqrt(share * (1 - share) / count)
    usual = {pair: p for pair, p in expected.items() if p * count >= 5}
    chi_square = sum((pairs[pair] - p * count) ** 2 / (p * count) for pair, p in usual.items())
    degrees = max(1, len(usual) - 1)
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees) + 4
