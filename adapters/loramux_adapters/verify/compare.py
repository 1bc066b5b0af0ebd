"""Sums over the logits of two models, position by position."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from loramux_adapters.export.agreement import Agreement, AgreementMeter

_LOGITS_AT_ONCE = 2**21  # the meter computes in fp64


class Comparison:
    """An `AgreementMeter` that also knows how far apart all logits are relative to their size."""

    def __init__(self) -> None:
        self._meter = AgreementMeter()
        self._difference = self._size = 0.0

    def add(self, logits: torch.Tensor, reference: torch.Tensor, tokens: tuple[int, ...]) -> None:
        """Finite logits `[len(tokens), vocabulary]` in fp32 of two models for one prompt."""
        following = [after for _, after in pairwise(tokens)]
        targets = torch.tensor([*following, -1], device=logits.device)
        self._difference += float((logits - reference).double().square().sum())
        self._size += float(reference.double().square().sum())
        step = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            self._meter.add(logits[rows], reference[rows], targets[rows])

    @property
    def equal(self) -> bool:
        return self._difference == 0.0

    @property
    def relative(self) -> float:
        """||logits - reference|| / ||reference||."""
        return math.sqrt(self._difference / max(self._size, 1e-30))

    def result(self) -> Agreement:
        return self._meter.result()
