"""Responses that are kept for `previous_response_id` and GET: in memory, bounded, least recently used first out.

Promises: of each tenant never more than the given count and bytes, and no tenant makes room for another; a response that is
deleted or that made room is unknown at once, while those that go on from it stay whole, because each has its own copy of
what came before. Nobody finds another tenant's. Nothing outlives the process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from loramux_adapters.access import OPERATOR, Access
from loramux_adapters.errors import RequestError
from loramux_server.api.responses_wire import Item, ResponseObject


class UnknownResponse(RequestError):
    code = "response_not_found"


@dataclass(frozen=True)
class Stored:
    body: bytes  # the response as it was answered
    given: tuple[Item, ...]  # the whole conversation that the model was given, without instructions
    output: tuple[Item, ...]
    owner: str

    @property
    def conversation(self) -> tuple[Item, ...]:
        return self.given + self.output


class ResponseStore:
    """The bounds are each tenant's; how many tenants there are is the operator's choice."""

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._kept: dict[str, Stored] = {}
        self._shelves: dict[str, OrderedDict[str, int]] = {}  # owner -> names and sizes, next to go first
        self._outputs: dict[str, str] = {}  # output item -> its response

    def put(self, response: ResponseObject, given: Sequence[Item], access: Access = OPERATOR) -> None:
        """Keep it, and let the least recently used ones go; one that is larger than all the room is not kept."""
        body = msgspec.json.encode(response)
        size = len(body) + len(msgspec.json.encode(given))
        if size > self._max_bytes:
            return
        self._kept[response.id] = Stored(body, tuple(given), tuple(response.output), access.owner)
        self._outputs.update({item.id: response.id for item in response.output})
        shelf = self._shelves.setdefault(access.owner, OrderedDict())
        shelf[response.id] = size
        while len(shelf) > self._max_count or sum(shelf.values()) > self._max_bytes:
            self.delete(next(iter(shelf)))

    def get(self, name: str, access: Access = OPERATOR) -> Stored:
        """Raises UnknownResponse. Using one makes it the last to go."""
        if name not in self._kept or not access.owns(self._kept[name].owner):
            raise UnknownResponse(f"Response with id '{name[:64]}' not found.", param="response_id")
        stored = self._kept[name]
        self._shelves[stored.owner].move_to_end(name)
        return stored

    def item(self, name: str, access: Access = OPERATOR) -> Item | None:
        """An output item of a response that is kept."""
        response = self._outputs.get(name)
        if response is None or not access.owns(self._kept[response].owner):
            return None
        return next(item for item in self.get(response).output if item.id == name)

    def delete(self, name: str, access: Access = OPERATOR) -> None:
        gone = self.get(name, access)
        del self._kept[name]
        shelf = self._shelves[gone.owner]
        del shelf[name]
        if not shelf:
            del self._shelves[gone.owner]
        for item in gone.output:
            del self._outputs[item.id]
