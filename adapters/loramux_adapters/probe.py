"""The fixed token sequences that a model is run on: texts of several registers, or fixed ids without a tokenizer.

No torch at import: a front without a model reads the texts for the process that has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loramux_adapters.errors import BaseModelError
from loramux_adapters.prompts import PROMPTS

DEFAULT_PROMPTS = 4
DEFAULT_TOKENS = 64
MAX_PROMPTS = len(PROMPTS)


@dataclass(frozen=True, slots=True)
class Probe:
    """Sequences of at least two token ids each, and in words where they are from."""

    tokens: tuple[tuple[int, ...], ...]
    origin: str

    @classmethod
    def of_texts(
        cls, tokenizer: Any, *, prompts: int = DEFAULT_PROMPTS, length: int = DEFAULT_TOKENS
    ) -> Probe:
        """The first `prompts` built-in texts, at most `length` tokens of each."""
        rows = tuple(tuple(tokenizer.encode(text)[:length]) for text in PROMPTS[:prompts])
        return cls(rows, f"{prompts} built-in texts")

    @classmethod
    def of_ids(
        cls, vocabulary: int, *, prompts: int = DEFAULT_PROMPTS, length: int = DEFAULT_TOKENS
    ) -> Probe:
        """Pseudo-random ids, the same at every call: they compare two functions, if not in their usual range."""
        import torch

        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(vocabulary, (prompts, length), generator=generator).tolist()
        return cls(tuple(map(tuple, rows)), f"{prompts} sequences of pseudo-random tokens")

    def check(self, vocabulary: int) -> None:
        """Raises BaseModelError for what the model cannot read."""
        rows: Sequence[Sequence[int]] = self.tokens
        if not rows or any(len(row) < 2 or max(row) >= vocabulary for row in rows):
            raise BaseModelError(
                f"the base's tokenizer does not fit its vocabulary of {vocabulary} tokens", param="tokenizer"
            )
