"""Log-probabilities in the two shapes OpenAI has for them.

A token that is only part of a character is written as `bytes:\\xe2\\x82`, so that different tokens keep
different names; its real bytes are in `bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from loramux_server.api.detokenize import Detokenizer, Pieces
from loramux_server.api.generation import ScoredToken
from loramux_server.api.wire import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from loramux_server.engine.messages import TokenLogprobs

LOWEST = -9999.0  # JSON has no minus infinity


def token_name(pieces: Pieces, token: int) -> str:
    raw = pieces.bytes_of(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(pieces: Pieces, scored: Sequence[ScoredToken], top: int) -> ChatLogprobs:
    def entry(item: ScoredToken) -> TokenLogprob:
        return TokenLogprob(
            token_name(pieces, item.token),
            max(item.scores.logprob, LOWEST),
            list(pieces.bytes_of(item.token)),
            [
                TopLogprob(token_name(pieces, token), max(logprob, LOWEST), list(pieces.bytes_of(token)))
                for token, logprob in item.scores.top[:top]
            ],
        )

    return ChatLogprobs([entry(item) for item in scored])


def completion_logprobs(
    pieces: Pieces, scored: Sequence[ScoredToken], top: int, offset: int = 0
) -> CompletionLogprobs:
    """`offset` is where the answer begins in the text that is returned (after an echoed prompt)."""
    return CompletionLogprobs(
        text_offset=[offset + item.offset for item in scored],
        tokens=[token_name(pieces, item.token) for item in scored],
        token_logprobs=[max(item.scores.logprob, LOWEST) for item in scored],
        top_logprobs=[_by_name(pieces, item.token, item.scores, top) for item in scored],
    )


def echoed_logprobs(
    pieces: Pieces, prompt: Sequence[int], scores: Sequence[TokenLogprobs], top: int, echo: str
) -> CompletionLogprobs:
    """The same for a prompt that is put before its answer: nothing comes before its first token, so that has null."""
    detokenizer = Detokenizer(pieces)
    ends = list(accumulate(len(detokenizer.push(token)) for token in prompt))
    return CompletionLogprobs(
        text_offset=[min(end, len(echo)) for end in (0, *ends[:-1])],
        tokens=[token_name(pieces, token) for token in prompt],
        token_logprobs=[None, *(max(one.logprob, LOWEST) for one in scores)],
        top_logprobs=[
            None,
            *(_by_name(pieces, token, one, top) for token, one in zip(prompt[1:], scores, strict=True)),
        ],
    )


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        first.text_offset + second.text_offset,
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
    )


def prompt_logprobs(
    pieces: Pieces, prompt: Sequence[int], scores: Sequence[TokenLogprobs], top: int
) -> PromptLogprobs:
    """vLLM's shape: for each token of the prompt, by token id, itself and the best ones there; null for the first."""
    entries: PromptLogprobs = [None]
    for token, one in zip(prompt[1:], scores, strict=True):
        ranked = {
            other: PromptLogprob(max(logprob, LOWEST), place, token_name(pieces, other))
            for place, (other, logprob) in enumerate(one.top[:top], 1)
        }
        own = PromptLogprob(max(one.logprob, LOWEST), one.rank, token_name(pieces, token))
        entries.append({str(other): entry for other, entry in {**ranked, token: own}.items()})
    return entries


def _by_name(pieces: Pieces, token: int, scores: TokenLogprobs, top: int) -> dict[str, float]:
    """The best ones, and the token itself, also when it is not among them."""
    best = {token_name(pieces, other): max(logprob, LOWEST) for other, logprob in scores.top[:top]}
    return {**best, token_name(pieces, token): max(scores.logprob, LOWEST)}
