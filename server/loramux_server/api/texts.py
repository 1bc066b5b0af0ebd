"""Text to tokens: plain prompts and chat messages, one at a time and off the event loop.

Promises: a chat is rendered by the template of the base (or the one given at start) and by nothing else, and
a fault of the template is the caller's 400, never a 500. It does not check lengths: params.py does, which
knows the limits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import anyio
from jinja2.exceptions import TemplateError

from loramux_adapters.errors import RequestError
from loramux_server.api.detokenize import Pieces
from loramux_server.api.tools import ToolPlan, for_template

T = TypeVar("T")

# The arguments of apply_chat_template that are not variables of the template.
_RESERVED = frozenset(
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "tokenize", "tokenizer_kwargs"),
        *("add_generation_prompt", "continue_final_message", "sanitize_control_tokens", "padding"),
        *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    )
)


class Texts:
    """The tokenizer of the base, for everything but decoding."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.pieces = Pieces(tokenizer)
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        # Fast tokenizers cannot be used by two threads at once; long prompts must not hold the event loop.
        self._one_at_a_time = anyio.CapacityLimiter(1)

    def another(self) -> tuple[Any, str | None]:
        """A tokenizer of one's own, for what takes long, and the template that is used instead of its own."""
        return copy.deepcopy(self._tokenizer), self._chat_template

    async def encode(self, texts: Sequence[str], *, specials: bool = True) -> list[list[int]]:
        """Plain prompts, with the special tokens that the tokenizer adds by itself, or without."""
        return await self._off_loop(
            lambda: [list(self._tokenizer.encode(text, add_special_tokens=specials)) for text in texts]
        )

    def chat_template(self, *, tools: bool = False) -> str:
        """The template that writes conversations, with tools or without. Raises RequestError if there is none."""
        if self._chat_template is None and not self._tokenizer.chat_template:
            raise RequestError(
                "this base has no chat template; use /v1/completions, or start the server with "
                "--chat-template",
                param="messages",
                code="no_chat_template",
            )
        if self._chat_template is not None:
            return self._chat_template
        try:
            return str(self._tokenizer.get_chat_template(None, [{}] if tools else None))
        except ValueError as error:  # several templates, none of them the default
            raise RequestError(
                "this base has several chat templates and no default; start the server with --chat-template",
                param="messages",
                code="no_chat_template",
            ) from error

    def vocabulary_ids(self, tokens: Iterable[str]) -> list[int | None]:
        """The id of each, None where the vocabulary has no such token."""
        ids = ((one, self._tokenizer.convert_tokens_to_ids(one)) for one in tokens)
        return [
            number if number is not None and self._tokenizer.convert_ids_to_tokens(number) == one else None
            for one, number in ids
        ]

    def marker_tokens(self, markers: Iterable[str]) -> frozenset[int]:
        """Those of `markers` that are one special token of this tokenizer."""
        ids = self.vocabulary_ids(markers)  # the tokenizer itself takes what it lacks for its unknown token
        return frozenset(one for one in ids if one is not None and self.pieces.is_special(one))

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        variables: Mapping[str, object],
        plan: ToolPlan | None = None,
        *,
        for_answer: bool = True,
    ) -> list[int]:
        """A conversation as the base's template writes it, up to where the assistant's turn begins if `for_answer`."""
        template = self.chat_template(tools=plan is not None)
        messages, tools = for_template(template, messages, plan)
        if reserved := sorted(_RESERVED & set(variables)):
            raise RequestError(
                f"'{reserved[0]}' is not a variable of a chat template",
                param=f"chat_template_kwargs.{reserved[0]}",
            )
        return await self._off_loop(
            lambda: self._render(
                messages,
                {
                    **variables,
                    "tools": tools,
                    "chat_template": template,
                    "add_generation_prompt": for_answer,
                },
            )
        )

    def _render(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        # A template is a program: on messages it was not written for it raises what programs raise.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            raise RequestError(
                f"the chat template does not accept these messages: {error}",
                param="messages",
                code="chat_template_error",
            ) from error
        # The template wrote the special tokens already.
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._one_at_a_time)
