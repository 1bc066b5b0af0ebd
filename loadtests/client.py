"""The load generator: all requests of a round at once over HTTP, streamed, and when each piece came back.

Promises: greedy requests of fixed length (`ignore_eos`), every stream finished with exactly the tokens it asked
for, or BenchError; while a round runs, bytes are only time-stamped, and parsed afterwards, because client and
server share the machine. Times are seconds since the first submit. A piece is one event with text: usually one
token, more where several tokens make one character. Does not judge what the tokens are (parity.py).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx

from loadtests import BenchError

_TIMEOUT = httpx.Timeout(1800, connect=10)


@dataclass(frozen=True)
class Request:
    """One request of a round. `adapter` None is the base. With a `salt` it shares a prefix cache with others of the same."""

    prompt: list[int]
    adapter: str | None
    new_tokens: int
    salt: str | None = None


@dataclass(frozen=True)
class Stream:
    """One answer."""

    submitted: float
    arrivals: list[float]  # of each piece of text; never empty
    ended: float  # when the finish reason came
    text: str
    tokens: int
    token_names: list[str]  # only if they were asked for
    cached_tokens: int = 0  # of the prompt, from the server's prefix cache

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.submitted

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True)
class Load:
    """One round, and the rates read off it."""

    streams: list[Stream]
    prompt_tokens: int
    client_cpu: float = field(default=0.0)  # share of one core that this client used

    @property
    def seconds(self) -> float:
        """First submit to last finish."""
        return max(stream.ended for stream in self.streams)

    @property
    def gaps(self) -> list[float]:
        """Seconds between two tokens of a stream once all talk: before that, streams also wait for each other's prompts."""
        start = max(stream.arrivals[0] for stream in self.streams)
        return [
            later - sooner
            for stream in self.streams
            for sooner, later in zip(stream.arrivals, stream.arrivals[1:], strict=False)
            if sooner >= start
        ]

    @property
    def generated_per_s(self) -> float:
        return sum(stream.tokens for stream in self.streams) / self.seconds

    @property
    def prompt_per_s(self) -> float:
        """Prompt tokens until the last stream has its first token: a lower bound, early streams decode meanwhile."""
        return self.prompt_tokens / max(stream.arrivals[0] for stream in self.streams)

    @property
    def decode_per_s(self) -> float | None:
        """Tokens per second while every stream decodes: from the last first token to the first finish."""
        start = max(stream.arrivals[0] for stream in self.streams)
        end = min(stream.ended for stream in self.streams)
        if end <= start:
            return None
        tokens = 0.0
        for stream in self.streams:
            per_piece = stream.tokens / len(stream.arrivals)
            tokens += per_piece * sum(1 for at in stream.arrivals if start < at <= end)
        return tokens / (end - start)


def run_load(
    url: str,
    base: str,
    requests: Sequence[Request],
    *,
    token_names: bool = False,
    extra: Mapping[str, Any] | None = None,
    own: Callable[[Request], Mapping[str, Any]] | None = None,
) -> Load:
    """Submit every request at once and wait for all.

    `token_names` asks for each token's name, which costs time; `extra` are more fields of every body, and `own` those of
    each (servers other than ours need them). With `n` in `extra` a stream carries so many answers. Rounds repeat their
    prompts, so nothing comes from the server's prefix cache unless a request has a `salt`, or `extra` a `cache_salt`.
    """
    fields: dict[str, Any] = {"logprobs": 0} if token_names else {}
    fields |= extra or {}
    bodies = [body_of(base, request, {**fields, **(own(request) if own else {})}) for request in requests]
    return asyncio.run(_run(url, requests, bodies, int(fields.get("n", 1))))


async def _run(url: str, requests: Sequence[Request], bodies: Sequence[dict[str, Any]], answers: int) -> Load:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT, limits=limits, trust_env=False) as client:
        start, cpu = time.perf_counter(), time.process_time()
        try:
            raw = await asyncio.gather(*(_stream(client, body, start) for body in bodies))
        except httpx.HTTPError as error:
            raise BenchError(f"{url}: {error or type(error).__name__}") from error
        share = (time.process_time() - cpu) / (time.perf_counter() - start)
    streams = [
        _parse(*item, answers * request.new_tokens) for item, request in zip(raw, requests, strict=True)
    ]
    return Load(streams, sum(len(request.prompt) for request in requests), share)


def body_of(base: str, request: Request, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What is posted for a request."""
    return {
        "model": request.adapter or base,
        "prompt": request.prompt,
        "max_tokens": request.new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": request.salt or uuid4().hex,
        **extra,
    }


async def _stream(
    client: httpx.AsyncClient, body: dict[str, Any], start: float
) -> tuple[float, list[tuple[float, bytes]]]:
    submitted = time.perf_counter() - start
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            content = await response.aread()
            raise BenchError(f"{body['model']}: HTTP {response.status_code}: {_message(content)}")
        return submitted, [(time.perf_counter() - start, raw) async for raw in response.aiter_raw()]


def _parse(submitted: float, raw: list[tuple[float, bytes]], expected: int) -> Stream:
    arrivals: list[float] = []
    texts: list[str] = []
    names: list[str] = []
    ended, tokens, cached = 0.0, 0, 0
    for at, event in _events(raw):
        if "error" in event:
            raise BenchError(
                f"the server broke off a stream: {event['error'].get('message', event['error'])}"
            )
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
            cached = (event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        for choice in event["choices"]:
            arrivals.append(at)
            texts.append(choice["text"])
            names += (choice.get("logprobs") or {}).get("tokens", [])
            ended = at if choice["finish_reason"] else ended
    if tokens != expected or not ended:
        raise BenchError(f"asked for {expected} tokens, got {tokens}; does the server know ignore_eos?")
    return Stream(submitted, arrivals, ended, "".join(texts), tokens, names, cached)


def _events(raw: list[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """Server-sent events with the time at which they were complete. [DONE] and comments are left out."""
    rest = b""
    for at, chunk in raw:
        *blocks, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for block in blocks:
            data = block.removeprefix(b"data:").strip()
            if data != block and data != b"[DONE]":
                yield at, json.loads(data)


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode(errors="replace")
