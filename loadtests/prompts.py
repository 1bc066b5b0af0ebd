"""Prompts of any length in plain English, made from a few phrases: the same in every call, different in every stream.

Random token ids would do for timing, but put a model into a state where 16-bit rounding alone moves logits by more than
half, and then a check of the answers says little.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Encode = Callable[[str], list[int]]

_WHO = (
    "The old sailor", "A young teacher", "Our neighbour", "The night train", "A small robot", "The village baker",
    "My grandmother", "The engineer",
)  # fmt: skip
_DID = ("carried", "painted", "remembered", "repaired", "described", "lost", "sold", "discovered")
_WHAT = (
    "a green lamp", "the broken clock", "seven letters", "a map of the coast", "the last ticket", "an empty notebook",
    "two brass keys", "a jar of honey",
)  # fmt: skip
_WHEN = (
    "before the rain began", "in the middle of winter", "while everybody slept", "on the way to the harbour",
    "after the long meeting", "because nobody else would", "at the edge of the forest", "during the festival",
)  # fmt: skip


def make_prompts(encode: Encode, count: int, tokens: int) -> list[list[int]]:
    """`count` prompts of exactly `tokens` tokens each."""
    rng = random.Random("loramux")
    return [_prompt(encode, rng, tokens) for _ in range(count)]


def make_repetitions(encode: Encode, count: int, tokens: int) -> list[list[int]]:
    """`count` prompts that hold a numbered list of at least `tokens` tokens and begin to say it again."""
    rng = random.Random("loramux")
    return [
        encode(f"A list:\n\n{_list(encode, rng, tokens)}\n\nThe same list again:\n\n1.") for _ in range(count)
    ]


def _list(encode: Encode, rng: random.Random, tokens: int) -> str:
    entries: list[str] = []
    for number, sentence in enumerate(_sentences(rng), 1):
        entries.append(f"{number}. {sentence.strip()}")
        if len(encode("\n".join(entries))) >= tokens:
            break
    return "\n".join(entries)


def _prompt(encode: Encode, rng: random.Random, tokens: int) -> list[int]:
    prompt: list[int] = []
    for sentence in _sentences(rng):
        prompt += encode(sentence)
        if len(prompt) >= tokens:
            break
    return prompt[:tokens]


def _sentences(rng: random.Random) -> Iterator[str]:
    while True:
        yield " ".join(rng.choice(phrases) for phrases in (_WHO, _DID, _WHAT, _WHEN)) + ". "
