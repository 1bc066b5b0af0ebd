"""Who may call which route: the layer between the Envelope and the routes.

Promises: a route runs with a principal or not at all, but for those that `scopes.py` says are open; without a key that has
the route's scope the answer is 401 or 403, and while the engine is full 503, before a byte of the body is read. Limits of
the key are counted here. Keys are never logged, and never part of an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack

from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from loramux_adapters.errors import AccessDenied
from loramux_server.api.errors import InvalidKey
from loramux_server.api.middleware import EXTRA_HEADERS
from loramux_server.api.scopes import GENERATING, OPEN, scopes_of
from loramux_server.engine.interface import EngineClient
from loramux_server.keys.guard import Guard
from loramux_server.keys.limits import RateLimited
from loramux_server.keys.principal import Principal, acting_as
from loramux_server.observed import current_request

MAX_KEY_LENGTH = 512
_BEARER = "bearer "
# What other services' clients put a key into, besides Authorization.
_KEY_HEADERS = (b"api-key", b"x-api-key")


class MissingScope(AccessDenied):
    code = "missing_scope"


class Gate:
    """Wraps the routes."""

    def __init__(self, app: ASGIApp, guard: Guard, engine: EngineClient) -> None:
        self._app = app
        self._engine = engine
        self._keys = guard.keys
        self._limits = guard.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = _route(scope)
        needed = scopes_of(scope["method"], route)
        if needed == OPEN:
            await self._app(scope, receive, send)
            return
        who = self._principal(scope)
        observed = current_request()
        if observed is not None:
            observed.key_id = who.key_id or None
        if not who.is_admin and who.scopes.isdisjoint(needed):
            raise MissingScope(
                f"this API key may not do that: it has the scopes {', '.join(sorted(who.scopes))}, and "
                f"{' or '.join(needed)} is needed"
            )
        if route in GENERATING:
            self._engine.check_room()  # whoever cannot be served is told before his prompt is read
        await self._admitted(who, route, scope, receive, send)

    async def _admitted(
        self, who: Principal, route: str | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        observed = current_request()
        try:
            scope[EXTRA_HEADERS] = await self._limits.admit(who)
        except RateLimited as error:
            scope[EXTRA_HEADERS] = error.headers
            raise
        with acting_as(who), ExitStack() as held:
            if route in GENERATING:
                held.enter_context(self._limits.queued(who))
            failed = False
            try:
                await self._app(scope, receive, send)
            except ClientDisconnect:
                raise
            except Exception:
                failed = True
                raise
            finally:
                # Who was refused (a full queue, an engine that restarts) has got nothing; who leaves has cost a prompt.
                if observed is not None and not (failed and observed.first_token is None):
                    await self._limits.charge(who, observed.prompt_tokens + observed.completion_tokens)

    def _principal(self, scope: Scope) -> Principal:
        anybody = self._keys.anybody()
        if anybody is not None:
            return anybody
        key = _key(scope)
        if key is None:
            raise InvalidKey("no API key came with the request; send the header Authorization: Bearer KEY")
        who = self._keys.find(key)
        if who is None:
            raise InvalidKey("the API key is not valid: it is unknown here, has expired or was revoked")
        return who


def every_route(routes: Iterable[BaseRoute]) -> Iterator[BaseRoute]:
    """With those of included routers, in the order they are tried."""
    for route in routes:
        included = getattr(route, "original_router", None)  # FastAPI's, which keeps routers whole
        if included is None:
            yield route
        else:
            yield from every_route(included.routes)


def _route(scope: Scope) -> str | None:
    """The template of the route that will answer; it is the log's and the metrics', too, when the gate stays shut."""
    for route in every_route(scope["app"].routes):
        match, _ = route.matches(scope)
        if match is Match.FULL:
            scope["route"] = route
            return str(getattr(route, "path", ""))
    return None


def _key(scope: Scope) -> str | None:
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name, value)
    given = headers.get(b"authorization", b"").decode("latin-1")
    if given[: len(_BEARER)].lower() == _BEARER:
        return given[len(_BEARER) :].strip()[:MAX_KEY_LENGTH]
    for name in _KEY_HEADERS:
        if name in headers:
            return headers[name].decode("latin-1").strip()[:MAX_KEY_LENGTH]
    return None
