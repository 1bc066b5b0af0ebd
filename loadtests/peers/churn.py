"""Adapters that come and go: each is new to the server, is loaded, asked once, and unloaded again.

loramux by its upload and DELETE, without verification, which the others do not have; vLLM by `load_lora_adapter` and
`unload_lora_adapter`; PEFT in a process, `load_adapter` and `delete_adapter`. llama.cpp's server cannot: its adapters are
chosen at its start. A rate counts generated tokens over the whole of it. Asserts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from loadtests import BenchError
from loadtests.adapters import write_adapters
from loadtests.client import Request, body_of, run_load
from loadtests.contestants import Answer
from loadtests.peers import PeerProcess
from loadtests.peers.servers import BASE, VLLM
from loadtests.report import Figure, Result
from loadtests.rounds import held_against_reference, settings_of
from loadtests.scenarios import OURS, PEFT_LOAD, Scenario
from loadtests.server import base_name

if TYPE_CHECKING:
    from loadtests.bench_peers import PeerBench

Visit = Callable[[Request, Path], list[int] | None]  # one adapter's: its answer, when it is gone again

_FIRST = 1000  # of the numbers that adapters are made from: none that a server was started with


def churn(bench: PeerBench, scenario: Scenario) -> Result:
    """Contestants alternate by adapter, every contestant's are the same."""
    count = scenario.streams * bench.options.rounds
    directory = bench.directory / scenario.name
    first, *adapters = write_adapters(bench.model, directory, count + 1, first=_FIRST)
    prompts = scenario.requests([], bench.tokens.encode)
    requests = [
        replace(prompts[index % scenario.streams], adapter=one.name) for index, one in enumerate(adapters)
    ]
    visits, notes = _visits(bench)
    rates: dict[str, list[float]] = {name: [] for name in visits}
    answers: dict[str, list[Answer]] = {name: [] for name in visits}
    for visit in visits.values():
        visit(replace(requests[0], adapter=first.name), first.path)
    for number in range(bench.options.rounds):
        own = range(number * scenario.streams, (number + 1) * scenario.streams)
        for name, visit in visits.items():
            began = time.perf_counter()
            answers[name] += [(requests[i], visit(requests[i], adapters[i].path)) for i in own]
            rates[name].append(sum(requests[i].new_tokens for i in own) / (time.perf_counter() - began))
    paths = {adapter.name: str(adapter.path) for adapter in adapters}
    parities = held_against_reference(bench, scenario, paths, answers, {})
    figures = [
        Figure(name, "tok/s", values, notes[name], parity=parities[name]) for name, values in rates.items()
    ]
    return Result(scenario, settings_of(bench, scenario), figures)


def _visits(bench: PeerBench) -> tuple[dict[str, Visit], dict[str, str]]:
    visits: dict[str, Visit] = {OURS: lambda request, path: _visit_us(bench, request, path)}
    notes = {OURS: "upload, DELETE"}
    if VLLM.name in bench.servers:
        visits[VLLM.name] = lambda request, path: _visit_vllm(bench.servers[VLLM.name], request, path)
        notes[VLLM.name] = f"{VLLM.note}, load_lora_adapter, unload_lora_adapter"
    if not bench.options.no_peers:
        setup = {"model": str(bench.model), "kind": "peft"}
        log = bench.directory / "churn-peft.log"
        process = bench.keep(PeerProcess("loadtests.peers.loader", setup, log, threads=bench.options.threads))
        process.ready()

        def visit_peft(request: Request, path: Path) -> list[int]:
            said = process.call("answer", path=str(path), prompt=request.prompt, count=request.new_tokens)
            tokens: list[int] = said["tokens"]
            return tokens

        visits[PEFT_LOAD] = visit_peft
        notes[PEFT_LOAD] = "load_adapter, delete_adapter, in its process"
    return visits, notes


def _visit_us(bench: PeerBench, request: Request, path: Path) -> list[int] | None:
    url, name = bench.url, str(request.adapter)
    files = {file.name: (file.name, file.read_bytes()) for file in path.iterdir()}
    _asked("POST", f"{url}/v1/adapters", data={"name": name, "verify": "false"}, files=files)
    load = run_load(url, base_name(url, []), [request], token_names=True)
    _asked("DELETE", f"{url}/v1/adapters/{name}")
    return bench.tokens.ids(load.streams[0].token_names)


def _visit_vllm(url: str, request: Request, path: Path) -> list[int]:
    name = str(request.adapter)
    _asked("POST", f"{url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})
    tokens, _ = VLLM.ask(url, body_of(BASE, request, {"stream": False, "stream_options": None}))
    _asked("POST", f"{url}/v1/unload_lora_adapter", json={"lora_name": name})
    return tokens


def _asked(method: str, url: str, **given: Any) -> None:
    response = httpx.request(method, url, timeout=600, trust_env=False, **given)
    if response.status_code >= 300:
        raise BenchError(f"{method} {url}: HTTP {response.status_code}: {response.text[:300]}")
