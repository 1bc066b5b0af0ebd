"""Log-probabilities in the two shapes OpenAI has for them.

A token that is only part of a character is written as `bytes:\\xe2\\x82`, so that different tokens keep
different names; its real bytes are in `bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence

from loramux_server.api.detokenize import Pieces
from loramux_server.api.generation import ScoredToken
from loramux_server.api.wire import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

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
    pieces: Pieces, scored: Sequence[ScoredToken], top: int, offset: int
) -> CompletionLogprobs:
    """`offset` is where the answer begins in the text that is returned (after an echoed prompt)."""
    names = [token_name(pieces, item.token) for item in scored]
    own = [max(item.scores.logprob, LOWEST) for item in scored]
    return CompletionLogprobs(
        text_offset=[offset + item.offset for item in scored],
        tokens=names,
        token_logprobs=own,
        # The sampled token is always among them, also when it is not one of the best.
        top_logprobs=[
            {
                **{
                    token_name(pieces, token): max(logprob, LOWEST)
                    for token, logprob in item.scores.top[:top]
                },
                name: logprob,
            }
            for item, name, logprob in zip(scored, names, own, strict=True)
        ],
    )
