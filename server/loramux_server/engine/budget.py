"""How much of the time between two engine steps training gets while requests decode. Policy, no torch.

What it promises. A gap is the time between two engine steps: what a stream waits between two tokens besides the step
itself. Fewer than one gap in 100 is longer by more than the budget on account of training: the added 99th percentile is
the budget. Slices are known by kind (a layer forward, a layer back, ...), and one runs if what its kind took lately,
with a margin, fits what is left of the gap. The margin grows with every slice that took longer than what was left for it,
and shrinks while none does. Slices that fit no gap share the few gaps that may be longer: up to ten budgets each, or one
slice if that is longer, and only after decoding has had three times as long as the last such gap; so training goes on
under any load and with a budget of 0, slowly. What it does not promise: anything about the wait for a first token (a
request that arrives finds at most one slice under way), nor how long a long gap of one slice is.
"""

from __future__ import annotations

GAPS_PER_OVERRUN = 128  # a share below one in a hundred, and exact in floating point
_SAVED = 4.0  # overruns that may come close together, if there were none for long
_SERVING = 3.0  # times as long as an overrun took, decoding goes on before the next
_LONG = 10.0  # budgets that a gap of slices that fit no other may last
_WEIGHT = 0.1  # of the latest slice, in what its kind is expected to take
# Of the margin: after a surprise, at most, after every gap without one. In balance a surprise comes every 230 gaps,
# which leaves half of the overruns to what fits no gap.
_MORE, _MOST, _CALMER = 1.25, 4.0, 1 - 1 / 1024


class LatencyBudget:
    """Told of every engine step and slice; says whether another slice may run before the next step."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._expected: dict[str, float] = {}  # seconds, by kind of slice
        self._margin = 1.0
        self._left = 0.0  # of the budget, in this gap
        self._untouched = True  # nothing ran in this gap yet
        self._long = False  # this gap is one of the few
        self._allowed = 0.0  # overruns; below zero, there were too many
        self._owed = 0.0  # seconds of decoding before the next gap that is long on purpose

    def decoded(self, seconds: float) -> None:
        """An engine step that decoded took so long; a gap begins."""
        self._allowed = min(_SAVED, self._allowed + 1 / GAPS_PER_OVERRUN)
        self._owed = max(0.0, self._owed - seconds)
        if not self._untouched and not self._long:
            self._margin = max(1.0, self._margin * _CALMER)
        self._left = self.seconds
        self._untouched = True
        self._long = False

    def allows(self, kind: str) -> bool:
        """Whether a slice of this kind may run now, in a gap of streams that are waiting."""
        if self._allowed < 0 and not self._long:
            return False
        expected = self._expected.get(kind)
        if expected is not None and expected * self._margin <= self._left:
            return True
        return self._untouched and self._allowed >= 1 and self._owed == 0

    def trained(self, kind: str, seconds: float, *, decoding: bool) -> None:
        """A slice took so long; `decoding` if streams waited for it."""
        before = self._expected.get(kind, seconds)
        self._expected[kind] = before + _WEIGHT * (seconds - before)
        if not decoding:
            return
        on_purpose = self._untouched and before * self._margin > self._left
        self._untouched = False
        self._left -= seconds
        if self._long:
            self._owed += _SERVING * seconds
        elif self._left < 0:
            self._long = True
            self._allowed -= 1
            self._owed += _SERVING * seconds
            if on_purpose:
                self._left += (_LONG - 1) * self.seconds
            else:
                self._margin = min(_MOST, self._margin * _MORE)
