"""Accounting of KV blocks: who owns which, how many are left. No torch; the bytes are in `attention.py`.

A block holds the keys and values of `block_size` consecutive tokens in every layer. Promises: a block has one owner
or is free; `check()` proves it.
"""

from __future__ import annotations

from collections import deque

from loramux_server.engine.sequence import Sequence


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """True if `sequence` can hold `num_tokens` tokens with the blocks that are free now."""
        return self.blocks_for(num_tokens) - len(sequence.blocks) <= len(self._free)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Give `sequence` the blocks it lacks for `num_tokens` tokens. The caller asked `can_grow` before."""
        for _ in range(self.blocks_for(num_tokens) - len(sequence.blocks)):
            sequence.blocks.append(self._free.popleft())

    def release(self, sequence: Sequence) -> None:
        # Last in, first out: recently used memory is still in the processor's caches.
        self._free.extendleft(reversed(sequence.blocks))
        sequence.blocks.clear()

    def check(self, sequences: list[Sequence]) -> None:
        """Every block is free or owned once. Raises AssertionError that says what leaked."""
        owned = [block for sequence in sequences for block in sequence.blocks]
        everything = sorted([*owned, *self._free])
        if everything != list(range(self.num_blocks)):
            raise AssertionError(
                f"KV blocks leaked: {len(owned)} owned, {len(self._free)} free of {self.num_blocks}"
            )
