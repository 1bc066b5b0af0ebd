"""Random draws from rows of logits, all rows at once and on their device.

Promises: temperature, min_p, top_k, top_p in this order, then the inverse of the cumulative distribution at one uniform
number a row; what a row draws never depends on the rows beside it. `first` does not wait for the device; it says of each
draw whether it is certain, and `settled` repeats those that are not. min_p: Nguyen et al. 2024,
https://arxiv.org/abs/2407.01082; top_p: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from loramux_adapters.transfer import on_device
from loramux_server.engine.messages import SamplingParams

# Filters look at so many of the likeliest tokens first, and at all of them only if more could be kept.
_CANDIDATES = (256, 4096)
# Rows whose candidates did not suffice, at a time: all of a vocabulary in order takes some 40 bytes a token.
_TOGETHER = 16
# Probabilities that are summed before a cumulative sum goes over the sums.
_PART = 256


class RandomRows:
    def __init__(
        self, logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
    ) -> None:
        """logits `[rows, vocab]` fp32, overwritten; temperatures are above zero; a uniform number in [0, 1) for each row."""
        self._filtered = [row for row, one in enumerate(params) if _is_filtered(one)]
        numbers = [(max(one.temperature, 1e-5), one.top_k, one.top_p, one.min_p) for one in params]
        self._table = on_device(numbers, logits.device, torch.float64)
        self._uniforms = on_device(uniforms, logits.device, torch.float64)
        self._probs = torch.softmax(logits.div_(self._table[:, :1].float()), -1)

    def first(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A token for each row, any of one that is not finite, and whether it is certain; both int64 `[rows]`."""
        if len(self._filtered) == len(self._probs):
            return self._draw(self._filtered, _CANDIDATES[0])
        tokens = _pick(self._probs, self._uniforms)
        certain = torch.ones_like(tokens)
        if self._filtered:
            places = on_device(self._filtered, tokens.device)
            for all_, some in zip((tokens, certain), self._draw(self._filtered, _CANDIDATES[0]), strict=True):
                all_.index_copy_(0, places, some)
        return tokens, certain

    def settled(self, rows: list[int]) -> dict[int, int]:
        """The tokens of these rows, by row. Waits for the device."""
        found: dict[int, int] = {}
        for candidates in (*_CANDIDATES[1:], self._probs.shape[1]):
            left = [row for row in rows if row not in found]
            for begin in range(0, len(left), _TOGETHER):
                part = left[begin : begin + _TOGETHER]
                tokens, certain = torch.stack(self._draw(part, candidates)).tolist()
                found |= {row: token for row, token, sure in zip(part, tokens, certain, strict=True) if sure}
        return found

    def _draw(self, rows: list[int], candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of these rows, whose filters look at so many tokens."""
        probs, table, uniforms = self._probs, self._table, self._uniforms
        if len(rows) < len(probs):
            places = on_device(rows, probs.device)
            probs, table, uniforms = (one.index_select(0, places) for one in (probs, table, uniforms))
        vocab = probs.shape[1]
        count = min(candidates, vocab)
        values, ids = torch.topk(probs, count) if count < vocab else torch.sort(probs, descending=True)
        top_k, top_p, min_p = table[:, 1:].unbind(1)
        by_rank, by_share = top_k > 0, min_p > 0.0
        place = torch.arange(count, device=probs.device)
        keep = (place < torch.where(by_rank, top_k, count)[:, None]) & (
            values >= min_p[:, None] * values[:, :1]
        )
        kept = values * keep
        # A token stays if the probability before it has not reached top_p of what the other filters left. Without them
        # that is everything, of which the candidates are only a part.
        ends = kept.cumsum(-1, dtype=torch.float64)
        left = torch.where(by_rank | by_share, ends[:, -1], _sums(probs).sum(-1))
        keep &= (ends - kept < (top_p * left)[:, None]) | (top_p >= 1.0)[:, None]
        by_top_p = ~(by_rank | by_share) & (ends[:, -1] >= top_p)
        certain = (
            by_top_p | (by_rank & (top_k <= count)) | (by_share & (values[:, -1] < min_p * values[:, 0]))
        )
        if count == vocab:
            certain = torch.ones_like(certain)
        return ids.gather(1, _pick(values * keep, uniforms)[:, None])[:, 0], certain.long()


def _is_filtered(params: SamplingParams) -> bool:
    """Whether some tokens may be left out however likely they are."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _parts(weights: torch.Tensor) -> torch.Tensor:
    rows, count = weights.shape
    lacking = -count % _PART
    return (F.pad(weights, (0, lacking)) if lacking else weights).view(rows, -1, _PART)


def _sums(weights: torch.Tensor) -> torch.Tensor:
    """`[rows, n]` -> `[rows, parts]` in fp64: parts of a row, summed alike however many rows there are."""
    return _parts(weights).sum(-1).double()


def _pick(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Of each row the index where the cumulative sum passes its share of the total; never one of weight zero."""
    sums = _sums(weights)
    ends = sums.cumsum(-1)
    target = (uniforms * ends[:, -1])[:, None]
    part = _passing(ends, target)
    rest = target - (ends - sums).gather(1, part)
    within = _parts(weights).gather(1, part[:, :, None].expand(-1, -1, _PART))[:, 0]
    index = part * _PART + _passing(within.cumsum(-1, dtype=torch.float64), rest)
    return index[:, 0].clamp(max=weights.shape[1] - 1)  # of a row that is not finite


def _passing(ends: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`[rows, 1]`: where cumulative sums `ends [rows, n]` first pass the target, at most where the last number is added."""
    found = torch.searchsorted(ends, target.clamp(min=0.0), right=True)
    last = torch.searchsorted(ends, ends[:, -1:].contiguous())
    return torch.minimum(found, last).clamp(max=ends.shape[1] - 1)  # NaN passes nothing
