"""Tokens to text as they come, in constant time per token, with no character torn apart.

Promises: what `push` and `flush` return, joined, is what the tokenizer's own
`decode(skip_special_tokens=True)` gives for all the tokens, and no piece ends in the middle of a character.
One deliberate difference: where byte-fallback tokens spell bytes that are not UTF-8, `decode` turns the whole
run into U+FFFD, also the good characters in it; here those were sent already and stay, and only the bad bytes
become U+FFFD. The library's own `DecodeStream` is not used, because it has no flush and withholds everything
from the first invalid byte on.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

REPLACEMENT = "\ufffd"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """The printable stand-in of every byte in byte-level vocabularies, as GPT-2 defined it."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return alphabet


class Pieces:
    """What every token of one tokenizer stands for. Shared by all sequences; filled as tokens are met."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(int(token) for token, entry in added.items() if entry.special)
        self._decoders = _decoder_steps(tokenizer)
        self._bytes: dict[int, bytes] = {}

    @property
    def bytewise(self) -> bool:
        """Every token stands for fixed bytes; else only the tokenizer itself knows how tokens join."""
        return self._decoders is not None

    @property
    def strips_first_space(self) -> bool:
        return self._decoders is not None and "strip" in self._decoders

    def is_special(self, token: int) -> bool:
        return token in self._special

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token, special tokens by their name; empty for ids that the tokenizer lacks."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._look_up(token)
        return known

    def name_of(self, token: int) -> str:
        """As the vocabulary writes it; empty for ids that the tokenizer lacks."""
        return str(self._tokenizer.convert_ids_to_tokens(token) or "")

    def decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def _look_up(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._decoders is None:
            return self.decode([token]).encode() or str(piece).encode()
        if "bytelevel" in self._decoders:
            alphabet = byte_alphabet()
            if all(char in alphabet for char in piece):
                return bytes(alphabet[char] for char in piece)
            return str(piece).encode()
        if "fallback" in self._decoders and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return str(piece).replace("▁", " ").encode()


def _decoder_steps(tokenizer: Any) -> frozenset[str] | None:
    """Which of the known ways of joining tokens this tokenizer uses; None if it does anything else."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    decoder = json.loads(backend.to_str())["decoder"] or {"type": "none"}
    steps: set[str] = set()
    for step in decoder.get("decoders", [decoder]):
        match step:
            case {"type": "ByteLevel"}:
                steps.add("bytelevel")
            case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
                pass
            case {"type": "ByteFallback"}:
                steps.add("fallback")
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                steps.add("strip")
            case _:
                return None
    return frozenset(steps)


class Detokenizer:
    """The text of one sequence."""

    def __init__(self, pieces: Pieces, kept: frozenset[int] = frozenset()) -> None:
        """`kept` are special tokens that are text here."""
        self._pieces = pieces
        self._kept = kept
        self._joiner: _BytewiseJoiner | _WindowJoiner = (
            _BytewiseJoiner(pieces) if pieces.bytewise else _WindowJoiner(pieces)
        )

    def push(self, token: int) -> str:
        """The text that is certain with this token; often empty in the middle of a character."""
        if not self._pieces.is_special(token):
            return self._joiner.push(token)
        if token not in self._kept:
            return ""
        return self._joiner.flush() + self._pieces.bytes_of(token).decode()

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._joiner.flush()

    @classmethod
    def text(cls, pieces: Pieces, tokens: Sequence[int], *, specials: bool = False) -> str:
        """The text of `tokens`; special ones are named in it or left out."""
        detokenizer = cls(pieces, frozenset(tokens) if specials else frozenset())
        return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()


class _BytewiseJoiner:
    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = pieces.strips_first_space

    def push(self, token: int) -> str:
        return self._stripped(self._decoder.decode(self._pieces.bytes_of(token)))

    def flush(self) -> str:
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if text and self._strip:
            self._strip = False
            return text.removeprefix(" ")
        return text


class _WindowJoiner:
    """For other decoders: decode the last tokens with and without the new ones, and send the difference."""

    # No character takes more tokens than it has bytes; what is still incomplete after that never completes.
    PATIENCE = 8

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._sent: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        self._waiting.append(token)
        text = self._difference()
        if len(self._waiting) < self.PATIENCE and (not text or text.endswith(REPLACEMENT)):
            return ""
        return self._take(text)

    def flush(self) -> str:
        return self._take(self._difference())

    def _difference(self) -> str:
        known = self._pieces.decode(self._sent)
        return self._pieces.decode(self._sent + self._waiting)[len(known) :]

    def _take(self, text: str) -> str:
        # Tokens without text are no context for what follows: keep the last ones that had some.
        self._sent, self._waiting = (self._waiting if text else self._sent), []
        return text
