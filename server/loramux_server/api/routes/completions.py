"""POST /v1/completions: text or tokens in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import uuid4

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from loramux_adapters.errors import RequestError
from loramux_server.api.answer import Choice, count_sequences, ignored_fields_header, respond
from loramux_server.api.body import read_object
from loramux_server.api.context import ApiContext
from loramux_server.api.detokenize import Detokenizer, Pieces
from loramux_server.api.errors import unsupported
from loramux_server.api.generation import Ask, Piece, ScoredToken
from loramux_server.api.identity import Identity
from loramux_server.api.logprobs import completion_logprobs
from loramux_server.api.openapi import describe
from loramux_server.api.params import Budget, fit, ignored_fields, sampling_params, stop_strings, validate
from loramux_server.api.protocol import UNSUPPORTED_COMPLETION, CompletionBody
from loramux_server.api.wire import Completion, CompletionChoice, CompletionLogprobs, FinishReason, Usage


def completions_router(api: ApiContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=describe(CompletionBody, Completion))
    async def create_completion(request: Request) -> Response:
        """Continue a prompt, or several."""
        values = api.models.with_defaults(await read_object(request, api.settings.max_body_bytes))
        body = validate(CompletionBody, values, UNSUPPORTED_COMPLETION)
        _check(body)
        base = api.engine.ready
        with ExitStack() as held:
            target = held.enter_context(api.models.lease(body.model))
            prompts = await _prompts(api, body, base.vocab_size)
            n = body.n or 1
            count_sequences(len(prompts), n, api.settings.max_sequences_per_request)
            budget = Budget(body.max_tokens, api.settings.default_max_tokens, "prompt")
            max_tokens = fit(max(map(len, prompts)), budget, base.max_model_len)
            params = sampling_params(body, body.logprobs, max_tokens, base)
            ask = Ask(f"cmpl-{uuid4().hex}", target, prompts, n, params, stop_strings(body))
            echoes = _echoes(body, prompts, api.texts.pieces)
            shape = CompletionShape(Identity.of(ask, base), ask, api.texts.pieces, echoes)
            response = await respond(request, api, ask, shape, body, held)
        response.headers.update(ignored_fields_header(ignored_fields(body, UNSUPPORTED_COMPLETION)))
        return response

    return router


@dataclass(frozen=True)
class CompletionShape:
    identity: Identity
    ask: Ask
    pieces: Pieces
    echoes: Sequence[str]  # for each prompt, what comes before its answers

    def opening(self) -> Iterable[Completion]:
        for index in range(len(self.ask.prompts) * self.ask.n):
            if echo := self._echo(index):
                yield self._completion([CompletionChoice(index, echo, None, None)])

    def chunks(self, piece: Piece) -> Iterable[Completion]:
        if piece.text or piece.finish:
            yield self._completion([self._choice(piece.index, piece.text, piece.scored, piece.finish)])

    def empty_chunk(self) -> Completion:
        return self._completion([])

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Completion:
        completion = self._completion(
            [
                self._choice(one.index, self._echo(one.index) + one.text, one.scored, one.finish)
                for one in choices
            ]
        )
        completion.usage = usage
        return completion

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        who = self.identity
        return Completion(who.id, who.created, who.model, who.fingerprint, choices)

    def _choice(
        self, index: int, text: str, scored: Sequence[ScoredToken], finish: FinishReason | None
    ) -> CompletionChoice:
        logprobs: CompletionLogprobs | None = None
        if (top := self.ask.params.logprobs) is not None:
            logprobs = completion_logprobs(self.pieces, scored, top, len(self._echo(index)))
        return CompletionChoice(index, text, logprobs, finish)

    def _echo(self, index: int) -> str:
        return self.echoes[index // self.ask.n]


def _check(body: CompletionBody) -> None:
    if body.best_of not in (None, 1, body.n or 1):
        raise unsupported(
            "best_of", "best_of other than 1 or n is not supported: no choice is thrown away here"
        )
    if body.echo and body.logprobs is not None:
        raise unsupported(
            "echo", "echo together with logprobs is not supported: prompts have no log-probabilities yet"
        )


async def _prompts(api: ApiContext, body: CompletionBody, vocab_size: int) -> list[list[int]]:
    match body.prompt:
        case str() as text:
            prompts, paths = await api.texts.encode([text]), ["prompt"]
        case [str(), *_] as texts:
            prompts = await api.texts.encode([text for text in texts if isinstance(text, str)])
            paths = [f"prompt[{place}]" for place in range(len(prompts))]
        case [int(), *_] as tokens:
            prompts, paths = [[token for token in tokens if isinstance(token, int)]], ["prompt"]
        case lists:
            prompts = [tokens for tokens in lists if isinstance(tokens, list)]
            paths = [f"prompt[{place}]" for place in range(len(prompts))]
    for prompt, path in zip(prompts, paths, strict=True):
        if not prompt:
            raise RequestError(f"{path} is empty, and this base has no token to begin with", param=path)
        if max(prompt) >= vocab_size:
            raise RequestError(f"{path} has a token id that is not below {vocab_size}", param=path)
    return prompts


def _echoes(body: CompletionBody, prompts: Sequence[list[int]], pieces: Pieces) -> list[str]:
    """The prompts as they were written; those that came as tokens as those read."""
    if not body.echo:
        return [""] * len(prompts)
    if isinstance(body.prompt, str):
        return [body.prompt]
    return [
        given if isinstance(given, str) else Detokenizer.text(pieces, tokens)
        for given, tokens in zip(
            body.prompt if len(body.prompt) == len(prompts) else prompts, prompts, strict=True
        )
    ]
