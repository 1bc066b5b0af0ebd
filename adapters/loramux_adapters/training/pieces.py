"""How a row of samples is cut into pieces that are run through a layer one after the other.

A piece is the unit in which training is preempted and the bound on the memory of a layer's activations: some whole samples,
or a part of one that is longer than a piece. The parts of a cut sample attend to the keys and values of its earlier
parts, which `Carried` keeps. Promises: the gradients are those of the whole sample. Cutting depends on lengths alone,
never on how fast anything ran, so that a resumed run computes the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

Segment = tuple[int, int]  # first position in the piece, length
KeysValues = tuple[torch.Tensor, torch.Tensor]


class Carried:
    """Keys and values of one cut sample, by layer and part."""

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self._kept: dict[int, list[KeysValues]] = {}
        self._layer = self._part = 0
        self._repeating = False
        self._own: KeysValues | None = None

    def enter(self, layer: int, part: int, *, repeating: bool) -> None:
        """Which part of the sample goes through which layer; `repeating` to go back through it."""
        self._layer, self._part, self._repeating = layer, part, repeating

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> KeysValues:
        """A part's own `[1, heads, t, d]` behind those of all parts before it."""
        kept = self._kept.setdefault(self._layer, [])
        earlier = kept[: self._part]
        if self._repeating:
            self._own = (k, v)
            for pair in earlier:
                for tensor in pair:
                    tensor.requires_grad_()
        elif self._part < self._parts - 1:
            kept.append((k.detach().clone(), v.detach().clone()))  # a view would keep all it is cut from
        if not earlier:
            return k, v
        return torch.cat([*(pair[0] for pair in earlier), k], 2), torch.cat(
            [*(pair[1] for pair in earlier), v], 2
        )

    def owed(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """After a part was repeated: its own keys and values, and the gradients that its later parts have for them."""
        own, self._own = self._own, None
        kept = self._kept[self._layer]
        if own is None or self._part >= len(kept):
            return
        for tensor, copy in zip(own, kept[self._part], strict=True):
            if tensor.requires_grad and copy.grad is not None:
                yield tensor, copy.grad

    def drop(self, layer: int) -> None:
        """Nobody needs this layer's any more."""
        self._kept.pop(layer, None)


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions `start` to `end` of a row. `offset` is where its only segment lies in its sample, if that is cut."""

    start: int
    end: int
    segments: tuple[Segment, ...]
    offset: int = 0
    part: int = 0
    carried: Carried | None = None

    def positions(self, device: torch.device) -> torch.Tensor:
        parts = [
            torch.arange(self.offset, self.offset + length, device=device) for _, length in self.segments
        ]
        return torch.cat(parts)

    def enter(self, layer: int, *, repeating: bool = False) -> None:
        if self.carried is not None:
            self.carried.enter(layer, self.part, repeating=repeating)

    def owed(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.carried is not None:
            yield from self.carried.owed()

    def drop(self, layer: int) -> None:
        if self.carried is not None:
            self.carried.drop(layer)


def cut(lengths: Sequence[int], size: int) -> list[Piece]:
    """A row of samples of these lengths, end to end, in pieces of `size` tokens at most."""
    pieces: list[Piece] = []
    together: list[int] = []
    start = 0

    def close() -> int:
        if not together:
            return start
        segments, at = [], 0
        for length in together:
            segments.append((at, length))
            at += length
        pieces.append(Piece(start, start + at, tuple(segments)))
        together.clear()
        return start + at

    for length in lengths:
        if sum(together) + length > size:
            start = close()
        if length <= size:
            together.append(length)
            continue
        start = close()
        parts = -(-length // size)
        carried = Carried(parts)
        each = -(-length // parts)
        for part in range(parts):
            offset = part * each
            here = min(each, length - offset)
            pieces.append(Piece(start + offset, start + offset + here, ((0, here),), offset, part, carried))
        start += length
    close()
    return pieces
