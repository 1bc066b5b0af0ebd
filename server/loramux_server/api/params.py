"""From a request body to sampling parameters: validate, refuse what we cannot honour, fit into the context.

Every refusal is a RequestError whose `param` is the path of the field as the caller wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from loramux_adapters.access import SHARED
from loramux_adapters.errors import ContextLengthExceeded, RequestError
from loramux_server.api.errors import unsupported
from loramux_server.api.protocol import SamplingBody, Strict
from loramux_server.engine.messages import Ready, SamplingParams
from loramux_server.keys.principal import current_access

Body = TypeVar("Body", bound=SamplingBody)
# Of a list: a body may hold a million parts, and the header names no more than 32 fields.
_LOOKED_AT = 1000

AnyBody = TypeVar("AnyBody", bound=Strict)

MAX_STOP_LENGTH = 256  # characters; the search for a stop string is linear in it for every token


@dataclass(frozen=True)
class Budget:
    """How many new tokens may come: those `asked` for, else the `default`, else all that fit."""

    asked: int | None
    default: int | None
    where: str  # the prompt is in: "prompt" or "messages"


def validate(model: type[Body], values: dict[str, object], refused: Mapping[str, tuple[Any, ...]]) -> Body:
    """The body as `model`; `refused` maps the fields we cannot honour to their neutral values."""
    body = parse(model, values)
    refuse(values, refused)
    _check_combinations(body)
    return body


def refuse(values: Mapping[str, object], refused: Mapping[str, tuple[Any, ...]], path: str = "") -> None:
    """Raise RequestError about the first of the fields below `path` that asks for what we cannot do."""
    for name, neutral in refused.items():
        value = values.get(name)
        if value is not None and not any(value == other and type(value) is type(other) for other in neutral):
            raise unsupported(path + name, f"'{path}{name}' is not supported by this server; leave it out")


def parse(model: type[AnyBody], values: dict[str, object]) -> AnyBody:
    """The body as `model`. Raises RequestError about its first fault."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise first_fault(error) from None


def ignored_fields(body: Strict, refused: Collection[str] = ()) -> list[str]:
    """Paths of the fields that nobody here knows, wherever they are; `[]` stands for every place of a list.

    Of a list the first thousand parts are looked at.
    """
    return list(dict.fromkeys(path for path in _unknown(body, "") if path not in refused))


def _unknown(part: BaseModel, prefix: str) -> Iterator[str]:
    yield from (prefix + name for name in part.model_extra or {})
    for name, field in type(part).model_fields.items():
        value, path = getattr(part, name), prefix + (field.alias or name)
        if isinstance(value, BaseModel):
            yield from _unknown(value, f"{path}.")
        # The first tells of all: prompts may be lists of a million token ids. Tools go to the template as they are.
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel) and path != "tools":
            for one in islice(value, _LOOKED_AT):
                yield from _unknown(one, f"{path}[].")


@dataclass(frozen=True)
class Wanted:
    """What an answer has to come with, beside its text."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None


def sampling_params(body: SamplingBody, wanted: Wanted, max_tokens: int, base: Ready) -> SamplingParams:
    """What the engine is told. `n` and stop strings are not its business."""
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {min_tokens} but at most {max_tokens} may come", param="min_tokens"
        )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_given(body.temperature, 1.0),
        # 0 means "only the best token" to OpenAI; an empty nucleus would mean none.
        top_p=max(_given(body.top_p, 1.0), 1e-6),
        top_k=min(max(body.top_k or 0, 0), base.vocab_size),
        min_p=_given(body.min_p, 0.0),
        seed=body.seed,
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias or {}, base.vocab_size),
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=wanted.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
        grammar=wanted.grammar,
        cache_salt=_salt(body.cache_salt),
        priority=_priority(body.priority or 0, base),
    )


def _priority(given: int, base: Ready) -> int:
    if given and base.scheduling_policy != "priority":
        raise RequestError(
            "priority must be 0: this server takes requests as they come; start it with --scheduling-policy priority",
            param="priority",
        )
    return given


def _salt(given: str | None) -> str | None:
    """Tenants share nothing in the prefix cache, whatever their salts."""
    owner = current_access().owner
    return given if owner == SHARED else json.dumps([owner, given])


def stop_strings(body: SamplingBody) -> tuple[str, ...]:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    for place, stop in enumerate(stops):
        path = "stop" if isinstance(body.stop, str) else f"stop[{place}]"
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise RequestError(f"{path} must have 1 to {MAX_STOP_LENGTH} characters", param=path)
    return tuple(stops)


def fit(longest_prompt: int, budget: Budget, max_model_len: int) -> int:
    """The max_tokens to use. Raises ContextLengthExceeded when prompt and answer do not fit."""
    limit = f"This model's maximum context length is {max_model_len} tokens."
    room = max_model_len - longest_prompt
    if budget.asked is not None and budget.asked > room:
        raise ContextLengthExceeded(
            f"{limit} However, you requested {longest_prompt + budget.asked} tokens ({longest_prompt} in the "
            f"{budget.where}, {budget.asked} in the completion). Please reduce the length of the "
            f"{budget.where} or completion.",
            param=budget.where,
        )
    if room < 1:
        raise ContextLengthExceeded(
            f"{limit} However, your {budget.where} resulted in {longest_prompt} tokens. Please reduce the "
            f"length of the {budget.where}.",
            param=budget.where,
        )
    return budget.asked or min(room, budget.default or room)


def _check_combinations(body: SamplingBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError("prompt_logprobs: not together with stream", param="prompt_logprobs")


def _logit_bias(bias: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    for token in bias:
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size):
            raise RequestError(
                f"the keys of logit_bias are token ids from 0 to {vocab_size - 1}", param="logit_bias"
            )
    return {int(token): value for token, value in bias.items()}


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def first_fault(error: ValidationError) -> RequestError:
    """One sentence about the first fault. The input is not repeated: it may be long, or secret."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    path = ""
    for part in faults[0]["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("@"):  # the tag of a union
            path += f".{part}" if path else part
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    message = faults[0]["msg"].removeprefix(
        "Value error, "
    )  # what pydantic puts before a validator's own words
    return RequestError(f"{path}: {message}{more}", param=path)
