"""How often each adapter was asked since the server started, and when last. In memory; the base is not counted."""

from __future__ import annotations

import time


class Usage:
    """On the event loop's thread, but for `of`, which only reads."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float]] = {}

    def began(self, adapter: str) -> None:
        self._seen[adapter] = (self.of(adapter)[0] + 1, time.time())

    def of(self, adapter: str) -> tuple[int, float | None]:
        """Requests, and Unix seconds when the last one began."""
        return self._seen.get(adapter, (0, None))

    def forget(self, adapter: str) -> None:
        self._seen.pop(adapter, None)
