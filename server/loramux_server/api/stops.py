"""Find stop strings in text that comes in pieces.

Promises: the text released, joined, is the prefix before the first occurrence of any stop string, and text is
held back only as long as it could be the beginning of one. A match that ends earlier wins; of several that
end at the same place, the one that begins first.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class StopMatcher:
    """One sequence's search. `cut` is where the text ends, in characters, once a stop string was found."""

    stops: tuple[str, ...]
    cut: int | None = None
    _held: str = ""
    _released: int = 0
    _longest: int = field(init=False)

    def __post_init__(self) -> None:
        self._longest = max(map(len, self.stops), default=0)

    def push(self, text: str) -> str:
        """The text that can be sent now. Not to be called after `cut` is set."""
        if not self.stops:
            return self._release(text)
        window = self._held + text
        begin = self._first_match(window)
        if begin is not None:
            self._held = ""
            released = self._release(window[:begin])
            self.cut = self._released
            return released
        keep = self._possible_beginning(window)
        self._held = window[len(window) - keep :]
        return self._release(window[: len(window) - keep])

    def skip(self, text: str) -> str:
        """Text in which no stop string counts; it cannot be part of a later match either."""
        released, self._held = self._held + text, ""
        return self._release(released)

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        return self.skip("")

    def _release(self, text: str) -> str:
        self._released += len(text)
        return text

    def _first_match(self, window: str) -> int | None:
        found = [(begin + len(stop), begin) for stop in self.stops if (begin := window.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _possible_beginning(self, window: str) -> int:
        """Length of the longest end of `window` that some stop string begins with."""
        for length in range(min(self._longest - 1, len(window)), 0, -1):
            tail = window[len(window) - length :]
            if any(stop.startswith(tail) for stop in self.stops):
                return length
        return 0
