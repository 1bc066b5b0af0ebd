"""A peer that is a server, as a contestant: the same load over HTTP as loramux gets, the same streams, the same clock.

The answers to check come from a round before the timed ones, not streamed, because that is where these servers give token
ids; the timed rounds are held against it by their text.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from loadtests.client import Request, body_of
from loadtests.contestants import Answer, Ours
from loadtests.parity import Tokens
from loadtests.peers.servers import BASE, ServerKind
from loadtests.scenarios import Figure


class HttpPeer(Ours):
    """All requests at once to the server at `url`, which has `adapters` in this order."""

    def __init__(
        self,
        kind: ServerKind,
        url: str,
        adapters: Sequence[str],
        requests: Sequence[Request],
        figure: Figure,
        tokens: Tokens,
    ) -> None:
        super().__init__(kind.name, url, BASE, requests, figure, tokens)
        self.note = f"{kind.note}, over HTTP, streamed"
        self._kind = kind
        if kind.never_ends:
            self.without = tokens.special
        self._own = lambda request: kind.fields(request, adapters)
        self._ids: list[list[int]] = []

    def prepare(self) -> None:
        self._ask(replace(self._requests[0], new_tokens=2))  # what is compiled at first use is compiled now
        with ThreadPoolExecutor(len(self._requests)) as pool:
            asked = list(pool.map(self._ask, self._requests))
        self._ids = [tokens for tokens, _ in asked]
        self._texts = [text for _, text in asked]

    def answers(self) -> list[Answer]:
        return list(zip(self._requests, self._ids, strict=True))

    def _ask(self, request: Request) -> tuple[list[int], str]:
        assert self._own is not None
        plain = {"stream": False, "stream_options": None, **self._own(request)}
        return self._kind.ask(self._url, body_of(BASE, request, plain))
