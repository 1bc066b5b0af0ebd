"""The scenarios about adapters that come and go: loading, evicting, being many. Each sets up what it needs.

Every contestant's answers are held against the reference, as in bench.py. Files are in the operating system's cache: "on
disk" means that no process of ours has read them. Asserts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from statistics import median
from typing import TYPE_CHECKING

from loadtests import scenarios as names
from loadtests.client import Request, run_load
from loadtests.contestants import Answer
from loadtests.features import features
from loadtests.fleet import Fleet
from loadtests.long_prompts import long_prompts_beside, shared_prefix
from loadtests.parity import Parity
from loadtests.peers import PeerProcess
from loadtests.prompts import make_prompts
from loadtests.report import Figure, Result
from loadtests.rounds import answers_of, asking, held_against_reference, p99_gap, repeats, settings_of
from loadtests.scenarios import Scenario
from loadtests.speculation import speculation
from loadtests.training_beside import training_beside

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
                    answers[kind] += answers_of(bench, [request], load)
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
    return Result(scenario, settings_of(bench, scenario), figures)


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
        supplies = {
            kind: [Request(prompts[0][:8], adapter, 1) for adapter in adapters]
            for kind, adapters in ((names.ALONE, []), (names.BESIDE_WARM, [warm]), (names.BESIDE_LOADS, cold))
        }
        beside = dict.fromkeys(gaps, 0)
        texts: dict[str, tuple[int, int]] = {}
        for _ in range(bench.options.rounds):
            for kind, supply in supplies.items():
                with asking(fleet.url, fleet.base, supply) as count:
                    load = run_load(fleet.url, fleet.base, requests)
                beside[kind] += count[0]
                gaps[kind].append(1e3 * p99_gap(load))
                texts[kind] = repeats(texts.get(kind, (0, 0)), load, checked)
        parities = _check(
            bench, fleet, scenario, dict.fromkeys(gaps, answers_of(bench, requests, checked)), texts
        )
    figures = [
        Figure(kind, "ms", values, f"{beside[kind]} requests beside", parity=parities[kind])
        for kind, values in gaps.items()
    ]
    return Result(scenario, settings_of(bench, scenario), figures)


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
            answers[kind] = answers_of(bench, requests, checked)[:_CHECKED]
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
    return Result(scenario, settings_of(bench, scenario), figures)


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
    return Result(scenario, settings_of(bench, scenario), figures)


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
    parities = held_against_reference(bench, scenario, paths, answers, {})
    notes = {names.OURS: "files -> checked, hashed, in rank rows", names.PEFT_LOAD: "PeftModel.load_adapter"}
    figures = [
        Figure(kind, "loads/s", values, notes[kind], parity=parities[kind]) for kind, values in rates.items()
    ]
    return Result(scenario, settings_of(bench, scenario), figures)


MEASURES: Mapping[str, Callable[[Bench, Scenario], Result]] = {
    "cold-adapter": cold_adapter,
    "loads-beside": loads_beside,
    "zipf-1000": zipf,
    "registered-1000": registered,
    "adapter-load": adapter_load,
    "features": features,
    "shared-prefix": shared_prefix,
    "long-prompts-beside": long_prompts_beside,
    "speculation": speculation,
    "training-beside": training_beside,
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


def _check(
    bench: Bench,
    fleet: Fleet,
    scenario: Scenario,
    answers: Mapping[str, Sequence[Answer]],
    texts: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Parity]:
    fleet.stop()  # its work is done, and the reference needs the cores
    paths = fleet.paths([request.adapter for given in answers.values() for request, _ in given])
    return held_against_reference(bench, scenario, paths, answers, texts or {})
