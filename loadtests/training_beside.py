"""The scenario about a fine-tuning job beside streams: what they notice of it, and what it keeps.

Servers of its own, one with the default latency budget and then one with a large one. Streams run alone (the job is paused)
and beside the job; then one request begins every two times as long as one takes by itself (later, if the one before is not
answered yet), so that serving needs half of the time, and the job's tokens per second are held against those while nobody
asks. What training can keep is what serving leaves: the same half load is also served while the job is paused, and the CPU
time that this takes is held against what training takes while nobody asks. Where training keeps more than is left, serving
has lost it, which shows in the share of half load that is served. Answers beside the job are held against the reference
and against those without it. Asserts nothing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from loadtests import scenarios as names
from loadtests.client import Load, Request, run_load
from loadtests.prompts import make_prompts
from loadtests.report import Figure, Result
from loadtests.rounds import answers_of, held_against_reference, p99_gap, repeats, settings_of
from loadtests.scenarios import Scenario
from loadtests.server import ServerProcess, base_name
from loadtests.training_job import Job, Pace, endless_job

if TYPE_CHECKING:
    from loadtests.bench import Bench

_BUDGETS_MS = {names.DEFAULT_BUDGET: None, names.LARGE_BUDGET: 100}
_HALF_LOADS = 6  # requests that the CPU time of half load is read off


@dataclass
class Found:
    """By kind of load: p99 gaps in milliseconds, paces, and the answers, of one load each.

    `taken` is serving's CPU time at half load over that of training while nobody asks, `served` the share of half load's
    requests that were answered beside the job; a value a round.
    """

    gaps: dict[str, list[float]] = field(default_factory=dict)
    paces: dict[str, list[Pace]] = field(default_factory=dict)
    taken: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)
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
            found = _measure(bench, server, requests)
        figures += _figures(bench, scenario, kind, requests, found)
    return Result(scenario, settings_of(bench, scenario), figures)


def _figures(
    bench: Bench, scenario: Scenario, kind: str, requests: list[Request], found: Found
) -> list[Figure]:
    answers = {what: answers_of(bench, requests, load) for what, load in found.answers.items()}
    parities = held_against_reference(bench, scenario, {}, answers, {names.BESIDE_JOB: found.repeats})
    alone, beside = (found.answers[what].streams for what in (names.ALONE, names.BESIDE_JOB))
    same = sum(a.text == b.text for a, b in zip(alone, beside, strict=True))
    note = f"{same} of {len(requests)} answers are those without the job"
    return [
        *(
            Figure(
                f"{kind}: trained {what}",
                "tok/s",
                [pace.rate for pace in paces],
                f"training had {fmean(pace.share for pace in paces):.0%} of the time",
            )
            for what, paces in found.paces.items()
        ),
        *arithmetic(kind, found),
        Figure(f"{kind}: p99 gap alone", "ms", found.gaps[names.ALONE], parity=parities[names.ALONE]),
        Figure(
            f"{kind}: p99 gap beside",
            "ms",
            found.gaps[names.BESIDE_JOB],
            note,
            parity=parities[names.BESIDE_JOB],
        ),
    ]


def arithmetic(kind: str, found: Found) -> list[Figure]:
    """What serving takes at half load, what that leaves, and what training made of it."""
    idle, half = found.paces[names.IDLE], found.paces[names.HALF_LOAD]
    return [
        Figure(
            f"{kind}: serving takes {names.HALF_LOAD}",
            "%",
            [100 * taken for taken in found.taken],
            "CPU time, the job paused; 100 is what training takes while idle",
        ),
        Figure(f"{kind}: left to training", "%", [100 * (1 - taken) for taken in found.taken]),
        Figure(
            f"{kind}: kept by training",
            "%",
            [100 * b.rate / a.rate for a, b in zip(idle, half, strict=True)],
            f"tok/s {names.HALF_LOAD}; 100 is {names.IDLE}",
        ),
        Figure(f"{kind}: half load served", "%", [100 * share for share in found.served], "beside the job"),
    ]


def _measure(bench: Bench, server: ServerProcess, requests: list[Request]) -> Found:
    url = server.wait_ready()[0]
    base, found = base_name(url, []), Found()
    run_load(url, base, requests)  # the first one pays for what is made once
    with endless_job(url, base, bench.directory) as job:
        found.answers[names.ALONE] = job.paused(lambda: run_load(url, base, requests, token_names=True))
        found.answers[names.BESIDE_JOB] = run_load(url, base, requests, token_names=True)
        for _ in range(bench.options.rounds):
            _round(job, server, (url, base), requests, found)
    return found


def _round(
    job: Job, server: ServerProcess, where: tuple[str, str], requests: list[Request], found: Found
) -> None:
    url, base = where
    alone = job.paused(lambda: run_load(url, base, requests))
    one = job.paused(lambda: run_load(url, base, requests[:1])).seconds
    found.gaps.setdefault(names.ALONE, []).append(1e3 * p99_gap(alone))
    loads: list[Load] = []
    turns, answered = itertools.cycle(requests), itertools.count()

    def at_half_load(times: int = 1) -> None:
        for _ in range(times):
            began = time.perf_counter()
            run_load(url, base, [next(turns)])
            next(answered)
            time.sleep(max(0.0, began + 2 * one - time.perf_counter()))

    def pace(kind: str, ask: Callable[[], object]) -> None:
        found.paces.setdefault(kind, []).append(job.pace(ask))

    serving = job.paused(lambda: _cores(server, lambda: at_half_load(_HALF_LOADS)))
    asking: dict[str, Callable[[], object]] = {
        names.IDLE: lambda: time.sleep(0.1),
        names.HALF_LOAD: at_half_load,
        names.BESIDE_JOB: lambda: loads.append(run_load(url, base, requests)),
    }
    for kind, ask in asking.items():
        before, began = next(answered), time.perf_counter()
        cores = _cores(server, partial(pace, kind, ask))
        if kind == names.IDLE:
            found.taken.append(serving / cores)
        elif kind == names.HALF_LOAD:
            wanted = (time.perf_counter() - began) / (2 * one)
            found.served.append((next(answered) - before - 1) / wanted)
    found.gaps.setdefault(names.BESIDE_JOB, []).append(1e3 * p99_gap(*loads))
    found.repeats = repeats(found.repeats, loads[0], found.answers[names.BESIDE_JOB])


def _cores(server: ServerProcess, work: Callable[[], object]) -> float:
    """So many the server uses while this goes on."""
    cpu, began = server.cpu_seconds(), time.perf_counter()
    work()
    return (server.cpu_seconds() - cpu) / (time.perf_counter() - began)
