"""Run the sequences of one request on the engine and turn their tokens into pieces of text.

Promises: one engine request per prompt and choice, all closed (and so aborted) when the consumer stops, fails
or is cancelled; stop strings are honoured across tokens; a sequence that the engine could not finish raises.
It knows nothing of the wire's shapes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

import msgspec

from loramux_adapters.errors import EngineError
from loramux_server.api.detokenize import Detokenizer, Pieces
from loramux_server.api.errors import engine_failure
from loramux_server.api.models import Target
from loramux_server.api.stops import StopMatcher
from loramux_server.engine.interface import EngineClient
from loramux_server.engine.messages import SamplingParams, TokenLogprobs, TokenOutput
from loramux_server.metrics import Metrics

EndReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Ask:
    """What one HTTP request asks of the engine: `n` sequences for each prompt, of which the best are `returned`."""

    id: str
    target: Target
    prompts: Sequence[list[int]]
    n: int
    params: SamplingParams
    stops: tuple[str, ...]
    best: int | None = None  # this many are returned; None: all
    scores_only: bool = False  # what is generated is dropped: the prompt's log-probabilities are the answer
    scores_end: bool = False  # the end token has an entry in the log-probabilities, too
    kept_tokens: frozenset[int] = frozenset()  # special tokens that are part of the text

    @property
    def returned(self) -> int:
        return self.n if self.best is None else self.best


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of the answer, its log-probabilities, and where its text begins in the answer."""

    token: int
    offset: int
    scores: TokenLogprobs


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new in one choice. `finish` is set once, on its last piece."""

    index: int
    text: str
    tokens: int
    scored: list[ScoredToken]
    finish: EndReason | None
    cached_tokens: int
    logprob: float = 0.0  # of all its tokens, if they have any
    prompt_scores: list[TokenLogprobs] | None = (
        None  # once, if asked for: of the prompt's tokens but the first
    )


async def run(
    engine: EngineClient, ask: Ask, pieces: Pieces, metrics: Metrics
) -> AsyncGenerator[Piece, None]:
    """All choices of a request, as their tokens come. Choice i of prompt p has index p * n + i."""
    streams = [_run_choice(engine, ask, index, pieces, metrics) for index in range(len(ask.prompts) * ask.n)]
    async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as merged:
        async for piece in merged:
            yield piece


async def _run_choice(
    engine: EngineClient, ask: Ask, index: int, pieces: Pieces, metrics: Metrics
) -> AsyncGenerator[Piece, None]:
    prompt_index, choice = divmod(index, ask.n)
    prompt, params = ask.prompts[prompt_index], ask.params
    if params.seed is not None and choice:
        params = msgspec.structs.replace(params, seed=(params.seed + choice) % 2**63)
    assembler = _Assembler(index, params, ask, pieces)
    adapter = ask.target.name if ask.target.adapter else None
    with metrics.request(adapter, len(prompt) if choice == 0 else 0) as tracked:
        outputs = engine.generate(f"{ask.id}-{index}", prompt, params, ask.target.adapter)
        async with aclosing(outputs):
            async for output in outputs:
                if output.finish in ("error", "abort"):
                    raise engine_failure(output.error, output.error_code)
                piece = assembler.take(output)
                tracked.tokens(piece.tokens, output.queue_seconds)
                if piece.finish:
                    tracked.finished(piece.finish)
                yield piece
                if piece.finish and output.finish is None:
                    return  # a stop string: the engine does not know of it and is told by closing `outputs`
        if not tracked.has_finished:
            raise EngineError("the engine ended this request without finishing it")


class _Assembler:
    """One choice: tokens in, text out, stop strings cut off."""

    def __init__(self, index: int, params: SamplingParams, ask: Ask, pieces: Pieces) -> None:
        self._index = index
        self._params = params
        self._scores_end = ask.scores_end
        self._scores_only = ask.scores_only
        self._detokenizer = Detokenizer(pieces, ask.kept_tokens)
        self._stops = StopMatcher(ask.stops)
        self._prompt_scores_due = params.prompt_logprobs is not None
        self._generated = 0
        self._length = 0  # characters decoded, held back or not
        self._unsent: list[ScoredToken] = []

    def take(self, output: TokenOutput) -> Piece:
        scores = (output.prompt_logprobs or []) if self._prompt_scores_due else None
        self._prompt_scores_due = False
        if self._scores_only:
            return Piece(self._index, "", 0, [], "length", output.cached_tokens, prompt_scores=scores)
        text = ""
        taken = 0
        finish: EndReason | None = None
        for place, token in enumerate(output.tokens):
            taken += 1
            is_end = output.finish == "stop" and place == len(output.tokens) - 1
            if output.logprobs and (self._scores_end or not is_end):
                self._unsent.append(ScoredToken(token, self._length, output.logprobs[place]))
            if is_end:
                break  # the end token is no text
            text += self._push(self._detokenizer.push(token))
            if self._stops.cut is not None:
                finish = "stop"
                break
        if finish is None and output.finish is not None:
            text += self._finish()
            finish = "stop" if output.finish == "stop" or self._stops.cut is not None else "length"
        return Piece(
            self._index,
            text,
            taken,
            self._scored(text, finish),
            finish,
            output.cached_tokens,
            sum(one.logprob for one in (output.logprobs or [])[:taken]),
            scores,
        )

    def _push(self, text: str) -> str:
        self._generated += 1
        self._length += len(text)
        if self._generated <= self._params.min_tokens:
            return self._stops.skip(text)
        return self._stops.push(text) if text else ""

    def _finish(self) -> str:
        """The rest: a torn character may complete a stop string, else nothing is held back any more."""
        text = self._push(self._detokenizer.flush())
        return text if self._stops.cut is not None else text + self._stops.flush()

    def _scored(self, text: str, finish: EndReason | None) -> list[ScoredToken]:
        """Scores travel with the text they belong to; those of a stop string are dropped with it."""
        if not text and finish is None:
            return []
        ready, self._unsent = self._unsent, []
        cut = self._stops.cut
        return ready if cut is None else [scored for scored in ready if scored.offset < cut]


async def _merge(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Pieces of all streams in the order they come. The first failure ends all."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Piece, None]) -> None:
        async with aclosing(stream):
            async for piece in stream:
                queue.put_nowait(piece)

    def ended(task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        queue.put_nowait(error if isinstance(error, Exception) else None)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(ended)
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
