"""Who the current request comes from. No HTTP: how somebody proves who he is, is `api/gate.py`'s.

The principal is found through a context variable, so that tasks started for a request have it too. Promises: outside of a
request there is none, and asking for it is an error, never the operator by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

from loramux_adapters.access import OPERATOR, Access

Scope = Literal["infer", "adapters", "train", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True, slots=True)
class Principal:
    """A key that was recognized, without the key. `admin` contains every other scope."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]
    requests_per_minute: int | None = None  # None: as the server has it; 0: no limit
    tokens_per_minute: int | None = None

    @property
    def is_admin(self) -> bool:
        return "admin" in self.scopes

    @property
    def access(self) -> Access:
        """Whose adapters, files and jobs it may use. An admin acts for the server, whatever his key's tenant."""
        if self.is_admin:
            return OPERATOR
        if not self.tenant:
            raise ValueError(f"key {self.key_id} has neither a tenant nor the scope admin")
        return Access(self.tenant)


# Who everybody is as long as no key exists.
ANYBODY = Principal("", "", frozenset({"admin"}))

_current: ContextVar[Principal] = ContextVar("loramux_principal")


def current_principal() -> Principal:
    """Raises LookupError outside of a request that was let in."""
    return _current.get()


def current_access() -> Access:
    return current_principal().access


@contextmanager
def acting_as(principal: Principal) -> Iterator[None]:
    """Make it the current one of this task and of those it starts."""
    token = _current.set(principal)
    try:
        yield
    finally:
        _current.reset(token)
