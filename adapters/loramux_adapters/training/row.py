"""A batch as the device sees it: its samples end to end in one row, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.training.pieces import Piece, cut
from loramux_adapters.training.samples import Sample


@dataclass(frozen=True, slots=True)
class Row:
    """Ids `[T]`, the pieces they are run in, and which positions predict a trained token."""

    ids: torch.Tensor
    pieces: list[Piece]
    predicting: torch.Tensor  # [N] positions
    targets: torch.Tensor  # [N] token ids

    @classmethod
    def of(cls, samples: Sequence[Sample], piece_tokens: int, device: torch.device) -> Row:
        ids = torch.cat([torch.frombuffer(sample.ids, dtype=torch.int32) for sample in samples]).long()
        mask = torch.frombuffer(bytearray(b"".join(sample.mask for sample in samples)), dtype=torch.uint8)
        pieces = cut([len(sample) for sample in samples], piece_tokens)
        trained = mask.nonzero().squeeze(1)  # never a sample's first token
        return cls(ids.to(device), pieces, (trained - 1).to(device), ids[trained].to(device))
