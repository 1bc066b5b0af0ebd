"""Accounting of KV blocks: who holds which, how many are left. No torch; the bytes are in `kv_store.py`.

A block holds the keys and values of `block_size` consecutive tokens in every layer. Once all of them are computed it may be
shared by sequences that begin alike, and outlive them until its memory is needed (`prefix_cache.py`). Promises: a block
is held, cached or free; one that may still be written has one holder and no name, so nobody else reads it; `check()`
proves both.
"""

from __future__ import annotations

from collections import Counter, deque

from loramux_server.engine.prefix_cache import PrefixCache, digests
from loramux_server.engine.sequence import Sequence


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.queries = 0  # tokens looked up in the cache, of sequences at their first admission
        self.hits = 0  # of those, found
        self._free: deque[int] = deque(range(num_blocks))
        self._holders = [0] * num_blocks
        self._cache = PrefixCache()

    @property
    def num_free(self) -> int:
        """Blocks to be had: those that hold nothing, and cached ones that nobody holds."""
        return len(self._free) + self._cache.num_idle

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that are kept for sequences to come."""
        return self._cache.num_idle

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """True if `sequence` can hold `num_tokens` tokens with the blocks that are free now."""
        return self.lacking(sequence, num_tokens) <= self.num_free

    def lacking(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that `sequence` still needs for `num_tokens` tokens."""
        return max(0, self.blocks_for(num_tokens) - len(sequence.blocks))

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Give `sequence` the blocks it lacks for `num_tokens` tokens. The caller asked `can_grow` before."""
        for _ in range(self.lacking(sequence, num_tokens)):
            block = self._free.popleft() if self._free else self._cache.evict()
            self._holders[block] = 1
            sequence.blocks.append(block)

    def admit(self, sequence: Sequence) -> bool:
        """Blocks for all tokens of a sequence that has none, cached ones first; those count as computed.

        False if they are not to be had; then nothing has changed.
        """
        found = self._find(sequence)
        idle = sum(1 for block in found if self._cache.is_idle(block))
        if self.blocks_for(sequence.num_tokens) - len(found) > self.num_free - idle:
            return False
        for block in found:
            self._cache.hold(block)
            self._holders[block] += 1
        sequence.blocks = found
        sequence.num_computed = len(found) * self.block_size
        self._count(sequence)
        self.grow(sequence, sequence.num_tokens)
        return True

    def num_found(self, sequence: Sequence) -> int:
        """Tokens of a sequence that has no blocks which `admit` would find in the cache now."""
        return len(self._find(sequence)) * self.block_size

    def publish(self, sequence: Sequence, start: int) -> None:
        """Tokens from `start` to `num_computed` are in the cache now: blocks that became full can be found."""
        first, full = start // self.block_size, sequence.num_computed // self.block_size
        if not self.prefix_caching or first == full:
            return
        names = digests(sequence, full, self.block_size)
        for index in range(first, full):
            self._cache.put(names[index], sequence.blocks[index])

    def trim(self, sequence: Sequence) -> None:
        """Take back blocks that hold none of its tokens: they were for drafts. Nobody else ever had them."""
        for _ in range(len(sequence.blocks) - self.blocks_for(sequence.num_tokens)):
            block = sequence.blocks.pop()
            self._holders[block] = 0
            self._free.appendleft(block)

    def release(self, sequence: Sequence) -> None:
        # Ends before beginnings: what fewer can use is given up first. Last in, first out for blocks that hold nothing
        # of use: recently used memory is still in the processor's caches.
        for block in reversed(sequence.blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._cache:
                self._cache.leave(block)
            else:
                self._free.appendleft(block)
        sequence.blocks.clear()

    def check(self, sequences: list[Sequence]) -> None:
        """Every block is held, cached or free, and nothing that may be written is shared. Raises AssertionError."""
        held = Counter(block for sequence in sequences for block in sequence.blocks)
        everything = sorted([*held, *self._cache.idle, *self._free])
        if everything != list(range(self.num_blocks)) or held != +Counter(dict(enumerate(self._holders))):
            raise AssertionError(
                f"KV blocks leaked: {held.total()} owned, {self.num_free} free of {self.num_blocks}"
            )
        self._cache.check()
        for sequence in sequences:
            for block in sequence.blocks[sequence.num_computed // self.block_size :]:
                if held[block] > 1 or block in self._cache:
                    raise AssertionError(f"KV block {block} of '{sequence.id}' is shared before it is full")

    def _find(self, sequence: Sequence) -> list[int]:
        if not self.prefix_caching:
            return []
        count = sequence.num_reusable // self.block_size
        return self._cache.find(digests(sequence, count, self.block_size))

    def _count(self, sequence: Sequence) -> None:
        if sequence.num_cached is not None:  # it was preempted: what it finds is mostly its own
            return
        sequence.num_cached = sequence.num_computed
        if self.prefix_caching and sequence.num_reusable:
            self.queries += sequence.num_tokens
            self.hits += sequence.num_cached
