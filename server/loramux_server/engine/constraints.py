"""Grammars that answers have to match, as matchers of llguidance: https://github.com/guidance-ai/llguidance.

Promises: compiling happens on a thread of its own, the tokenizer is read there on the first use, and a grammar that was
compiled lately is copied; a matcher allows the model's end tokens exactly where the grammar is complete. A grammar that
cannot be used ends its own request. What a grammar may say is checked by the front, which has the sentence for the client.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher, LLTokenizer

_KEPT = 64  # compiled grammars


class Constraint:
    """One sequence's place in its grammar."""

    def __init__(self, compiled: Future[LLMatcher]) -> None:
        self._compiled = compiled
        self._error = ""

    @property
    def is_ready(self) -> bool:
        """Compiled, or failed to be."""
        return self._compiled.done()

    @property
    def error(self) -> str:
        """Why this sequence cannot go on; empty while it can."""
        if not self._error and self._compiled.done():
            failure = self._compiled.exception()
            if failure is not None:
                self._error = f"the grammar cannot be used: {failure}"
            elif self._matcher.is_error():
                reason = self._matcher.get_error().partition("\n")[0][:300]
                self._error = f"the grammar cannot be followed any further: {reason}"
        return self._error

    def allowed(self) -> bytes:
        """A bit per token id, lowest first: may it come next? Nothing may, once there is an `error`."""
        bits = self._matcher.compute_bitmask()
        return b"\0" * len(bits) if self.error else bits

    def accept(self, token: int) -> None:
        """`token` came. A token that was not allowed is an `error`."""
        self._matcher.consume_token(token)

    @property
    def _matcher(self) -> LLMatcher:
        return self._compiled.result()


class Grammars:
    """Compiles the grammars of an engine."""

    def __init__(self, read_tokenizer: Callable[[], LLTokenizer]) -> None:
        """`read_tokenizer` is called once, on the compiling thread."""
        self._read_tokenizer = read_tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def compile(self, grammar: str) -> Constraint:
        return Constraint(self._thread.submit(self._matcher, grammar))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _matcher(self, grammar: str) -> LLMatcher:
        known = self._compiled.get(grammar)
        if known is None:
            if self._tokenizer is None:
                self._tokenizer = self._read_tokenizer()
            known = LLMatcher(self._tokenizer, grammar, log_level=0)
            if known.is_error():
                raise ValueError(known.get_error().partition("\n")[0][:300])
            self._compiled[grammar] = known
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        else:
            self._compiled.move_to_end(grammar)
        return known.deep_copy()


def read_tokenizer(
    model: str, revision: str | None, vocab_size: int, end_tokens: tuple[int, ...]
) -> LLTokenizer:
    """The base's tokenizer, with the model's end tokens and as many ids as it has logits."""
    from llguidance.hf import from_tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError("the base's tokenizer is not a fast one")
    vocab = max(vocab_size, len(tokenizer))
    return from_tokenizer(tokenizer, n_vocab=vocab, eos_token=list(end_tokens) or None)
