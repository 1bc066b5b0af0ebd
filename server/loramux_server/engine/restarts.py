"""How long a dead worker stays dead: the next one starts at once, or later the more of them have died lately. No torch.

What died longer ago than `RECENT_S` is forgotten: a worker that dies once a day is always replaced at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

DELAYS_S = (0.0, 1.0, 5.0, 15.0)  # the last one repeats
RECENT_S = 600.0


class Restarts:
    """`count` with every start after the first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recent: deque[float] = deque(maxlen=len(DELAYS_S) - 1)
        self.total = 0

    def count(self) -> None:
        self.total += 1
        self._recent.append(self._clock())

    def delay(self) -> float:
        """In seconds, before the next start."""
        while self._recent and self._clock() - self._recent[0] > RECENT_S:
            self._recent.popleft()
        return DELAYS_S[len(self._recent)]
