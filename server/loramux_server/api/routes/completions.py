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
from loramux_server.api.answer import Choice, chunk_events, count_sequences, ignored_fields_header, respond
from loramux_server.api.body import read_object
from loramux_server.api.context import ApiContext
from loramux_server.api.detokenize import Detokenizer, Pieces
from loramux_server.api.fill_in import fill_in_prompts
from loramux_server.api.generation import Ask, Piece, ScoredToken
from loramux_server.api.identity import Identity
from loramux_server.api.logprobs import completion_logprobs, echoed_logprobs, joined, prompt_logprobs
from loramux_server.api.openapi import describe
from loramux_server.api.params import (
    Budget,
    Wanted,
    fit,
    ignored_fields,
    sampling_params,
    stop_strings,
    validate,
)
from loramux_server.api.protocol import UNSUPPORTED_COMPLETION, CompletionBody
from loramux_server.api.structured import grammar_of
from loramux_server.api.wire import Completion, CompletionChoice, CompletionLogprobs, Usage
from loramux_server.engine.messages import TokenLogprobs


def completions_router(api: ApiContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=describe(CompletionBody, Completion))
    async def create_completion(request: Request) -> Response:
        """Continue a prompt, or several."""
        values = api.models.with_defaults(await read_object(request, api.settings.max_body_bytes))
        body = validate(CompletionBody, values, UNSUPPORTED_COMPLETION)
        sequences = _check(body)
        grammar = await grammar_of(body)
        base = api.engine.ready
        with ExitStack() as held:
            target = await api.models.lease(body.model, held)
            prompts = await _prompts(api, body, base.vocab_size)
            count_sequences(len(prompts), sequences, api.settings.max_sequences_per_request)
            scores_only = body.max_tokens == 0
            asked = 1 if scores_only else body.max_tokens  # the engine scores a prompt on the way to a token
            budget = Budget(asked, api.settings.default_max_tokens, "prompt")
            max_tokens = fit(max(map(len, prompts)), budget, base.max_model_len)
            wanted = Wanted(_logprobs(body, sequences), _prompt_logprobs(body), grammar)
            params = sampling_params(body, wanted, max_tokens, base)
            ask = Ask(
                id=f"cmpl-{uuid4().hex}",
                target=target,
                prompts=prompts,
                n=sequences,
                params=params,
                stops=stop_strings(body),
                best=body.n or 1,
                # Whoever wants the prompt scored counts entries: there has to be one for each token.
                scores_end=bool(body.echo),
                scores_only=scores_only,
            )
            echoes = _echoes(body, prompts, api.texts.pieces)
            shape = CompletionShape(Identity.of(ask, base), ask, api.texts.pieces, echoes, body)
            response = await respond(request, api, ask, shape, chunk_events(shape, body), held)
        response.headers.update(ignored_fields_header(ignored_fields(body, UNSUPPORTED_COMPLETION)))
        return response

    return router


@dataclass(frozen=True)
class CompletionShape:
    identity: Identity
    ask: Ask
    pieces: Pieces
    echoes: Sequence[str]  # for each prompt, what comes before its answers
    body: CompletionBody

    @property
    def _echo_is_scored(self) -> bool:
        return bool(self.body.echo) and self.body.logprobs is not None

    def opening(self) -> Iterable[Completion]:
        for index in range(len(self.ask.prompts) * self.ask.n):
            if (echo := self._echo(index)) and not self._echo_is_scored:
                yield self._completion([CompletionChoice(index, echo, None, None)])

    def chunks(self, piece: Piece) -> Iterable[Completion]:
        if self._echo_is_scored and piece.prompt_scores is not None:
            scores = self._echoed(piece.index, piece.prompt_scores)
            yield self._completion([CompletionChoice(piece.index, self._echo(piece.index), scores, None)])
        if piece.text or piece.finish:
            scored = self._logprobs(piece.index, piece.scored)
            yield self._completion([CompletionChoice(piece.index, piece.text, scored, piece.finish)])

    def empty_chunk(self) -> Completion:
        return self._completion([])

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Completion:
        completion = self._completion([self._whole_choice(one) for one in choices])
        completion.usage = usage
        return completion

    def _whole_choice(self, one: Choice) -> CompletionChoice:
        logprobs = self._logprobs(one.index, one.scored)
        if logprobs is not None and self._echo_is_scored:
            logprobs = joined(self._echoed(one.index, one.prompt_scores), logprobs)
        choice = CompletionChoice(one.index, self._echo(one.index) + one.text, logprobs, one.finish)
        if (top := self.body.prompt_logprobs) is not None:
            prompt = self._prompt(one.index)
            choice.prompt_logprobs = prompt_logprobs(self.pieces, prompt, one.prompt_scores, top)
        return choice

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        who = self.identity
        return Completion(who.id, who.created, who.model, who.fingerprint, choices)

    def _logprobs(self, index: int, scored: Sequence[ScoredToken]) -> CompletionLogprobs | None:
        if (top := self.body.logprobs) is None:
            return None
        return completion_logprobs(self.pieces, scored, top, len(self._echo(index)))

    def _echoed(self, index: int, scores: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        top = self.body.logprobs or 0
        return echoed_logprobs(self.pieces, self._prompt(index), scores, top, self._echo(index))

    def _echo(self, index: int) -> str:
        return self.echoes[index // self.ask.returned]

    def _prompt(self, index: int) -> Sequence[int]:
        return self.ask.prompts[index // self.ask.returned]


def _check(body: CompletionBody) -> int:
    """How many answers to generate for each prompt."""
    if body.max_tokens == 0 and not body.echo:
        raise RequestError(
            "max_tokens: 0 only scores the prompt, which is given back with echo; set echo, or ask for 1 or more",
            param="max_tokens",
        )
    n = body.n or 1
    best_of = body.best_of or n
    if best_of < n:
        raise RequestError(f"best_of is {best_of}, but n is {n}: it cannot be smaller", param="best_of")
    if best_of > n and body.stream:
        raise RequestError(
            "best_of: not together with stream; which answers are best is known at the end", param="best_of"
        )
    return best_of


def _logprobs(body: CompletionBody, sequences: int) -> int | None:
    return 0 if body.logprobs is None and sequences > (body.n or 1) else body.logprobs


def _prompt_logprobs(body: CompletionBody) -> int | None:
    if not body.echo or body.logprobs is None:
        return body.prompt_logprobs
    return max(body.logprobs, body.prompt_logprobs or 0)


async def _prompts(api: ApiContext, body: CompletionBody, vocab_size: int) -> list[list[int]]:
    match body.prompt:
        case _ if body.suffix:
            prompts = await fill_in_prompts(api.texts, body, body.suffix)
            paths = ["prompt"] * len(prompts)
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
