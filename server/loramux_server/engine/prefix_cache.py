"""Which KV block holds which prefix, and which of those to give up first. No torch; who holds a block is `kv_cache.py`'s.

A full block is named by a digest of the digest before it and its own tokens. The first one hangs from a root made of
what else decides keys and values: the adapter's generation, and a salt that keeps tenants apart. So a digest stands for
everything computed up to its block's end, under one immutable adapter. SHA-256, because two prefixes with one name would be
a wrong answer that nobody notices. Promises: a digest names at most one block; idle blocks are given up least recently
used first.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import OrderedDict

from loramux_server.engine.sequence import Sequence


def _root(sequence: Sequence) -> bytes:
    # JSON, so that no generation and salt read like another pair.
    seed = json.dumps([sequence.generation, sequence.params.cache_salt])
    return hashlib.sha256(seed.encode()).digest()


def digests(sequence: Sequence, count: int, block_size: int) -> list[bytes]:
    """Names of the sequence's first `count` blocks, which are full; kept on it, as tokens never change."""
    known = sequence.digests
    for index in range(len(known), count):
        parent = known[-1] if known else _root(sequence)
        tokens = array("q", sequence.tokens(index * block_size, (index + 1) * block_size))
        known.append(hashlib.sha256(parent + tokens.tobytes()).digest())
    return known[:count]


class PrefixCache:
    """Digests to blocks and back. Idle: named, but no sequence holds it."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def idle(self) -> list[int]:
        return list(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def __contains__(self, block: int) -> bool:
        return block in self._names

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def find(self, names: list[bytes]) -> list[int]:
        """The blocks of the longest prefix that is here."""
        found: list[int] = []
        for name in names:
            block = self._blocks.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def put(self, name: bytes, block: int) -> None:
        """`block` holds what `name` says. If another one does already, that one stays the answer."""
        if name not in self._blocks:
            self._blocks[name] = block
            self._names[block] = name

    def hold(self, block: int) -> None:
        self._idle.pop(block, None)

    def leave(self, block: int) -> None:
        """Nobody holds it any more: the last to be given up."""
        self._idle[block] = None

    def evict(self) -> int:
        """Forget the idle block that was not used for longest."""
        block, _ = self._idle.popitem(last=False)
        del self._blocks[self._names.pop(block)]
        return block

    def check(self) -> None:
        """Names and blocks are one to one. Raises AssertionError."""
        if {block: name for name, block in self._blocks.items()} != self._names:
            raise AssertionError("the prefix cache's names and blocks differ")
        if unnamed := [block for block in self._idle if block not in self._names]:
            raise AssertionError(f"blocks {unnamed} are idle in the prefix cache without a name")
