"""The scenario about a fine-tuning job beside streams: what they notice of it, and what it keeps.

Servers of its own, one with the default latency budget and then one with a large one. Streams run alone (the job is paused)
and beside the job; then requests come one after the other, each with as much pause after it as it takes by itself, so that
serving needs half of the time, and the job's tokens per second are held against those while nobody asks. Answers beside
the job are held against the reference and against those without it. Asserts nothing.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from loadtests import BenchError
from loadtests import scenarios as names
from loadtests.client import Load, Request, run_load
from loadtests.prompts import make_prompts
from loadtests.report import Figure, Result
from loadtests.rounds import answers_of, held_against_reference, p99_gap, repeats, settings_of
from loadtests.scenarios import Scenario
from loadtests.server import ServerProcess, base_name
from loramux_adapters.errors import LoramuxError
from loramux_server.jobs_client import JobsClient

if TYPE_CHECKING:
    from loadtests.bench import Bench

_BUDGETS_MS = {names.DEFAULT_BUDGET: None, names.LARGE_BUDGET: 100}
_ROWS, _ROW_WORDS, _BATCH = 64, 60, 2
_STEPS = 4  # that a rate is read off
_LONGEST_S = 600.0

T = TypeVar("T")


@dataclass
class _Found:
    """By kind of load: p99 gaps in milliseconds, tokens trained a second; and the answers, of one load each."""

    gaps: dict[str, list[float]] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[str, Load] = field(default_factory=dict)
    repeats: tuple[int, int] = (0, 0)


def training_beside(bench: Bench, scenario: Scenario) -> Result:
    prompts = make_prompts(bench.tokens.encode, scenario.streams, scenario.prompt_tokens)
    requests = [Request(prompt, None, scenario.new_tokens) for prompt in prompts]
    figures: list[Figure] = []
    for kind, budget in _BUDGETS_MS.items():
        arguments = [] if budget is None else ["--training-latency-budget", str(budget)]
        directory = bench.directory / f"{scenario.name}-{budget}"
        model, threads = bench.options.model, bench.options.threads
        with ServerProcess(model, directory, threads=threads, arguments=arguments) as server:
            found = _measure(bench, server.wait_ready()[0], requests)
        figures += _figures(bench, scenario, kind, requests, found)
    return Result(scenario, settings_of(bench, scenario), figures)


def _figures(
    bench: Bench, scenario: Scenario, kind: str, requests: list[Request], found: _Found
) -> list[Figure]:
    answers = {what: answers_of(bench, requests, load) for what, load in found.answers.items()}
    parities = held_against_reference(bench, scenario, {}, answers, {names.BESIDE_JOB: found.repeats})
    alone, beside = (found.answers[what].streams for what in (names.ALONE, names.BESIDE_JOB))
    same = sum(a.text == b.text for a, b in zip(alone, beside, strict=True))
    note = f"{same} of {len(requests)} answers are those without the job"
    return [
        *(Figure(f"{kind}: trained {what}", "tok/s", values) for what, values in found.rates.items()),
        Figure(f"{kind}: p99 gap alone", "ms", found.gaps[names.ALONE], parity=parities[names.ALONE]),
        Figure(
            f"{kind}: p99 gap beside",
            "ms",
            found.gaps[names.BESIDE_JOB],
            note,
            parity=parities[names.BESIDE_JOB],
        ),
    ]


def _measure(bench: Bench, url: str, requests: list[Request]) -> _Found:
    base, found = base_name(url, []), _Found()
    run_load(url, base, requests)  # the first one pays for what is made once
    with _job(bench, url, base) as job:
        found.answers[names.ALONE] = job.paused(lambda: run_load(url, base, requests, token_names=True))
        found.answers[names.BESIDE_JOB] = run_load(url, base, requests, token_names=True)
        for _ in range(bench.options.rounds):
            _round(job, url, base, requests, found)
    return found


def _round(job: _Job, url: str, base: str, requests: list[Request], found: _Found) -> None:
    alone = job.paused(lambda: run_load(url, base, requests))
    one = job.paused(lambda: run_load(url, base, requests[:1])).seconds
    found.gaps.setdefault(names.ALONE, []).append(1e3 * p99_gap(alone))
    loads: list[Load] = []
    turns = itertools.cycle(requests)

    def at_half_load() -> None:
        run_load(url, base, [next(turns)])
        time.sleep(one)

    asking: dict[str, Callable[[], object]] = {
        names.IDLE: lambda: time.sleep(0.1),
        names.HALF_LOAD: at_half_load,
        names.BESIDE_JOB: lambda: loads.append(run_load(url, base, requests)),
    }
    for kind, ask in asking.items():
        found.rates.setdefault(kind, []).append(job.rate(ask))
    gaps = Load([stream for load in loads for stream in load.streams], 0)
    found.gaps.setdefault(names.BESIDE_JOB, []).append(1e3 * p99_gap(gaps))
    found.repeats = repeats(found.repeats, loads[0], found.answers[names.BESIDE_JOB])


# --- the job --------------------------------------------------------------------------------------------------------


class _Job:
    """One under training, and when its steps were done, as the stream of its events says it."""

    def __init__(self, client: JobsClient, job_id: str) -> None:
        self.id = job_id
        self._client = client
        self._steps: list[tuple[float, int]] = []  # when, and its tokens
        self._stops = 0
        self._ended = ""
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self.wait_for(1)

    def _watch(self) -> None:
        try:
            for event in self._client.events(self.id):
                if event["type"] == "metrics" and "tokens" in event["data"]:
                    self._steps.append((time.perf_counter(), event["data"]["tokens"]))
                self._stops += event["message"].startswith("Stopped after step")
        except LoramuxError as error:
            self._ended = error.message
        self._ended = self._ended or str(self._client.show(self.id)["error"] or "it ended")

    def wait_for(self, steps: int) -> None:
        """Until so many more are done."""
        wanted = len(self._steps) + steps
        self._until(lambda: len(self._steps) >= wanted, f"takes no {steps} steps")

    def paused(self, work: Callable[[], T]) -> T:
        stops = self._stops
        self._client.change(self.id, "pause")
        self._until(lambda: self._stops > stops, "does not pause")
        try:
            return work()
        finally:
            self._client.change(self.id, "resume")
            self.wait_for(1)

    def rate(self, ask: Callable[[], object]) -> float:
        """Tokens a second while `ask` is called over and over, from the end of a step to the end of a later one."""
        stop = threading.Event()
        failures: list[BenchError] = []

        def go_on() -> None:
            try:
                while not stop.is_set():
                    ask()
            except BenchError as error:
                failures.append(error)

        asking = threading.Thread(target=go_on)
        asking.start()
        try:
            self.wait_for(1)  # which others may have begun
            first = len(self._steps)
            self.wait_for(_STEPS)
        finally:
            stop.set()
            asking.join()
        if failures:
            raise failures[0]
        taken = self._steps[first - 1 : first + _STEPS]
        return sum(tokens for _, tokens in taken[1:]) / (taken[-1][0] - taken[0][0])

    def cancel(self) -> None:
        self._client.change(self.id, "cancel")
        self._watcher.join()

    def _until(self, done: Callable[[], bool], failing: str) -> None:
        began = time.monotonic()
        while not done():
            if self._ended:
                raise BenchError(f"the fine-tuning job ended: {self._ended}")
            if time.monotonic() - began > _LONGEST_S:
                raise BenchError(f"the fine-tuning job {failing} in {_LONGEST_S:g} seconds")
            time.sleep(0.02)


@contextmanager
def _job(bench: Bench, url: str, base: str) -> Iterator[_Job]:
    """It goes on for as long as it is needed."""
    path = bench.directory / "training-beside.jsonl"
    words = itertools.cycle(
        ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away"]
    )
    rows = [{"text": " ".join(itertools.islice(words, _ROW_WORDS))} for _ in range(_ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    client = JobsClient(url)
    fields = {"n_epochs": 50, "batch_size": _BATCH, "save_steps": 1_000_000, "learning_rate": 1e-5}
    created = client.create(
        {
            "model": base,
            "training_file": client.upload(path)["id"],
            "method": {"type": "supervised", "supervised": {"hyperparameters": fields}},
        }
    )
    job = _Job(client, created["id"])
    try:
        yield job
    finally:
        job.cancel()
