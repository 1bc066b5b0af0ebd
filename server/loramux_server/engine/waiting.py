"""The waiting line: by priority, and within one a queue per adapter, served by deficit round robin. No torch.

Lower numbers go first, as in vLLM: nobody of a higher one is admitted in a step in which one of a lower found no seat or no
memory.

Deficit round robin (Shreedhar and Varghese 1995, https://doi.org/10.1145/217382.217453): every round each adapter's
queue earns `quantum` tokens of prompt and spends what it admits, so that a popular adapter's queue cannot keep a rare
one's waiting, and long prompts pay their length. The base model is a queue like any other.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from enum import Enum, auto

from loramux_server.engine.sequence import Sequence

_MOST_PASSED = 16  # that have to wait, in one step: each is asked again in every step


class Verdict(Enum):
    """What became of the head of a queue."""

    ADMITTED = auto()
    DROPPED = auto()  # it failed for good; look at the next one
    LATER = auto()  # it has to wait for another step; look at the next one
    NOT_YET = auto()  # this adapter's queue has to wait for another step
    FULL = auto()  # nothing more fits into this step


class WaitingLine:
    """All that wait. `serve` offers them by priority."""

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._by_priority: dict[int, WaitingQueue] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_priority.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._by_priority.values():
            yield from queue

    def push(self, sequence: Sequence, *, front: bool = False) -> None:
        queue = self._by_priority.setdefault(sequence.params.priority, WaitingQueue(self._quantum))
        queue.push(sequence, front=front)

    def remove(self, sequence: Sequence) -> None:
        queue = self._by_priority[sequence.params.priority]
        queue.remove(sequence)
        if not queue:
            del self._by_priority[sequence.params.priority]

    def serve(self, admit: Callable[[Sequence], Verdict]) -> None:
        for priority in sorted(self._by_priority):
            if not self._by_priority[priority].serve(admit):
                return
            if not self._by_priority[priority]:
                del self._by_priority[priority]


class WaitingQueue:
    """Those of one priority."""

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._queues: OrderedDict[str | None, deque[Sequence]] = OrderedDict()
        self._deficit: dict[str | None, int] = {}
        self._interrupted: set[str | None] = set()

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def push(self, sequence: Sequence, *, front: bool = False) -> None:
        queue = self._queues.setdefault(sequence.generation, deque())
        self._deficit.setdefault(sequence.generation, 0)
        if front:
            queue.appendleft(sequence)
        else:
            queue.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._queues[sequence.generation].remove(sequence)
        self._forget_if_empty(sequence.generation)

    def serve(self, admit: Callable[[Sequence], Verdict]) -> bool:
        """Offer heads to `admit` in fair order until it says FULL or no queue can go on; whether there is room left.

        A turn that capacity or a loading adapter interrupts goes on where it was, first in the next step: whoever came
        next would otherwise take every bit of room that comes free, and long prompts would starve.
        """
        going = list(self._queues)
        while going:
            for key in list(going):
                verdict = self._serve_one(key, admit)
                if verdict is Verdict.FULL:
                    return False
                if verdict is Verdict.NOT_YET or key not in self._queues:
                    going.remove(key)
        return True

    def _serve_one(self, key: str | None, admit: Callable[[Sequence], Verdict]) -> Verdict | None:
        queue = self._queues[key]
        if key in self._interrupted:
            self._interrupted.remove(key)  # it has earned for this turn already
        else:
            self._deficit[key] += self._quantum
        place = 0  # behind those that keep theirs
        while place < min(len(queue), _MOST_PASSED + 1) and queue[place].num_pending <= self._deficit[key]:
            sequence = queue[place]
            verdict = admit(sequence)
            if verdict is Verdict.LATER:
                place += 1
                continue
            if verdict in (Verdict.NOT_YET, Verdict.FULL):
                self._interrupted.add(key)
                return verdict
            # What is left to compute: tokens that the prefix cache had cost the others nothing.
            self._deficit[key] -= sequence.num_pending
            del queue[place]
        if place:
            self._interrupted.add(key)
            return Verdict.NOT_YET
        self._queues.move_to_end(key)
        self._forget_if_empty(key)
        return None

    def _forget_if_empty(self, key: str | None) -> None:
        if not self._queues[key]:
            del self._queues[key], self._deficit[key]
            self._interrupted.discard(key)
