"""Logits -> tokens, row by row independent: what a request draws never depends on who shares its batch.

Order of operations as in vLLM: logit_bias, min_tokens, penalties, grammar, temperature, min_p, top_k, top_p, draw. The
draw is the inverse of the cumulative distribution at one uniform number from a generator keyed by (seed, position), so a
seed gives the same text in any batch, after a preemption too. Reported log-probabilities are the model's own, before any
of this. Repetition penalty: Keskar et al. 2019, https://arxiv.org/abs/1909.05858; min_p: Nguyen et al. 2024,
https://arxiv.org/abs/2407.01082; top_p: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import torch

from loramux_server.engine.messages import SamplingParams, TokenLogprobs
from loramux_server.engine.sequence import Draw, Sequence

# Filters look at this many of the most likely tokens first; a full sort of the vocabulary is the exception.
_CANDIDATES = 256
# Tokens of a prompt whose log-probabilities are computed together: a row is the whole vocabulary in fp32.
_SCORED_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Sampled:
    """`token` is None if the row's logits are not finite: that request fails, its neighbours do not."""

    token: int | None
    logprobs: TokenLogprobs | None = None


@torch.inference_mode()
def sample(logits: torch.Tensor, draws: list[Draw], end_tokens: tuple[int, ...]) -> list[Sampled]:
    """logits `[rows, vocab]` fp32 (overwritten), one row per draw -> one token each."""
    logprobs = [
        torch.log_softmax(logits[row], -1) if draw.sequence.params.logprobs is not None else None
        for row, draw in enumerate(draws)
    ]
    for row, draw in enumerate(draws):
        _adjust(logits[row], draw, end_tokens)
    highest, likeliest = logits.max(-1)  # NaN wins a maximum, so this finds it
    finite = torch.isfinite(highest).tolist()
    tokens: list[int] = likeliest.tolist()
    results: list[Sampled] = []
    for row, draw in enumerate(draws):
        if not finite[row]:
            results.append(Sampled(None))
            continue
        params, token = draw.sequence.params, tokens[row]
        if params.temperature > 0:
            token = _draw(logits[row], draw)
        results.append(Sampled(token, _report(logprobs[row], token, params.logprobs)))
    return results


def _adjust(row: torch.Tensor, draw: Draw, end_tokens: tuple[int, ...]) -> None:
    sequence, params, output = draw.sequence, draw.sequence.params, draw.output
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), device=row.device)
    if len(output) < params.min_tokens:
        blocked = [*end_tokens, *params.stop_token_ids]
        row[torch.tensor(blocked, dtype=torch.long, device=row.device)] = -torch.inf
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list({*sequence.prompt, *output}), device=row.device)
        values = row[seen]
        row[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if output and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(output)
        ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), device=row.device, dtype=row.dtype)
        row[ids] -= params.presence_penalty + params.frequency_penalty * times
    if sequence.constraint is not None:
        row.masked_fill_(~_unpack(sequence.constraint.allowed(), row), -torch.inf)


def _unpack(bits: bytes, row: torch.Tensor) -> torch.Tensor:
    """A bit per token id -> a boolean per logit; ids that the tokenizer lacks are never allowed."""
    packed = torch.frombuffer(bytearray(bits), dtype=torch.uint8).to(row.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=row.device)
    allowed = ((packed[:, None] >> shifts) & 1).view(-1)[: row.numel()].bool()
    missing = row.numel() - allowed.numel()
    return torch.cat((allowed, allowed.new_zeros(missing))) if missing > 0 else allowed


def score_prompt(sequence: Sequence, positions: range, logits: torch.Tensor) -> None:
    """Note how likely the prompt's tokens were. `logits` `[len(positions), vocab]`, of the tokens before them."""
    count = sequence.params.prompt_logprobs
    assert count is not None
    for begin in range(0, len(positions), _SCORED_AT_ONCE):
        chosen = positions[begin : begin + _SCORED_AT_ONCE]
        part = torch.log_softmax(logits[begin : begin + len(chosen)].float(), -1)
        tokens = torch.tensor([sequence.prompt[position + 1] for position in chosen], device=part.device)
        own = part.gather(1, tokens[:, None])
        ranks = (part > own).sum(-1) + 1
        values, ids = torch.topk(part, count)  # of size 0 if none is wanted
        for row in zip(own[:, 0].tolist(), ids.tolist(), values.tolist(), ranks.tolist(), strict=True):
            logprob, top_ids, top_values, rank = row
            top = list(zip(top_ids, top_values, strict=True))
            sequence.prompt_scores.append(TokenLogprobs(logprob, top, rank))


def _draw(row: torch.Tensor, draw: Draw) -> int:
    params = draw.sequence.params
    probs = torch.softmax(row / max(params.temperature, 1e-5), -1)
    uniform = _uniform(draw)
    if params.top_k <= 0 and params.top_p >= 1.0 and params.min_p <= 0.0:
        return _pick(probs, uniform)
    values, ids = torch.topk(probs, min(_CANDIDATES, probs.numel()))
    if not _covers(values, params, probs.numel()):
        values, ids = torch.sort(probs, descending=True)
    keep = torch.ones_like(values, dtype=torch.bool)
    if params.min_p > 0.0:
        keep &= values >= params.min_p * values[0]
    if params.top_k > 0:
        keep[params.top_k :] = False
    if params.top_p < 1.0:
        kept = values * keep
        # A token stays if the probability before it has not reached top_p of what the other filters left. Without
        # them that is everything, of which the candidates are only a part.
        left = kept.sum() if params.top_k > 0 or params.min_p > 0.0 else probs.sum()
        keep &= (kept.cumsum(-1) - kept) < params.top_p * left
    return int(ids[_pick(values * keep, uniform)])


def _covers(values: torch.Tensor, params: SamplingParams, vocab: int) -> bool:
    """True if the filters certainly keep none but the candidates."""
    if values.numel() == vocab or 0 < params.top_k <= values.numel():
        return True
    if params.min_p > 0.0 and float(values[-1]) < params.min_p * float(values[0]):
        return True
    return params.top_k <= 0 and params.min_p <= 0.0 and float(values.sum()) >= params.top_p


def _pick(weights: torch.Tensor, uniform: float) -> int:
    """The index where the cumulative sum passes `uniform` of the total; never one of weight zero."""
    cumulative = weights.double().cumsum(-1)
    target = uniform * cumulative[-1]
    index = int(torch.searchsorted(cumulative, target, right=True))
    return min(index, int(torch.nonzero(weights)[-1]))


def _uniform(draw: Draw) -> float:
    seed = draw.sequence.params.seed
    return random.random() if seed is None else random.Random(f"{seed}:{len(draw.output)}").random()


def _report(logprobs: torch.Tensor | None, token: int, count: int | None) -> TokenLogprobs | None:
    if logprobs is None or count is None:
        return None
    values, ids = torch.topk(logprobs, count) if count else (logprobs[:0], logprobs[:0].long())
    top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(logprob=float(logprobs[token]), top=top)
