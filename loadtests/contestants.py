"""Who takes part in a round, seen alike: our server over HTTP, and peers in their processes.

`turn` runs the scenario's requests once and says what that took. Rounds alternate between contestants, so that what the
machine does meanwhile hits all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median, quantiles
from typing import Any, Protocol

from loadtests import BenchError
from loadtests.client import Load, Request, Stream, run_load
from loadtests.parity import Parity, StreamCheck, Tokens, summarize
from loadtests.peers import PEERS, PeerProcess
from loadtests.scenarios import Figure

# A request and its answer; None if the answer's tokens cannot be read from what came back.
Answer = tuple[Request, list[int] | None]


@dataclass(frozen=True)
class Turn:
    """One contestant's part of a round."""

    seconds: float
    rate: float  # tokens per second, of the kind the scenario counts
    details: dict[str, float] = field(default_factory=dict)


class Contestant(Protocol):
    name: str
    note: str
    without: Sequence[int]  # tokens that it never takes

    def prepare(self) -> None:
        """Before the timed rounds: load, warm up."""
        ...

    def turn(self) -> Turn: ...

    def answers(self) -> list[Answer]:
        """After the rounds: the answers to check."""
        ...

    @property
    def repeats(self) -> tuple[int, int]:
        """Streams of the timed rounds, and how many of them answered otherwise than `answers` says."""
        ...


class Ours:
    """loramux: all requests at once over HTTP.

    The answers to check come from a round of the same load before the timed ones, because names of tokens, which tell
    the ids, cost time; the timed rounds are held against it by their text.
    """

    def __init__(
        self, name: str, url: str, base: str, requests: Sequence[Request], figure: Figure, tokens: Tokens
    ) -> None:
        self.name = name
        self.note = "over HTTP, streamed"
        self.without: Sequence[int] = ()
        self._url, self._base, self._figure, self._tokens = url, base, figure, tokens
        self._requests = requests
        self._own: Callable[[Request], Mapping[str, Any]] | None = None  # fields of a request's body
        self._checked: list[Stream] = []
        self._texts: list[str] = []
        self._repeated = self._otherwise = 0

    @property
    def repeats(self) -> tuple[int, int]:
        return self._repeated, self._otherwise

    def prepare(self) -> None:
        self._checked = run_load(self._url, self._base, self._requests, token_names=True).streams
        self._texts = [stream.text for stream in self._checked]

    def turn(self) -> Turn:
        load = run_load(self._url, self._base, self._requests, own=self._own)
        self._repeated += len(load.streams)
        self._otherwise += sum(a.text != b for a, b in zip(load.streams, self._texts, strict=True))
        if self._figure == "decode":
            if load.decode_per_s is None:
                raise BenchError("no moment at which every stream decoded; ask for more new tokens")
            rate = load.decode_per_s
        else:
            rate = _rate(self._figure, load.seconds, self._requests)
        return Turn(load.seconds, rate, _details(load))

    def answers(self) -> list[Answer]:
        found = (self._tokens.ids(stream.token_names) for stream in self._checked)
        return list(zip(self._requests, found, strict=True))


class Peer:
    """A peer process; a one-at-a-time peer may run only some of the requests, at the rate of which it counts."""

    def __init__(self, name: str, process: PeerProcess, requests: Sequence[Request], figure: Figure) -> None:
        kind = PEERS[name]
        self.name = name
        self.note = kind.note
        self.without: Sequence[int] = ()
        self._process, self._mode, self._figure = process, kind.mode, figure
        self._requests = requests[: kind.subset]
        self._turns: list[list[list[int]]] = []
        if len(self._requests) < len(requests):
            self.note += f"; {len(self._requests)} of {len(requests)} requests run, their rate stands for all"

    @property
    def repeats(self) -> tuple[int, int]:
        first, *rest = self._turns
        return len(rest) * len(first), sum(a != b for turn in rest for a, b in zip(turn, first, strict=True))

    def prepare(self) -> None:
        self._process.generate(self._mode, [replace(r, new_tokens=2) for r in self._requests[:2]])

    def turn(self) -> Turn:
        run = self._process.generate(self._mode, self._requests)
        self._turns.append(run.tokens)
        return Turn(run.seconds, _rate(self._figure, run.seconds, self._requests))

    def answers(self) -> list[Answer]:
        return list(zip(self._requests, self._turns[0], strict=True))


def check_answers(
    process: PeerProcess,
    answers: Sequence[Answer],
    tolerance: float,
    repeats: tuple[int, int] = (0, 0),
    without: Sequence[int] = (),
) -> Parity:
    """What the reference, which is `process`, says about them."""
    readable = [(request, tokens) for request, tokens in answers if tokens is not None]
    streams = [{"prompt": r.prompt, "adapter": r.adapter, "tokens": tokens} for r, tokens in readable]
    said = process.call("check", streams=streams, without=list(without))
    checks = [StreamCheck(**item) for item in said["checks"]]
    unread = [None] * (len(answers) - len(readable))
    return summarize([*checks, *unread], tolerance, repeats)


def _rate(figure: Figure, seconds: float, requests: Sequence[Request]) -> float:
    match figure:
        case "prompt":
            counted = [len(request.prompt) for request in requests]
        case "generated":
            counted = [request.new_tokens for request in requests]
        case "decode":  # the first token comes with the prompt, which these seconds leave out
            counted = [request.new_tokens - 1 for request in requests]
    return sum(counted) / seconds


def _details(load: Load) -> dict[str, float]:
    gaps = [gap for stream in load.streams for gap in stream.gaps]
    details = {
        "ttft_p50_s": median(stream.ttft for stream in load.streams),
        "ttft_max_s": max(stream.ttft for stream in load.streams),
        "prefill_tok_s": load.prompt_per_s,
        "client_cpu": load.client_cpu,
    }
    if len(gaps) > 1:
        details["gap_p50_s"], details["gap_p99_s"] = median(gaps), quantiles(gaps, n=100)[98]
    if load.decode_per_s is not None:
        details["decode_tok_s"] = load.decode_per_s
    return details
