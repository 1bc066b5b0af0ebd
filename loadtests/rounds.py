"""What the scenarios with a function of their own share: traffic beside, figures off a load, answers to the reference."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from loadtests import BenchError
from loadtests.client import Load, Request, run_load
from loadtests.contestants import Answer, check_answers
from loadtests.parity import TOLERANCES, Parity
from loadtests.peers import REFERENCE_MODULE, PeerProcess
from loadtests.scenarios import Scenario

if TYPE_CHECKING:
    from loadtests.bench import Bench


@contextmanager
def asking(url: str, base: str, requests: Sequence[Request]) -> Iterator[list[int]]:
    """One request after the other, over and over; how many were answered. None if there are no requests."""
    stop, count, failures = threading.Event(), [0], []

    def ask() -> None:
        while requests and not stop.is_set():
            try:
                run_load(url, base, [requests[count[0] % len(requests)]])
            except BenchError as error:
                failures.append(error)
                return
            count[0] += 1

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.1)
    try:
        yield count
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def p99_gap(*loads: Load) -> float:
    """Of the seconds between two tokens while all streams of a load talk."""
    return quantiles([gap for load in loads for gap in load.gaps], n=100)[98]


def repeats(before: tuple[int, int], load: Load, checked: Load) -> tuple[int, int]:
    """Streams so far, and those whose text is not the checked one's, with those of `load`."""
    others = sum(a.text != b.text for a, b in zip(load.streams, checked.streams, strict=True))
    return before[0] + len(load.streams), before[1] + others


def answers_of(bench: Bench, requests: Sequence[Request], load: Load) -> list[Answer]:
    found = (bench.tokens.ids(stream.token_names) for stream in load.streams)
    return list(zip(requests, found, strict=True))


def held_against_reference(
    bench: Bench,
    scenario: Scenario,
    paths: Mapping[str, str],
    answers: Mapping[str, Sequence[Answer]],
    texts: Mapping[str, tuple[int, int]],
) -> dict[str, Parity]:
    """`paths` of the adapters that the answers name."""
    setup = {"model": str(bench.model), "adapters": dict(paths)}
    log = bench.directory / f"{scenario.name}-reference.log"
    with PeerProcess(REFERENCE_MODULE, setup, log, threads=bench.options.threads) as process:
        tolerance = TOLERANCES[process.ready()["dtype"]]
        return {
            kind: check_answers(process, given, tolerance, texts.get(kind, (0, 0)))
            for kind, given in answers.items()
        }


def settings_of(bench: Bench, scenario: Scenario) -> dict[str, Any]:
    return {
        "model": bench.options.model,
        "rounds": bench.options.rounds,
        "threads": bench.options.threads,
        "streams": scenario.streams,
        "adapters": scenario.adapters,
        "prompt_tokens": scenario.prompt_tokens,
        "new_tokens": scenario.new_tokens,
    }
