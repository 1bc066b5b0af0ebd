"""From a conversation to what the engine is asked, and from its text to calls: what chat and responses share.

Promises: one way from messages, tools and constraints to a prompt and a grammar, whichever endpoint they came by. It knows
nothing of the wire's shapes; the fields of an error are those of a chat request.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from uuid import uuid4

from loramux_adapters.errors import RequestError
from loramux_server.api.answer import count_sequences
from loramux_server.api.context import ApiContext
from loramux_server.api.generation import Ask
from loramux_server.api.messages import conversation
from loramux_server.api.params import Budget, Wanted, fit, sampling_params, stop_strings
from loramux_server.api.protocol import ChatBody
from loramux_server.api.structured import OfJson, checked, grammar_of, lark_string, of_schema
from loramux_server.api.texts import Texts
from loramux_server.api.tool_calls import MARKERS, CallReader, Found, call_reader
from loramux_server.api.tools import ToolPlan, dialect_of, plan_tools
from loramux_server.api.wire import FinishReason
from loramux_server.engine.messages import Ready


@dataclass
class AnswerReader:
    """Finds the tool calls in the answers, with a reader for each choice; without tools everything is text."""

    readers: Sequence[CallReader] = ()
    _called: set[int] = field(default_factory=set)  # choices with a call

    def read(self, index: int, text: str, finish: FinishReason | None) -> Found:
        """What the next text of a choice is; with `finish`, also what was held back."""
        if not self.readers:
            return Found(text)
        found = self.readers[index].push(text)
        if finish:
            rest = self.readers[index].finish()
            found = Found(found.text + rest.text, found.calls + rest.calls)
        if found.calls:
            self._called.add(index)
        return found

    def finish_reason(self, index: int, finish: FinishReason) -> FinishReason:
        return "tool_calls" if finish == "stop" and index in self._called else finish


@dataclass(frozen=True)
class ChatAsk:
    ask: Ask
    base: Ready
    answers: AnswerReader


async def chat_ask(
    api: ApiContext, body: ChatBody, held: ExitStack, *, id_prefix: str, where: str = "messages"
) -> ChatAsk:
    """`held` gets the lease of the adapter; `where` is the name of the field with the conversation."""
    wanted, plan = _logprobs(body), plan_tools(body)
    messages = conversation(body.messages, api.models.system_prompt(body.model))
    if plan is not None and plan.forced:
        grammar: str | None = await checked(body, "tool_choice", plan.grammar)
    else:
        grammar = await grammar_of(body, of_schema if plan is None else _json_or_calls(api.texts, plan))
    base = api.engine.ready
    target = await api.models.lease(body.model, held)
    prompt = await api.texts.encode_chat(messages, body.chat_template_kwargs or {}, plan)
    n = body.n or 1
    count_sequences(1, n, api.settings.max_sequences_per_request)
    asked = body.max_completion_tokens or body.max_tokens
    max_tokens = fit(len(prompt), Budget(asked, None, where), base.max_model_len)
    ask = Ask(
        id=f"{id_prefix}{uuid4().hex}",
        target=target,
        prompts=[prompt],
        n=n,
        params=sampling_params(body, Wanted(wanted, body.prompt_logprobs, grammar), max_tokens, base),
        stops=stop_strings(body),
        kept_tokens=frozenset() if plan is None else api.texts.marker_tokens(MARKERS),
    )
    if plan is None:
        return ChatAsk(ask, base, AnswerReader())
    dialect = dialect_of(api.texts.chat_template(tools=True))
    return ChatAsk(ask, base, AnswerReader([call_reader(plan, dialect) for _ in range(n)]))


def _json_or_calls(texts: Texts, plan: ToolPlan) -> OfJson:
    """Where JSON is asked for and a tool may be called, too, an answer is one of both."""

    def marker(name: str) -> str:
        ids = texts.marker_tokens([name])
        return f"<[{next(iter(ids))}]>" if ids else lark_string(name)  # no text matches a special token

    return partial(plan.json_or_calls, texts.chat_template(tools=True), marker)


def _logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return None
