"""What is known about the HTTP request that the current task works for: for the access log, traces and log lines.

Promises: figures and names only, never a text that a caller sent. The record is found through a context variable, so that
tasks started for a request share its record; outside of a request there is none. Writes nothing anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

# Names of routes are templates of ours; a path that matched none has a caller's text in it.
UNMATCHED = "_unmatched"
CLIENT_LEFT = 499  # no status of HTTP; what proxies log for it


@dataclass
class ObservedRequest:
    """One request, filled in while it runs. Times are seconds of `time.perf_counter`."""

    id: str
    method: str
    route: str = UNMATCHED
    status: int = CLIENT_LEFT  # until one was sent
    error_code: str | None = None
    key_id: str | None = None  # of the key that let it in, never the key
    failed: bool = False  # by a fault of the server, also after the answer had begun
    adapter: str | None = None  # as it is registered; None: the base, or nothing was generated
    generation: str | None = None
    sequences: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    queue_seconds: float | None = None  # of the sequence that waited longest
    began: float = field(default_factory=time.perf_counter)
    began_unix_ns: int = field(default_factory=time.time_ns)
    first_token: float | None = None
    ended: float | None = None

    @property
    def seconds(self) -> float:
        return (self.ended or time.perf_counter()) - self.began

    def sequence_began(self, adapter: str | None, prompt_tokens: int) -> None:
        self.adapter = adapter
        self.sequences += 1
        self.prompt_tokens += prompt_tokens

    def tokens_came(self, count: int, now: float) -> None:
        self.completion_tokens += count
        if self.first_token is None:
            self.first_token = now

    def waited(self, seconds: float) -> None:
        self.queue_seconds = max(self.queue_seconds or 0.0, seconds)


_current: ContextVar[ObservedRequest | None] = ContextVar("loramux_request", default=None)


def current_request() -> ObservedRequest | None:
    return _current.get()


@contextmanager
def observing(request: ObservedRequest) -> Iterator[ObservedRequest]:
    """Make it the current one of this task and of those it starts."""
    token = _current.set(request)
    try:
        yield request
    finally:
        _current.reset(token)
