"""How much each key may ask for: requests and tokens a minute, and answers at once.

Minutes are windows that begin with a key's first request. A request is admitted while there are tokens left, and its tokens,
those of the prompt and those generated, are charged when it ends: how many it will take, nobody knows before. An answer is
one sequence, so that a request counts as often as it asks for answers. For one event loop; kept in memory, so that a
restarted server begins anew.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from loramux_adapters.errors import RequestError
from loramux_server.keys.principal import Principal


class RateLimited(RequestError):
    """Too much of one key. `retry_after` is in seconds, `headers` say what is left."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: float, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.headers = headers or {}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of every key that has none of its own. None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    queued: int | None = None  # answers at once, waiting and running


class KeyLimits:
    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._windows = FixedWindowRateLimiter(MemoryStorage())
        self._open: Counter[str] = Counter()

    async def admit(self, who: Principal) -> Mapping[str, str]:
        """Count a request, and say in OpenAI's headers what is left. Raises RateLimited."""
        headers: dict[str, str] = {}
        for kind in ("requests", "tokens"):
            item = self._item(who, kind)
            if item is None:
                continue
            if kind == "requests":
                admitted = await self._windows.hit(item, kind, who.key_id)
            else:
                admitted = await self._windows.test(item, kind, who.key_id)
            window = await self._windows.get_window_stats(item, kind, who.key_id)
            reset = max(0.0, window.reset_time - time.time())
            headers[f"x-ratelimit-limit-{kind}"] = str(item.amount)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, window.remaining))
            headers[f"x-ratelimit-reset-{kind}"] = f"{reset:.3f}s"
            if not admitted:
                raise RateLimited(
                    f"this key may use {item.amount} {kind} a minute, and has; try again in {reset:.0f} seconds",
                    retry_after=max(1.0, reset),
                    headers=headers,
                )
        return headers

    async def charge(self, who: Principal, tokens: int) -> None:
        """What a request has used, also beyond what was left."""
        item = self._item(who, "tokens")
        if item is not None and tokens:
            await self._windows.hit(item, "tokens", who.key_id, cost=tokens)

    @contextmanager
    def queued(self, who: Principal) -> Iterator[None]:
        """The first answer of a request, from its arrival to its end. Raises RateLimited when the key has too many."""
        with self._places(who, 1):
            yield

    @contextmanager
    def queued_beside(self, who: Principal, answers: int, param: str = "n") -> Iterator[None]:
        """The `answers` that a request wants beside its first. Raises RequestError when the key could never have as many."""
        most = self._limits.queued
        if most is not None and answers >= most:
            raise RequestError(
                f"{param}: the request asks for {answers + 1} answers (prompts times n); this key may have {most} at once",
                param=param,
            )
        with self._places(who, answers):
            yield

    @contextmanager
    def _places(self, who: Principal, answers: int) -> Iterator[None]:
        most = self._limits.queued
        running = self._open[who.key_id]
        if most is not None and running + answers > most:
            raise RateLimited(
                f"this key has {running} answers waiting or running, and may have {most}; try again when one has ended",
                retry_after=1.0,
            )
        taken = Counter({who.key_id: answers})
        self._open += taken
        try:
            yield
        finally:
            self._open -= taken  # which forgets what falls to zero

    def _item(self, who: Principal, kind: str) -> RateLimitItem | None:
        if kind == "requests":
            own, common = who.requests_per_minute, self._limits.requests_per_minute
        else:
            own, common = who.tokens_per_minute, self._limits.tokens_per_minute
        amount = common if own is None else own
        return RateLimitItemPerMinute(amount) if amount else None
