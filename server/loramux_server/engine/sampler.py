"""Logits -> tokens, row by row independent: what a request draws never depends on who shares its batch.

Order of operations as in vLLM: logit_bias, min_tokens, penalties, grammar, temperature, min_p, top_k, top_p, draw
(`drawing.py`). The uniform number of a draw is from a generator keyed by (seed, position), so a seed gives the same text in
any batch, after a preemption too. Reported log-probabilities are the model's own, before any of this. A step's tokens come
from the device together, so do the log-probabilities that were asked for. Repetition penalty: Keskar et al. 2019,
https://arxiv.org/abs/1909.05858.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import islice

import torch

from loramux_adapters.transfer import on_device, sent
from loramux_server.engine.drawing import RandomRows
from loramux_server.engine.messages import TokenLogprobs
from loramux_server.engine.sequence import Draw, Sequence

# Tokens of a prompt whose log-probabilities are computed together: a row is the whole vocabulary in fp32.
_SCORED_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Sampled:
    """`token` is None if the row's logits are not finite: that request fails, its neighbours do not."""

    token: int | None
    logprobs: TokenLogprobs | None = None


class Sampling:
    """What a step draws: asked for at once, without waiting for the device, and read later."""

    @torch.inference_mode()
    def __init__(self, logits: torch.Tensor, draws: list[Draw], end_tokens: tuple[int, ...]) -> None:
        """logits `[rows, vocab]` fp32 (overwritten), one row per draw."""
        self._draws = draws
        self._reported = [row for row, draw in enumerate(draws) if draw.sequence.params.logprobs is not None]
        self._logprobs = torch.log_softmax(_rows(logits, self._reported), -1) if self._reported else None
        for row, draw in enumerate(draws):
            _adjust(logits[row], draw, end_tokens)
        _constrain(logits, draws)
        highest, likeliest = logits.max(-1)  # NaN wins a maximum, so this finds it
        told = [torch.isfinite(highest).long(), likeliest]
        self._random = [row for row, draw in enumerate(draws) if draw.sequence.params.temperature > 0]
        self._drawn: RandomRows | None = None
        if self._random:
            self._drawn = RandomRows(
                _rows(logits, self._random),
                [draws[row].sequence.params for row in self._random],
                [_uniform(draws[row]) for row in self._random],
            )
            told += self._drawn.first()
        self._told = torch.cat(told)

    @torch.inference_mode()
    def read(self) -> list[Sampled]:
        """A token for each draw. Waits for the device."""
        tokens = self._tokens()
        results = [Sampled(token) for token in tokens]
        finite = [place for place, row in enumerate(self._reported) if tokens[row] is not None]
        if self._logprobs is not None and finite:
            rows = [self._reported[place] for place in finite]
            counts = [self._draws[row].sequence.params.logprobs or 0 for row in rows]
            chosen = [tokens[row] or 0 for row in rows]
            for row, report in zip(
                rows, _reports(_rows(self._logprobs, finite), chosen, counts), strict=True
            ):
                results[row] = Sampled(tokens[row], report)
        return results

    def _tokens(self) -> list[int | None]:
        """None where the logits are not finite."""
        told = iter(self._told.tolist())
        finite, tokens = (list(islice(told, len(self._draws))) for _ in range(2))
        if self._drawn is not None:
            drawn, certain = (list(islice(told, len(self._random))) for _ in range(2))
            unsure = [place for place, row in enumerate(self._random) if finite[row] and not certain[place]]
            for place, token in (dict(enumerate(drawn)) | self._drawn.settled(unsure)).items():
                tokens[self._random[place]] = token
        return [token if ok else None for ok, token in zip(finite, tokens, strict=True)]


def _rows(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """A copy, unless these are all rows."""
    return tensor if len(rows) == len(tensor) else tensor.index_select(0, on_device(rows, tensor.device))


def _adjust(row: torch.Tensor, draw: Draw, end_tokens: tuple[int, ...]) -> None:
    sequence, params, output = draw.sequence, draw.sequence.params, draw.output
    if params.logit_bias:
        ids = on_device(list(params.logit_bias), row.device)
        row[ids] += on_device(list(params.logit_bias.values()), row.device, row.dtype)
    if len(output) < params.min_tokens:
        blocked = [*end_tokens, *params.stop_token_ids]
        row.index_fill_(0, on_device(blocked, row.device), -torch.inf)
    if params.repetition_penalty != 1.0:
        seen = on_device(list({*sequence.prompt, *output}), row.device)
        values = row[seen]
        row[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if output and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(output)
        ids = on_device(list(counts), row.device)
        times = on_device(list(counts.values()), row.device, row.dtype)
        row[ids] -= params.presence_penalty + params.frequency_penalty * times


def _constrain(logits: torch.Tensor, draws: list[Draw]) -> None:
    """What a row's grammar does not allow gets -inf; a bit per token id says what it does."""
    constraints = {row: draw.sequence.constraint for row, draw in enumerate(draws)}
    allowed = {row: one.allowed() for row, one in constraints.items() if one is not None}
    if not allowed:
        return
    bits = torch.frombuffer(bytearray().join(allowed.values()), dtype=torch.uint8)
    packed = sent(bits, logits.device)
    added = _added(logits.device).index_select(0, packed.int()).view(len(allowed), -1)
    rows = on_device(list(allowed), logits.device)
    known = min(added.shape[1], logits.shape[1])
    logits[:, :known].index_add_(0, rows, added[:, :known])
    logits[:, known:].index_fill_(0, rows, -torch.inf)  # ids that the tokenizer lacks


@cache
def _added(device: torch.device) -> torch.Tensor:
    """`[256, 8]`: for every byte of allowed tokens what is added to the eight logits, lowest bit first."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return sent(torch.where(bits == 1, 0.0, -torch.inf), device)


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


def _uniform(draw: Draw) -> float:
    seed = draw.sequence.params.seed
    return random.random() if seed is None else random.Random(f"{seed}:{len(draw.output)}").random()


def _reports(logprobs: torch.Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """Of rows `[n, vocab]` the token's own, and so many of the likeliest."""
    chosen = torch.tensor(tokens, device=logprobs.device)[:, None]
    values, ids = torch.topk(logprobs, max(counts))  # of size 0 if none is wanted
    # fp64 holds token ids and fp32 numbers exactly: one copy from the device instead of three
    read = torch.cat([logprobs.gather(1, chosen).double(), values.double(), ids.double()], dim=1).tolist()
    reports = []
    for (own, *both), count in zip(read, counts, strict=True):
        half = len(both) // 2
        top = zip(map(int, both[half:]), both[:half], strict=True)
        reports.append(TokenLogprobs(own, list(islice(top, count))))
    return reports
