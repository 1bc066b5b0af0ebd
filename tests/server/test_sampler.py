"""Sampling against a plain reference: a full sort, one parameter after the other, in Python floats.

The reference below knows nothing of candidates, of `topk` or of tensors; what both must agree on is the distribution
the draw is made from. Draws themselves are checked for being that distribution's, and for depending on nothing else.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loramux_server.engine import drawing, sampler
from loramux_server.engine.messages import SamplingParams
from loramux_server.engine.sampler import Sampled
from loramux_server.engine.sequence import Draw, Sequence

VOCAB = 600  # more than twice the candidates that filters look at first
END = (2, 5)


def logits_row(seed: int, spread: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


def sequence(prompt: list[int] | None = None, output: list[int] | None = None, **params: object) -> Sequence:
    made = Sequence("id", prompt or [1, 2, 3], SamplingParams(**{"max_tokens": 99} | params))  # type: ignore[arg-type]
    made.output = list(output or [])
    return made


def sample(logits: torch.Tensor, sequences: list[Sequence], end_tokens: tuple[int, ...]) -> list[Sampled]:
    """The next token of each."""
    return sampler.Sampling(logits, [Draw(item, item.output) for item in sequences], end_tokens).read()


def draw(row: torch.Tensor, item: Sequence) -> Sampled:
    return sample(row[None].clone(), [item], END)[0]


def reference(row: torch.Tensor, item: Sequence) -> dict[int, float]:
    """token -> probability, of the tokens that may be drawn."""
    params = item.params
    scores = {token: float(value) for token, value in enumerate(row)}
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if len(item.output) < params.min_tokens:
        for token in {*END, *params.stop_token_ids}:
            scores[token] = -math.inf
    for token in {*item.prompt, *item.output}:
        value = scores[token]
        scores[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    for token, times in Counter(item.output).items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * times
    if params.temperature == 0:
        return {max(scores, key=lambda token: scores[token]): 1.0}
    highest = max(scores.values())
    weights = {token: math.exp((value - highest) / params.temperature) for token, value in scores.items()}
    total = sum(weights.values())
    ranked = sorted(((weight / total, token) for token, weight in weights.items()), reverse=True)
    ranked = [(p, token) for p, token in ranked if p >= params.min_p * ranked[0][0]]
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    left = sum(p for p, _ in ranked)
    kept, before = {}, 0.0
    for p, token in ranked:
        if params.top_p < 1.0 and kept and before >= params.top_p * left:
            break
        kept[token] = p
        before += p
    return {token: p / before for token, p in kept.items() if p > 0}


def drawn_from(
    row: torch.Tensor, item: Sequence, uniforms: list[float], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """The tokens for given uniform numbers: the inverse of the cumulative distribution, made visible."""
    tokens = []
    for uniform in uniforms:
        monkeypatch.setattr(sampler, "_uniform", lambda _, value=uniform: value)
        token = draw(row, item).token
        assert token is not None
        tokens.append(token)
    return tokens


COMBINATIONS: list[dict[str, object]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 300},
    {"top_k": 5000},
    {"top_p": 0.5},
    {"top_p": 0.97, "temperature": 2.0},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1e-6},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 400, "top_p": 0.9, "temperature": 1.7},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 0.8},
    {"min_p": 1e-4, "top_p": 0.7, "temperature": 1.5},
    {"logit_bias": {4: 8.0, 17: -100.0, 599: 3.5}},
    {"repetition_penalty": 1.5, "output": [40, 41, 40]},
    {"repetition_penalty": 0.7, "output": [40, 41, 40]},
    {"presence_penalty": 1.5, "output": [40, 41, 40]},
    {"frequency_penalty": 0.9, "output": [40, 41, 40, 40]},
    {"presence_penalty": -2.0, "frequency_penalty": -1.0, "output": [40, 41, 40]},
    {"min_tokens": 3, "output": [40, 41], "stop_token_ids": (7,)},
    {"min_tokens": 2, "output": [40, 41], "stop_token_ids": (7,)},
    {
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "logit_bias": {3: 2.0, 9: -1.0},
        "min_tokens": 5,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "output": [3, 9, 9, 12],
    },
]


@pytest.mark.parametrize("params", COMBINATIONS, ids=lambda params: ",".join(map(str, params)))
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_draws_follow_the_reference_distribution(
    params: dict[str, object], spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fine grid of uniform numbers hits each token as often as it is likely; only the borders may move."""
    row, item = logits_row(3, spread), sequence(**params)
    expected = reference(row, item)
    grid = 500
    tokens = drawn_from(row, item, [(i + 0.5) / grid for i in range(grid)], monkeypatch)
    counts = Counter(tokens)
    assert set(counts) <= set(expected), "a token that the filters exclude was drawn"
    for token, probability in expected.items():
        assert abs(counts[token] - probability * grid) <= 1.01
    ends = drawn_from(row, item, [0.0, 1.0 - 2**-53], monkeypatch)
    assert set(ends) <= set(expected)


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.05, 0.5, 3.0, 30.0]),
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 256, 257, 599, 10_000]),
    top_p=st.floats(1e-6, 1.0),
    min_p=st.sampled_from([0.0, 1e-3, 0.2, 1.0]),
    vocab=st.sampled_from([1, 5, 256, 257, 600]),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_any_combination_draws_only_what_the_filters_keep(
    seed: int,
    spread: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    vocab: int,
    uniform: float,
) -> None:
    row = logits_row(seed, spread, vocab)
    item = sequence([0], temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = reference(row, item)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_uniform", lambda _: uniform)
        token = sample(row[None].clone(), [item], ())[0].token
    if token not in expected:  # at a border, where fp32 sums decide: a hair's breadth of top_p more keeps it
        wider = sequence(
            [0], temperature=temperature, top_k=top_k, top_p=min(1.0, top_p + 1e-5), min_p=min_p * 0.9999
        )
        assert token in reference(row, wider)


@pytest.mark.parametrize("spread", [0.5, 1.5, 2.0])
@pytest.mark.parametrize(("vocab", "candidates"), [(2000, 256), (9000, 256), (9000, 4096)])
def test_top_p_beyond_the_candidates_keeps_what_a_full_sort_keeps(
    spread: float, vocab: int, candidates: int
) -> None:
    """With so many candidates just above top_p, their sum must not be taken for the whole distribution."""
    row = logits_row(1, spread, vocab)
    probs = torch.softmax(row.double(), -1).sort(descending=True).values
    top_p = float(probs[:candidates].sum()) - 1e-4
    item = sequence(top_p=top_p)
    keep = reference(row, item)
    assert len(keep) >= 0.97 * candidates
    last = min(keep, key=lambda token: keep[token])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_uniform", lambda _: 1.0 - 1e-9)
        assert draw(row, item).token == last


def test_greedy_takes_the_likeliest_after_adjustments_and_ignores_filters() -> None:
    row = logits_row(2)
    best = int(row.argmax())
    assert draw(row, sequence(temperature=0.0)).token == best
    assert draw(row, sequence(temperature=0.0, top_k=3, top_p=0.1, min_p=0.9, seed=1)).token == best
    assert draw(row, sequence(temperature=0.0, logit_bias={best: -100.0})).token == int(row.argsort()[-2])
    assert draw(row, sequence(temperature=0.0, logit_bias={11: 100.0})).token == 11


def test_min_tokens_blocks_every_way_to_end() -> None:
    row = torch.full((VOCAB,), -5.0)
    row[2], row[5], row[7], row[9] = 9.0, 8.0, 7.0, 6.0
    params = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (7,)}
    assert draw(row, sequence(**params)).token == 9
    assert draw(row, sequence(output=[1], **params)).token == 9
    assert draw(row, sequence(output=[1, 1], **params)).token == 2
    for seed in range(30):
        assert draw(row, sequence(min_tokens=1, stop_token_ids=(7,), seed=seed)).token not in (2, 5, 7)


# --- draws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"top_k": 8}, {"top_p": 0.6}, {"min_p": 0.05, "temperature": 1.3}])
def test_seeded_draws_are_distributed_as_they_should(params: dict[str, object]) -> None:
    """Chi-square over 3000 fixed seeds; the bound is far out in the tail, and nothing here is random."""
    row = logits_row(5, 2.0, 40)
    expected = reference(row, sequence(**params))
    count = 3000
    counts = Counter(
        sample(row[None].clone(), [sequence(seed=seed, **params)], END)[0].token for seed in range(count)
    )
    assert set(counts) <= set(expected)
    usual = {token: p for token, p in expected.items() if p * count >= 5}
    chi_square = sum((counts[token] - p * count) ** 2 / (p * count) for token, p in usual.items())
    degrees = max(1, len(usual) - 1)
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees) + 4


def test_the_positions_of_one_seed_are_distributed_too() -> None:
    """Each position has a generator of its own: together they must not repeat one draw."""
    row = torch.zeros(10)
    counts = Counter(
        sample(row[None].clone(), [sequence(output=[1] * position, seed=42)], ())[0].token
        for position in range(1000)
    )
    assert sum((counts[token] - 100) ** 2 / 100 for token in range(10)) < 9 + 4 * math.sqrt(18)


def test_a_seed_gives_the_same_token_in_any_company() -> None:
    row = logits_row(7)
    item = sequence(seed=99, top_p=0.9, temperature=1.2, output=[4, 5])
    alone = draw(row, item).token
    others = [sequence(seed=seed, top_k=seed) for seed in range(6)]
    for position in range(7):
        batch = [*others[:position], item, *others[position:]]
        rows = torch.stack([logits_row(100 + i) for i in range(7)])
        rows[position] = row
        assert sample(rows, batch, END)[position].token == alone


def test_many_rows_draw_what_each_draws_alone() -> None:
    """Of a vocabulary that is summed in parts, with all kinds of filters and candidates that do not suffice."""
    kinds: list[dict[str, object]] = [
        {},
        {"top_p": 0.95},
        {"top_k": 40, "top_p": 0.9},
        {"min_p": 1e-7, "temperature": 1.8},
        {"top_p": 0.9999},
        {"temperature": 0.0},
    ]
    items = [sequence(seed=place, **kinds[place % len(kinds)]) for place in range(60)]
    rows = torch.stack([logits_row(place, 0.5 + place % 4, 20_001) for place in range(len(items))])
    together = [one.token for one in sample(rows.clone(), items, END)]
    assert together == [draw(row, item).token for row, item in zip(rows, items, strict=True)]
    assert len(set(together)) > 30


class _Everything:
    """A grammar that allows all tokens."""

    is_ready, error = True, ""

    def allowed(self) -> bytes:
        return b"\xff" * (VOCAB // 8)

    def accept(self, token: int) -> None: ...


class _OnlyWithoutWaiting(TorchDispatchMode):
    """Refuses what waits until the device has computed all that it was asked for: blocking copies, open or hidden."""

    copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {
            one.device for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor) and one.dim()
        }
        assert len(given) <= 1, f"{func} copies its operands by itself"
        if isinstance(result, torch.Tensor) and given - {result.device}:
            assert kwargs.get("non_blocking"), f"{func} waits"
            self.copies += 1
        return result


def test_nothing_waits_for_the_device_before_tokens_are_read() -> None:
    """A device without data: who asks it for a number, or for a size that depends on one, fails."""
    kinds: list[dict[str, object]] = [
        {},
        {"top_p": 0.9, "logprobs": 2},
        {"top_k": 7, "min_p": 0.1, "logit_bias": {3: 1.0}},
        {"temperature": 0.0, "min_tokens": 5},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "output": [4, 4]},
    ]
    items = [sequence(**kind) for kind in kinds]
    items[0].constraint = _Everything()
    with _OnlyWithoutWaiting() as mode:
        logits = torch.zeros(len(items), 9000, device="meta")
        sampling = sampler.Sampling(logits, [Draw(item, item.output) for item in items], END)
        assert mode.copies > 8
        with pytest.raises(RuntimeError, match="meta"):
            sampling.read()


def test_ids_that_the_tokenizer_lacks_are_not_allowed_by_a_grammar() -> None:
    row = logits_row(3, vocab=VOCAB + 40)
    row[VOCAB + 7] = 99.0
    free, bound = sequence(temperature=0.0), sequence(temperature=0.0)
    bound.constraint = _Everything()
    assert draw(row, free).token == VOCAB + 7
    assert draw(row, bound).token == int(row[:VOCAB].argmax())
    both = sample(torch.stack([row, row]), [free, bound], END)
    assert [one.token for one in both] == [VOCAB + 7, int(row[:VOCAB].argmax())]


def test_rounding_below_zero_picks_nothing_of_weight_zero() -> None:
    ends = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    assert drawing._passing(ends, torch.tensor([[-1e-18]], dtype=torch.float64)).item() == 2
    assert drawing._passing(ends, torch.tensor([[1.0 + 1e-15]], dtype=torch.float64)).item() == 2


def test_a_seed_depends_on_the_position_but_not_on_how_often_it_is_asked() -> None:
    row = logits_row(7, 0.1)
    at = {n: [draw(row, sequence(seed=1, output=[8] * n)).token for _ in range(2)] for n in range(20)}
    assert all(first == second for first, second in at.values())
    assert len({first for first, _ in at.values()}) > 5
    assert draw(row, sequence(seed=1)).token != draw(row, sequence(seed=2)).token


def test_without_a_seed_draws_come_from_the_process_generator() -> None:
    row = logits_row(7, 0.1)
    state = random.getstate()
    try:
        random.seed(5)
        first = [draw(row, sequence()).token for _ in range(10)]
        random.seed(5)
        assert [draw(row, sequence()).token for _ in range(10)] == first
        assert len(set(first)) > 5
    finally:
        random.setstate(state)


# --- isolation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(poison: float) -> None:
    rows = torch.stack([logits_row(i) for i in range(3)])
    healthy = [s.token for s in sample(rows.clone(), [sequence(seed=i) for i in range(3)], END)]
    rows[1, 300] = poison
    sampled = sample(rows, [sequence(seed=i, logprobs=2) for i in range(3)], END)
    assert [s.token for s in sampled] == [healthy[0], None, healthy[2]]
    assert sampled[1].logprobs is None


def test_minus_infinity_is_a_token_that_is_never_drawn() -> None:
    row = torch.full((VOCAB,), -math.inf)
    row[[3, 9]] = 1.0
    tokens = {draw(row, sequence(seed=seed, temperature=2.0)).token for seed in range(40)}
    assert tokens == {3, 9}
    row[[3, 9]] = -math.inf
    assert draw(row, sequence()).token is None


def test_rows_that_want_different_logprobs() -> None:
    rows = torch.stack([logits_row(seed) for seed in range(4)])
    items = [sequence(logprobs=count, seed=1) for count in (3, 0, None, 1)]
    together = sample(rows.clone(), items, END)
    assert together == [draw(row, item) for row, item in zip(rows, items, strict=True)]
    assert [one.logprobs and len(one.logprobs.top) for one in together] == [3, 0, None, 1]


def test_no_row_changes_another() -> None:
    """Penalties and bias of one row, and its filters, leave the next row's draw alone."""
    rows = torch.stack([logits_row(0), logits_row(0)])
    loud = sequence(
        logit_bias=dict.fromkeys(range(300), -50.0), repetition_penalty=2.0, min_tokens=5, top_k=1
    )
    assert (
        sample(rows.clone(), [loud, sequence(seed=3)], END)[1].token == draw(rows[1], sequence(seed=3)).token
    )


# --- log-probabilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs_are_the_models_own(count: int) -> None:
    row = logits_row(11)
    item = sequence(
        seed=4,
        logprobs=count,
        temperature=0.4,
        top_k=9,
        logit_bias={8: 60.0},
        repetition_penalty=1.9,
        min_tokens=3,
        output=[8],
    )
    answer = draw(row, item)
    raw = torch.log_softmax(row.double(), -1)
    assert answer.token is not None
    assert answer.logprobs is not None
    assert answer.logprobs.logprob == pytest.approx(float(raw[answer.token]), abs=1e-5)
    order = raw.argsort(descending=True)[:count].tolist()
    assert [token for token, _ in answer.logprobs.top] == order
    assert [value for _, value in answer.logprobs.top] == pytest.approx(raw[order].tolist(), abs=1e-5)
    assert draw(row, sequence(seed=4)).logprobs is None
