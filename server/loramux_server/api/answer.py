"""From pieces of text to an HTTP answer, whole or streamed; the part that the endpoints share.

What differs between them is a `Shape`. Usage counts every prompt once, however many choices it has.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from loramux_adapters.errors import RequestError
from loramux_server.api.context import ApiContext
from loramux_server.api.generation import Ask, Piece, ScoredToken, run
from loramux_server.api.protocol import SamplingBody
from loramux_server.api.stream import DONE, EventStream, encode_event, unless_disconnected
from loramux_server.api.wire import (
    ChatChunk,
    Completion,
    FinishReason,
    PromptTokensDetails,
    Usage,
)
from loramux_server.engine.messages import TokenLogprobs
from loramux_server.keys.principal import current_principal


@dataclass
class Choice:
    """One choice, collected."""

    index: int
    texts: list[str] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    finish: FinishReason = "length"
    tokens: int = 0
    logprob: float = 0.0
    prompt_scores: list[TokenLogprobs] = field(default_factory=list)

    @property
    def mean_logprob(self) -> float:
        return self.logprob / max(self.tokens, 1)

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Shape(Protocol):
    """How one endpoint writes an answer."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> msgspec.Struct: ...


class ChunkShape(Shape, Protocol):
    """How one endpoint writes an answer in chunks."""

    def opening(self) -> Iterable[Completion | ChatChunk]:
        """What a stream begins with, once the first token is there."""
        ...

    def chunks(self, piece: Piece) -> Iterable[Completion | ChatChunk]: ...

    def empty_chunk(self) -> Completion | ChatChunk:
        """A chunk without choices, for the usage."""
        ...


class UsageCount:
    """Tokens so far."""

    def __init__(self, ask: Ask) -> None:
        self._n = ask.n
        self._prompt = sum(map(len, ask.prompts))
        self._completion = 0
        self._cached = [0] * len(ask.prompts)

    def add(self, piece: Piece) -> None:
        self._completion += piece.tokens
        prompt, choice = divmod(piece.index, self._n)
        if choice == 0:  # the other choices of a prompt find it in the cache because of this one
            self._cached[prompt] = max(self._cached[prompt], piece.cached_tokens)

    def usage(self) -> Usage:
        return Usage(
            self._prompt,
            self._completion,
            self._prompt + self._completion,
            PromptTokensDetails(sum(self._cached)),
        )


# How an answer is streamed: pieces in, server-sent events out.
Events = Callable[[AsyncGenerator[Piece, None], UsageCount], AsyncGenerator[bytes, None]]


async def respond(
    request: Request, api: ApiContext, ask: Ask, shape: Shape, events: Events | None, held: ExitStack
) -> Response:
    """Run `ask` and answer, with a stream if there are `events`.

    `held` (the adapter's lease, the key's places in the queue) is given back when the last token was sent.
    """
    beside = len(ask.prompts) * ask.n - 1  # the gate has counted one
    param = "prompt" if ask.n == 1 else "n"
    held.enter_context(api.limits.queued_beside(current_principal(), beside, param))
    headers = ask.target.headers
    pieces = run(api.engine, ask, api.texts.pieces, api.metrics)
    if events is not None:
        stream = events(pieces, UsageCount(ask))
        return await EventStream.open(request.receive, stream, held.pop_all(), headers)
    whole = await unless_disconnected(request.receive, _collect(pieces, shape, ask))
    return Response(msgspec.json.encode(whole), headers=headers, media_type="application/json")


def chunk_events(shape: ChunkShape, body: SamplingBody) -> Events | None:
    """The stream of chunks that the body asks for, if it asks for one."""
    return partial(_chunk_events, shape, body) if body.stream else None


def count_sequences(prompts: int, n: int, limit: int) -> None:
    if prompts * n > limit:
        raise RequestError(
            f"this request asks for {prompts * n} sequences (prompts times n); at most {limit} are allowed",
            param="prompt" if n == 1 else "n",
        )


def ignored_fields_header(names: Sequence[str]) -> dict[str, str]:
    """The names of unknown fields, made harmless: they are the caller's text in a header."""
    if not names:
        return {}
    plain = [re.sub(r"[^\x21-\x7e]|,", "?", name[:64]) for name in names[:32]]
    return {"x-loramux-ignored-fields": ", ".join(plain)}


async def _collect(pieces: AsyncGenerator[Piece, None], shape: Shape, ask: Ask) -> msgspec.Struct:
    choices = [Choice(index) for index in range(len(ask.prompts) * ask.n)]
    count = UsageCount(ask)
    async with aclosing(pieces):
        async for piece in pieces:
            count.add(piece)
            choice = choices[piece.index]
            choice.texts.append(piece.text)
            choice.scored += piece.scored
            choice.finish = piece.finish or choice.finish
            choice.tokens += piece.tokens
            choice.logprob += piece.logprob
            choice.prompt_scores += piece.prompt_scores or []
    return shape.whole(_best(choices, ask), count.usage())


def _best(choices: list[Choice], ask: Ask) -> list[Choice]:
    """The likeliest ones of each prompt, per token, if fewer are returned than were generated."""
    if ask.returned == ask.n:
        return choices
    kept = []
    for begin in range(0, len(choices), ask.n):
        ranked = sorted(choices[begin : begin + ask.n], key=lambda one: -one.mean_logprob)
        kept += ranked[: ask.returned]
    for index, choice in enumerate(kept):
        choice.index = index
    return kept


async def _chunk_events(
    shape: ChunkShape, body: SamplingBody, pieces: AsyncGenerator[Piece, None], count: UsageCount
) -> AsyncGenerator[bytes, None]:
    options = body.stream_options
    in_every_chunk = bool(options and options.continuous_usage_stats)
    at_the_end = bool(options and options.include_usage)
    opened = False
    async with aclosing(pieces):
        async for piece in pieces:
            count.add(piece)
            chunks = [*(() if opened else shape.opening()), *shape.chunks(piece)]
            opened = True
            for chunk in chunks:
                if in_every_chunk:
                    chunk.usage = count.usage()
                elif at_the_end:
                    chunk.usage = None
                yield encode_event(chunk)
    if at_the_end:
        last = shape.empty_chunk()
        last.usage = count.usage()
        yield encode_event(last)
    yield DONE
