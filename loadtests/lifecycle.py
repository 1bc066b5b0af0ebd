"""The scenarios about adapters that come and go: loading, evicting, being many. Each sets up what it needs.

Every contestant's answers are held against the reference, as in bench.py. Files are in the operating system's cache: "on
disk" means that no process of ours has read them. Asserts nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from loadtests import BenchError
from loadtests import scenarios as names
from loadtests.client import Load, Request, run_load
from loadtests.contestants import Answer, check_answers
from loadtests.fleet import Fleet
from loadtests.parity import TOLERANCES, Parity
from loadtests.peers import REFERENCE_MODULE, PeerProcess
from loadtests.prompts import make_prompts
from loadtests.report import Figure, Result
from loadtests.scenarios import Scenario

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loadtests.bench import Bench

_LOADER_MODULE = "loadtests.peers.loader"
_BESIDE_SUPPLY = 24  # adapters that are loaded in turn, more than the tiers of the server hold
_CHECKED = 32  # streams of zipf-1000 whose answers go to the reference
_ZIPF = 1.0


def cold_adapter(bench: Bench, scenario: Scenario) -> Result:
    """One request at a time, each adapter asked twice: from the disk, and right after that."""
    prompts = _prompts(bench, scenario)
    rounds: dict[str, list[float]] = {names.COLD: [], names.WARM: [], names.DIFFERENCE: []}
    answers: dict[str, list[Answer]] = {names.COLD: [], names.WARM: []}
    with _fleet(bench, scenario, bench.options.rounds * scenario.streams + 1) as fleet:
        fleet.start()
        unused = iter(fleet.adapters)
        run_load(fleet.url, fleet.base, [Request(prompts[0], next(unused).name, scenario.new_tokens)])
        for _ in range(bench.options.rounds):
            waits: dict[str, list[float]] = {names.COLD: [], names.WARM: []}
            for prompt in prompts:
                request = Request(prompt, next(unused).name, scenario.new_tokens)
                for kind in (names.COLD, names.WARM):
                    load = run_load(fleet.url, fleet.base, [request], token_names=True)
                    waits[kind].append(load.streams[0].ttft)
                    answers[kind] += _answers(bench, [request], load)
            more = [cold - warm for cold, warm in zip(waits[names.COLD], waits[names.WARM], strict=True)]
            for kind, values in {**waits, names.DIFFERENCE: more}.items():
                rounds[kind].append(1e3 * median(values))
        parities = _check(bench, fleet, scenario, answers)
    figures = [
        Figure(kind, "ms", values, parity=parities.get(kind), note=note)
        for (kind, values), note in zip(
            rounds.items(), (f"median of {scenario.streams} adapters a round", "", ""), strict=True
        )
    ]
    return Result(scenario, _settings(bench, scenario), figures)


def loads_beside(bench: Bench, scenario: Scenario) -> Result:
    """The same streams alone, beside requests that find their adapter, and beside requests that load theirs."""
    prompts = _prompts(bench, scenario)
    gaps: dict[str, list[float]] = {names.ALONE: [], names.BESIDE_WARM: [], names.BESIDE_LOADS: []}
    with _fleet(bench, scenario, scenario.adapters + 1 + _BESIDE_SUPPLY) as fleet:
        fleet.start("--max-cpu-loras", "8")
        own, warm, *cold = [adapter.name for adapter in fleet.adapters[scenario.adapters - 1 :]]
        spoken = [*(adapter.name for adapter in fleet.adapters[: scenario.adapters - 1]), own]
        requests = [
            Request(prompt, spoken[index % len(spoken)], scenario.new_tokens)
            for index, prompt in enumerate(prompts)
        ]
        checked = run_load(fleet.url, fleet.base, requests, token_names=True)
        supplies: dict[str, Sequence[str]] = {
            names.ALONE: (),
            names.BESIDE_WARM: [warm],
            names.BESIDE_LOADS: cold,
        }
        beside = dict.fromkeys(gaps, 0)
        texts: dict[str, tuple[int, int]] = {}
        for _ in range(bench.options.rounds):
            for kind, supply in supplies.items():
                with _asking(fleet, supply, prompts[0][:8]) as count:
                    load = run_load(fleet.url, fleet.base, requests)
                beside[kind] += count[0]
                gaps[kind].append(1e3 * _p99(load))
                texts[kind] = _repeats(texts.get(kind, (0, 0)), load, checked)
        parities = _check(
            bench, fleet, scenario, dict.fromkeys(gaps, _answers(bench, requests, checked)), texts
        )
    figures = [
        Figure(kind, "ms", values, f"{beside[kind]} requests beside", parity=parities[kind])
        for kind, values in gaps.items()
    ]
    return Result(scenario, _settings(bench, scenario), figures)


def zipf(bench: Bench, scenario: Scenario) -> Result:
    """All requests at once, queued by the server. Each round draws anew."""
    prompts = _prompts(bench, scenario)
    random = Random(0)
    rates: dict[str, list[float]] = {names.ZIPF: [], names.EIGHT: []}
    with _fleet(bench, scenario, scenario.adapters, small=True) as fleet:
        fleet.start("--max-loras", "32")
        every = [adapter.name for adapter in fleet.adapters]
        weights = [1 / (rank + 1) ** _ZIPF for rank in range(len(every))]

        def drawn() -> list[str]:
            return random.choices(every, weights, k=len(prompts))

        in_turn = [every[index % 8] for index in range(len(prompts))]
        drawing: dict[str, Callable[[], list[str]]] = {names.ZIPF: drawn, names.EIGHT: lambda: in_turn}
        answers, different = {}, []
        for kind, draw in drawing.items():
            requests = _requests(prompts, draw(), scenario)
            checked = run_load(fleet.url, fleet.base, requests, token_names=True)
            answers[kind] = _answers(bench, requests, checked)[:_CHECKED]
        for _ in range(bench.options.rounds):
            for kind, draw in drawing.items():
                requests = _requests(prompts, draw(), scenario)
                load = run_load(fleet.url, fleet.base, requests)
                rates[kind].append(load.generated_per_s)
                if kind == names.ZIPF:
                    different.append(len({request.adapter for request in requests}))
        parities = _check(bench, fleet, scenario, answers)
    notes = {
        names.ZIPF: f"{median(different):g} different adapters a round",
        names.EIGHT: "8 adapters in turn",
    }
    figures = [
        Figure(kind, "tok/s", values, notes[kind], parity=parities[kind]) for kind, values in rates.items()
    ]
    return Result(scenario, _settings(bench, scenario), figures)


def registered(bench: Bench, scenario: Scenario) -> Result:
    """The same server with nothing registered and with everything, one process after the other."""
    starts: dict[str, list[float]] = {names.FULL_START: [], names.EMPTY_START: []}
    more_time, more_memory = [], []
    options = bench.options
    with _fleet(bench, scenario, scenario.adapters, small=True) as full:
        directory = bench.directory / f"{scenario.name}-empty"
        with Fleet(options.model, bench.model, directory, options.threads) as empty:
            for _ in range(options.rounds):
                memory = {}
                for kind, fleet in ((names.EMPTY_START, empty), (names.FULL_START, full)):
                    fleet.start()
                    memory[kind] = fleet.resident_bytes()
                    starts[kind].append(fleet.start_seconds)
                    fleet.stop()
                more_time.append(starts[names.FULL_START][-1] - starts[names.EMPTY_START][-1])
                more_memory.append((memory[names.FULL_START] - memory[names.EMPTY_START]) / 1e6)
    figures = [Figure(kind, "s", values) for kind, values in starts.items()]
    figures += [
        Figure(
            names.MORE_TIME, "s", more_time, "of the whole process until it is ready, against an empty one"
        ),
        Figure(names.MORE_MEMORY, "MB", more_memory, "resident, front and worker"),
    ]
    return Result(scenario, _settings(bench, scenario), figures)


def adapter_load(bench: Bench, scenario: Scenario) -> Result:
    """Two processes, each with the model; they take turns at the same files."""
    rates: dict[str, list[float]] = {names.OURS: [], names.PEFT_LOAD: []}
    kinds = {names.OURS: "loramux", names.PEFT_LOAD: "peft"}
    prompt = _prompts(bench, scenario)[0]
    used = bench.adapters[: scenario.adapters]
    paths = {adapter.name: str(adapter.path) for adapter in used}
    requests = [Request(prompt, adapter.name, scenario.new_tokens) for adapter in used]
    answers: dict[str, list[Answer]] = {}
    for (
        kind,
        module_kind,
    ) in kinds.items():  # one at a time: a second model in memory would not be a fair neighbour
        setup = {"model": str(bench.model), "kind": module_kind}
        log = bench.directory / f"{scenario.name}-{module_kind}.log"
        with PeerProcess(_LOADER_MODULE, setup, log, threads=bench.options.threads) as process:
            process.ready()
            process.call("load", paths=paths)  # the first time imports what it needs
            for _ in range(bench.options.rounds):
                rates[kind].append(len(paths) / process.call("load", paths=paths)["seconds"])
            said = [
                process.call("answer", path=paths[str(r.adapter)], prompt=prompt, count=r.new_tokens)
                for r in requests
            ]
            answers[kind] = [(r, one["tokens"]) for r, one in zip(requests, said, strict=True)]
    parities = _held_against_reference(bench, scenario, paths, answers, {})
    notes = {names.OURS: "files -> checked, hashed, in rank rows", names.PEFT_LOAD: "PeftModel.load_adapter"}
    figures = [
        Figure(kind, "loads/s", values, notes[kind], parity=parities[kind]) for kind, values in rates.items()
    ]
    return Result(scenario, _settings(bench, scenario), figures)


MEASURES: Mapping[str, Callable[[Bench, Scenario], Result]] = {
    "cold-adapter": cold_adapter,
    "loads-beside": loads_beside,
    "zipf-1000": zipf,
    "registered-1000": registered,
    "adapter-load": adapter_load,
}


def _prompts(bench: Bench, scenario: Scenario) -> list[list[int]]:
    return make_prompts(bench.tokens.encode, scenario.streams, scenario.prompt_tokens)


def _requests(prompts: Sequence[list[int]], adapters: Sequence[str], scenario: Scenario) -> list[Request]:
    return [
        Request(prompt, adapter, scenario.new_tokens)
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]


@contextmanager
def _fleet(bench: Bench, scenario: Scenario, count: int, *, small: bool = False) -> Iterator[Fleet]:
    options = bench.options
    with Fleet(options.model, bench.model, bench.directory / scenario.name, options.threads) as fleet:
        fleet.start()
        fleet.stop()
        fleet.register(count, small=small)
        yield fleet


@contextmanager
def _asking(fleet: Fleet, adapters: Sequence[str], prompt: list[int]) -> Iterator[list[int]]:
    """One request after the other for one token, each for the next adapter; how many were answered."""
    stop, count, failures = threading.Event(), [0], []

    def ask() -> None:
        while adapters and not stop.is_set():
            request = Request(prompt, adapters[count[0] % len(adapters)], 1)
            try:
                run_load(fleet.url, fleet.base, [request])
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


def _p99(load: Load) -> float:
    return quantiles([gap for stream in load.streams for gap in stream.gaps], n=100)[98]


def _repeats(before: tuple[int, int], load: Load, checked: Load) -> tuple[int, int]:
    others = sum(a.text != b.text for a, b in zip(load.streams, checked.streams, strict=True))
    return before[0] + len(load.streams), before[1] + others


def _answers(bench: Bench, requests: Sequence[Request], load: Load) -> list[Answer]:
    found = (bench.tokens.ids(stream.token_names) for stream in load.streams)
    return list(zip(requests, found, strict=True))


def _check(
    bench: Bench,
    fleet: Fleet,
    scenario: Scenario,
    answers: Mapping[str, Sequence[Answer]],
    texts: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Parity]:
    fleet.stop()  # its work is done, and the reference needs the cores
    paths = fleet.paths([request.adapter for given in answers.values() for request, _ in given])
    return _held_against_reference(bench, scenario, paths, answers, texts or {})


def _held_against_reference(
    bench: Bench,
    scenario: Scenario,
    paths: Mapping[str, str],
    answers: Mapping[str, Sequence[Answer]],
    texts: Mapping[str, tuple[int, int]],
) -> dict[str, Parity]:
    setup = {"model": str(bench.model), "adapters": dict(paths)}
    log = bench.directory / f"{scenario.name}-reference.log"
    with PeerProcess(REFERENCE_MODULE, setup, log, threads=bench.options.threads) as process:
        tolerance = TOLERANCES[process.ready()["dtype"]]
        return {
            kind: check_answers(process, given, tolerance, texts.get(kind, (0, 0)))
            for kind, given in answers.items()
        }


def _settings(bench: Bench, scenario: Scenario) -> dict[str, Any]:
    return {
        "model": bench.options.model,
        "rounds": bench.options.rounds,
        "threads": bench.options.threads,
        "streams": scenario.streams,
        "adapters": scenario.adapters,
        "prompt_tokens": scenario.prompt_tokens,
        "new_tokens": scenario.new_tokens,
    }
