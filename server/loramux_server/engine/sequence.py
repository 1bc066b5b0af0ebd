"""One request inside the engine, and what a step does with it. No torch.

`Sequence` is the only request type past the route; the scheduler, the KV cache and the runner all read and write this
one object.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from loramux_server.engine.messages import AdapterRef, FinishReason, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from loramux_server.engine.drafts import PromptLookup


class Matching(Protocol):
    """What the answer has to match; `constraints.Constraint` is one."""

    @property
    def is_ready(self) -> bool: ...

    @property
    def error(self) -> str: ...

    def allowed(self) -> bytes: ...

    def accept(self, token: int) -> None: ...


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Token ids of a request and how far the cache has come with them.

    `num_computed` tokens have their keys and values in `blocks`. A preempted sequence goes back to 0 and is
    recomputed, prompt and output alike, from the tokens it holds; what the prefix cache still has is taken from there.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    adapter: AdapterRef | None = None
    output: list[int] = field(default_factory=list)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    finish: FinishReason | None = None
    holds_adapter: bool = False
    constraint: Matching | None = None
    prompt_scores: list[TokenLogprobs] = field(default_factory=list)  # of prompt[1:], as far as computed
    digests: list[bytes] = field(default_factory=list)  # names of its first full blocks, as far as asked for
    is_long: bool = False  # more than a short prompt's tokens were to be computed when it was admitted
    num_cached: int | None = None  # tokens the prefix cache had when it first ran
    lookup: PromptLookup | None = None  # where its drafts come from, if it ever could have some
    arrived: float = 0.0  # by the engine's clock
    queue_seconds: float | None = None  # until it first ran

    @property
    def generation(self) -> str | None:
        return None if self.adapter is None else self.adapter.generation

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def num_pending(self) -> int:
        """Tokens known but not yet in the cache. 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def num_left(self) -> int:
        """Tokens that may still come."""
        return self.params.max_tokens - len(self.output)

    @property
    def num_reusable(self) -> int:
        """Tokens that may come from the prefix cache: not the last, nor any whose logits are still to be scored."""
        scored = len(self.prompt_scores)
        if self.params.prompt_logprobs is not None and scored < len(self.prompt) - 1:
            return scored
        return self.num_tokens - 1

    def unscored(self, count: int) -> range:
        """Positions in the next `count` whose logits say how likely the prompt's next token was, still to be scored."""
        if self.params.prompt_logprobs is None:
            return range(0)
        stop = min(self.num_computed + count, len(self.prompt) - 1)
        return range(max(self.num_computed, len(self.prompt_scores)), stop)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions start..stop of prompt + output."""
        split = len(self.prompt)
        if stop <= split:
            return self.prompt[start:stop]
        if start >= split:
            return self.output[start - split : stop - split]
        return self.prompt[start:] + self.output[: stop - split]


@dataclass(frozen=True, slots=True)
class Draw:
    """What a row of logits is for: the next token of `sequence`, if its answer were `output` by then."""

    sequence: Sequence
    output: list[int]


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`count` tokens of `sequence`, from position `sequence.num_computed` on, run in this step.

    The last of them are `drafts`: not known, but likely to come, behind the one token of a decoding sequence.
    """

    sequence: Sequence
    count: int
    drafts: list[int] = field(default_factory=list)

    @property
    def num_known(self) -> int:
        return self.count - len(self.drafts)

    @property
    def tokens(self) -> list[int]:
        start = self.sequence.num_computed
        return self.sequence.tokens(start, start + self.num_known) + self.drafts

    @property
    def samples(self) -> bool:
        """True if this reaches the last known token, so that the step yields the next one."""
        return self.num_known == self.sequence.num_pending

    @property
    def draws(self) -> list[Draw]:
        """The tokens that the step yields if all drafts are right: one, and one for each of them."""
        if not self.samples:
            return []
        output = self.sequence.output
        more = [Draw(self.sequence, output + self.drafts[:n]) for n in range(1, len(self.drafts) + 1)]
        return [Draw(self.sequence, output), *more]

    def smaller(self) -> Scheduled | None:
        """Less of it for a step without memory: no drafts, or else the first half; None of one token."""
        if self.count == 1:
            return None
        return Scheduled(self.sequence, self.num_known if self.drafts else self.count // 2)
