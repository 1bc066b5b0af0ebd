"""How many tokens of long prompts a step computes while others decode. Policy, no torch, no clock.

What it promises, as far as steps take what the last ones took: a step with a part of a long prompt takes at most twice as
long as one that only decodes, so that streams keep half their speed beside long prompts, however many those are. The
exception: a part is never smaller than `LEAST_TOKENS`, because then the prompt would mostly pay for what every step costs.
What it does not promise: anything about short prompts, which are computed at once.

How long decoding alone takes changes with the streams, so every now and then a step does nothing else.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

# By kind of device. A CPU multiplies 16 rows at once; a CUDA device waits for the host in a step that is no recording.
LEAST_TOKENS = {"cpu": 16, "cuda": 128}
_SLOWDOWN = 1.8  # what is aimed at: the slowest steps of a hundred are to be within 2
_LATEST = 5  # of each figure the median of so many is believed
_EVERY = 16  # steps with parts of long prompts before one without
_ALIKE = 1.25  # steps whose numbers of streams differ by no more take about as long


@dataclass(frozen=True, slots=True)
class Mix:
    """Tokens of a step: of sequences that decode, of long prompts beside them, and of all other prompts."""

    decoding: int
    long: int
    other: int


class PromptPace:
    """Told what every step took; says how much of long prompts fits into the next one."""

    def __init__(self, least: int, most: int) -> None:
        """From `least` to `most` tokens; `most` while it is not known how long decoding takes."""
        self._least = min(least, most)
        self._most = most
        # Streams and seconds of steps that only decoded; by how many seconds a token of long prompts made others longer.
        self._alone: deque[tuple[int, float]] = deque(maxlen=_LATEST)
        self._each: deque[float] = deque(maxlen=_LATEST)
        self._parts = 0  # of long prompts, since the last step that only decoded

    def tokens(self, streams: int) -> int:
        """Of long prompts, in the next step, in which so many streams decode; never 0 twice in a row."""
        alone = self._decoding(streams)
        if self._parts > 0 and (alone is None or self._parts >= _EVERY):
            self._parts = 0
            return 0
        self._parts += 1
        if alone is None:
            return self._most
        if not self._each:
            return self._least
        room, each = (_SLOWDOWN - 1) * alone, median(self._each)
        if each * self._most <= room:
            return self._most
        return max(self._least, int(room / each) // self._least * self._least)

    def took(self, mix: Mix, seconds: float) -> None:
        """A step of this mix took so long."""
        if not mix.decoding or mix.other:
            return
        if not mix.long:
            self._alone.append((mix.decoding, seconds))
            self._parts = 0
        elif (alone := self._decoding(mix.decoding)) is not None:
            self._each.append((seconds - alone) / mix.long)

    def _decoding(self, streams: int) -> float | None:
        """Seconds of a step in which so many streams decode and nothing else happens, if one was seen lately."""
        most, least = streams * _ALIKE, streams / _ALIKE
        alike = [seconds for seen, seconds in self._alone if least <= seen <= most]
        return median(alike) if alike else None
