"""How much of the time between two engine steps training gets while requests decode. Policy, no torch.

What it promises. A gap is the time between two engine steps: what a stream waits between two tokens besides the step
itself. Fewer than one gap in 100 is longer by more than the budget on account of training: the added 99th percentile is
the budget. Slices are measured, and as many are put into a gap as fit if the next takes as long as those before. A slice
that does not fit the budget at all takes one of the few gaps that may be longer, and only after decoding has had three
times as long, so training goes on under any load and with a budget of 0, slowly. A slice that took longer than expected
counts too: what follows waits until the share is kept again. What it does not promise: anything about the wait for a
first token (a request that arrives finds at most one slice under way), nor how long the few long gaps are (a slice).
"""

from __future__ import annotations

from collections import deque

GAPS_PER_OVERRUN = 128  # a share below one in a hundred, and exact in floating point
_SERVING = 3.0  # times as long as an overrun took, decoding goes on before the next


class LatencyBudget:
    """Told of every engine step and slice; says whether another slice may run before the next step."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._latest: deque[float] = deque(maxlen=2)  # slices
        self._left = 0.0  # of the budget, in this gap
        self._untouched = False  # nothing ran in this gap yet
        self._overrun = False  # in this gap
        self._allowed = 0.0  # overruns; below zero, there were too many
        self._owed = 0.0  # seconds of decoding before the next overrun

    def decoded(self, seconds: float) -> None:
        """An engine step that decoded took so long; a gap begins."""
        self._allowed = min(1.0, self._allowed + 1 / GAPS_PER_OVERRUN)
        self._owed = max(0.0, self._owed - seconds)
        self._left = self.seconds
        self._untouched = True
        self._overrun = False

    def allows(self) -> bool:
        """Whether a slice may run now, in a gap of streams that are waiting."""
        if self._allowed < 0 or self._overrun:
            return False
        # Layers follow layers that take as long; of two, the shorter: an optimizer's update is one of a kind.
        if self._latest and min(self._latest) <= self._left:
            return True
        return self._untouched and self._allowed >= 1 and self._owed == 0

    def trained(self, seconds: float, *, decoding: bool) -> None:
        """A slice took so long; `decoding` if streams waited for it."""
        self._latest.append(seconds)
        if not decoding:
            return
        self._untouched = False
        self._left -= seconds
        if self._left < 0 and not self._overrun:
            self._overrun = True
            self._allowed -= 1
            self._owed = _SERVING * seconds
