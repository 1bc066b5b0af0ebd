"""Who runs in the next step: policy only, no torch, no clock.

Order of a step: every decoding sequence gets its one token; sequences whose prompt is not finished get the rest of the
token budget in chunks; what remains admits waiting ones in fair order (`waiting.py`). While something decodes, long prompts
together get what `pace.py` says, so that they do not stall the streams; short ones get what is left. A sequence whose
adapter is not resident waits alone. What the prefix cache has of a prompt counts as computed when it is admitted. When the
KV cache runs out, the youngest running sequence of the least priority gives its blocks back and is recomputed. Drafts come
last: they get what everybody else left of the step and of the free blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from loramux_adapters.errors import AdapterError
from loramux_server.engine.drafts import Drafter
from loramux_server.engine.kv_cache import BlockManager
from loramux_server.engine.pace import Mix, PromptPace
from loramux_server.engine.sequence import Scheduled, Sequence, Status
from loramux_server.engine.waiting import Verdict, WaitingLine


class AdapterResidency(Protocol):
    """What the scheduler asks of the adapter bank."""

    def prepare(self, generation: str, path: str) -> bool: ...
    def accepts(self, generation: str) -> bool: ...
    def acquire(self, generation: str) -> None: ...
    def release(self, generation: str) -> None: ...


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """`max_num_seqs` run at once; a step computes at most `max_num_batched_tokens` tokens.

    A prompt of which more than `long_prompt_tokens` are to be computed when it is admitted is long; in a step that decodes,
    all long ones together get at most so many.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    quantum: int = 256  # prompt tokens an adapter's queue earns per round
    long_prompt_tokens: int | None = None  # None: none is long


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs in a step, and which sequences failed because their adapter did."""

    scheduled: list[Scheduled] = field(default_factory=list)
    failed: list[tuple[Sequence, AdapterError]] = field(default_factory=list)

    @property
    def mix(self) -> Mix:
        """Before it runs."""
        prompts = [item for item in self.scheduled if item.sequence.num_pending > 1]
        long = sum(item.count for item in prompts if _is_long(item.sequence))
        return Mix(len(self.scheduled) - len(prompts), long, sum(item.count for item in prompts) - long)

    def begins(self, now: float) -> None:
        """At this time, by the clock of `Sequence.arrived`."""
        for item in self.scheduled:
            if item.sequence.queue_seconds is None:
                item.sequence.queue_seconds = now - item.sequence.arrived


def _turn(sequence: Sequence) -> tuple[bool, int]:
    """Decoding first, then unfinished prompts by priority."""
    is_prompt = sequence.num_pending > 1
    return is_prompt, sequence.params.priority if is_prompt else 0


def _is_long(sequence: Sequence) -> bool:
    """Whether it is a long prompt whose tokens are not all computed yet."""
    return sequence.is_long and sequence.num_pending > 1


class Scheduler:
    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockManager,
        adapters: AdapterResidency,
        pace: PromptPace,
        drafter: Drafter | None = None,
    ) -> None:
        self.limits = limits
        self.blocks = blocks
        self.adapters = adapters
        self.drafter = drafter
        self.running: list[Sequence] = []  # oldest first
        self.waiting = WaitingLine(limits.quantum)
        self.preemptions = 0
        self.pace = pace
        self._streams = 0  # that decode in this step
        # Tokens that long prompts may still have of this step; None until one asks.
        self._long_left: int | None = None
        self._ahead: list[Scheduled] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running) or len(self.waiting) > 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.push(sequence)

    def schedule(self) -> Plan:
        plan = Plan()
        self._streams = sum(sequence.num_pending == 1 for sequence in self.running)
        self._long_left = None
        ahead, self._ahead = self._ahead, []
        going_on = [item for item in ahead if item.sequence.status is Status.RUNNING]
        if len(going_on) == len(self.running):
            plan.scheduled.extend(going_on)
        else:
            self._continue_running(plan)
        budget = self.limits.max_num_batched_tokens - sum(item.count for item in plan.scheduled)
        self._admit_waiting(plan, budget)
        if self.drafter is not None:
            self._add_drafts(plan, self.drafter)
        return plan

    def look_ahead(self, items: list[Scheduled]) -> list[Scheduled]:
        """Who goes on after this step, while it runs: all whose next token is not their last.

        Nobody, and the next step is made when it comes, where more than decoding is to be done, or blocks are short. Where
        somebody ends with this step, or joins, the next one has less or more.
        """
        self._ahead = []
        if self.drafter is not None or len(items) != len(self.running):
            return []
        going_on = [one.sequence for one in items if one.sequence.num_left > 1]
        lacking = sum(self.blocks.lacking(one, one.num_tokens + 1) for one in going_on)
        if any(one.sequence.num_pending > 1 for one in items) or lacking > self.blocks.num_free:
            return []
        for sequence in going_on:
            self.blocks.grow(sequence, sequence.num_tokens + 1)
        self._ahead = [Scheduled(sequence, 1) for sequence in going_on]
        return self._ahead

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and give back all it holds."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def _continue_running(self, plan: Plan) -> None:
        budget = self.limits.max_num_batched_tokens
        # Decoding first: a long prompt must not stall the streams that already talk.
        for sequence in sorted(self.running, key=_turn):
            count = self._share(sequence, budget)
            if count == 0 or sequence.status is not Status.RUNNING:
                continue
            if self._make_room(sequence, sequence.num_computed + count, plan):
                self._schedule(sequence, count, plan)
                budget -= count

    def _share(self, sequence: Sequence, left: int) -> int:
        """Tokens of it that this step may compute, of those that are left."""
        left = min(left, self._left_for_long()) if _is_long(sequence) else left
        return min(sequence.num_pending, left)

    def _schedule(self, sequence: Sequence, count: int, plan: Plan) -> None:
        if _is_long(sequence):
            self._long_left = self._left_for_long() - count
        plan.scheduled.append(Scheduled(sequence, count))

    def _keeps_out(self, sequence: Sequence) -> bool:
        """Whether it is long, and prompts that are as urgent have all that long ones may get of this step."""
        limit = self.limits.long_prompt_tokens
        if limit is None or sequence.num_pending <= limit or self._left_for_long() > 0:
            return False
        prompts = [s.params.priority for s in self.running if s.num_pending > 1]
        as_urgent = any(priority <= sequence.params.priority for priority in prompts)
        return as_urgent and sequence.num_pending - self.blocks.num_found(sequence) > limit

    def _left_for_long(self) -> int:
        if self._long_left is None:
            everything = self.limits.max_num_batched_tokens
            self._long_left = self.pace.tokens(self._streams) if self._streams else everything
        return self._long_left

    def _make_room(self, sequence: Sequence, num_tokens: int, plan: Plan) -> bool:
        """Blocks for `num_tokens`, preempting others as needed; False if it was `sequence`'s turn itself."""
        while not self.blocks.can_grow(sequence, num_tokens):
            victim = max(reversed(self.running), key=lambda s: s.params.priority)
            self._preempt(victim)
            plan.scheduled[:] = [item for item in plan.scheduled if item.sequence is not victim]
            if victim is sequence:
                return False
        self.blocks.grow(sequence, num_tokens)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        sequence.status = Status.WAITING
        self.waiting.push(sequence, front=True)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        if sequence.holds_adapter and sequence.adapter is not None:
            self.adapters.release(sequence.adapter.generation)
            sequence.holds_adapter = False

    def _admit_waiting(self, plan: Plan, budget: int) -> None:
        left = budget

        def admit(sequence: Sequence) -> Verdict:
            nonlocal left
            ready = self._adapter_ready(sequence, plan)
            if ready is not Verdict.ADMITTED:
                return ready
            if left <= 0 or len(self.running) >= self.limits.max_num_seqs:
                return Verdict.FULL
            if self._keeps_out(sequence):
                return Verdict.LATER
            # The whole prompt's blocks at once: half-admitted prompts would only preempt each other.
            if not self.blocks.admit(sequence):
                return Verdict.FULL
            if sequence.adapter is not None:
                self.adapters.acquire(sequence.adapter.generation)
                sequence.holds_adapter = True
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            limit = self.limits.long_prompt_tokens
            sequence.is_long = limit is not None and sequence.num_pending > limit
            if count := self._share(sequence, left):  # else it begins with the next step
                self._schedule(sequence, count, plan)
                left -= count
            return Verdict.ADMITTED

        self.waiting.serve(admit)

    def _add_drafts(self, plan: Plan, drafter: Drafter) -> None:
        """Equal shares for decoding sequences; what one does not use goes to those behind it."""
        limit = min(self.limits.max_num_batched_tokens, drafter.step_tokens)
        left = limit - sum(item.count for item in plan.scheduled)
        decoding = [place for place, item in enumerate(plan.scheduled) if item.sequence.num_pending == 1]
        for done, place in enumerate(decoding):
            if left <= 0:
                return
            sequence = plan.scheduled[place].sequence
            drafts = drafter.draft(sequence, -(-left // (len(decoding) - done)))
            count = 1 + len(drafts)
            if drafts and self.blocks.can_grow(sequence, sequence.num_computed + count):
                self.blocks.grow(sequence, sequence.num_computed + count)
                plan.scheduled[place] = Scheduled(sequence, count, drafts)
                left -= len(drafts)

    def _adapter_ready(self, sequence: Sequence, plan: Plan) -> Verdict:
        """Bring the adapter nearer even when the step is full: loading overlaps with the others' decode."""
        if sequence.adapter is None:
            return Verdict.ADMITTED
        try:
            if not self.adapters.prepare(sequence.adapter.generation, sequence.adapter.path):
                return Verdict.NOT_YET
        except AdapterError as error:
            plan.failed.append((sequence, error))
            sequence.status = Status.FINISHED
            return Verdict.DROPPED
        return Verdict.ADMITTED if self.adapters.accepts(sequence.adapter.generation) else Verdict.NOT_YET
