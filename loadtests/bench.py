"""`python -m loadtests.bench`: run scenarios and print what they gave.

Each scenario: our server and the peers take turns for some rounds on the same prompts, adapters and threads; then every
contestant's answers are held against the reference. Prints figures and ratios, asserts none. See README.md.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from loadtests import BenchError
from loadtests.adapters import COUNT, BenchAdapter, model_directory, write_adapters
from loadtests.contestants import Contestant, Ours, Peer, Turn, check_answers
from loadtests.lifecycle import MEASURES
from loadtests.parity import TOLERANCES, Parity, Tokens
from loadtests.peers import REFERENCE_MODULE, PeerProcess
from loadtests.report import Figure, Result, print_result, save, usable_cores, write_json
from loadtests.scenarios import HELP, OURS, OURS_BASE, READY, SCENARIOS, Scenario
from loadtests.server import LORAMUX, ServerProcess, base_name

PLAIN_WIDTH = 120  # of a table that goes into a file


class Bench:
    """What the scenarios of one call share: model, adapters, and the server, started at the first need of it."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.options = options
        self.model = model_directory(options.model)
        self.directory = directory
        self.loras = COUNT  # adapters that the servers have
        self._server = ExitStack()

    def close(self) -> None:
        self._server.close()

    @cached_property
    def adapters(self) -> list[BenchAdapter]:
        return write_adapters(self.model, self.directory / "adapters", self.loras)

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens(self.model)

    @cached_property
    def url(self) -> str:
        if self.options.url:
            return str(self.options.url).rstrip("/")
        server = self._server.enter_context(
            ServerProcess(
                self.options.model,
                self.directory / "server",
                adapters=self.adapters,
                threads=self.options.threads,
                arguments=["--max-loras", str(self.loras)],
            )
        )
        return server.wait_ready()[0]

    def run(self, scenario: Scenario) -> Result:
        used = self.adapters[: scenario.adapters]
        setup = {"model": str(self.model), "adapters": {a.name: str(a.path) for a in used}}
        log = self.directory / f"{scenario.name}-reference.log"
        with PeerProcess(REFERENCE_MODULE, setup, log, threads=self.options.threads) as process:
            base = base_name(self.url, used)
            about = process.ready()
            contestants = self._contestants(scenario, base, process)
            turns = play(contestants, self.options.rounds)
            tolerance = TOLERANCES[about["dtype"]]
            figures = [
                figure_of(
                    one,
                    turns[one.name],
                    check_answers(process, one.answers(), tolerance, one.repeats, one.without),
                )
                for one in contestants
            ]
        settings = {
            "model": self.options.model,
            "streams": scenario.streams,
            "adapters": scenario.adapters,
            "prompt_tokens": scenario.prompt_tokens,
            "new_tokens": scenario.new_tokens,
            "rounds": self.options.rounds,
            "threads": self.options.threads,
            "own_server": not self.options.url,
            "reference": about,
        }
        return Result(scenario, settings, figures)

    def _contestants(self, scenario: Scenario, base: str, process: PeerProcess) -> list[Contestant]:
        requests = scenario.requests([adapter.name for adapter in self.adapters], self.tokens.encode)
        figure = scenario.figure
        contestants: list[Contestant] = [Ours(OURS, self.url, base, requests, figure, self.tokens)]
        if scenario.base_too:
            plain = [replace(request, adapter=None) for request in requests]
            contestants.append(Ours(OURS_BASE, self.url, base, plain, figure, self.tokens))
        if not self.options.no_peers:
            contestants += [Peer(name, process, requests, figure) for name in scenario.peers]
        return contestants


def loras_for(scenarios: Sequence[Scenario]) -> int:
    """Adapters that a server for all of these has; those with servers of their own see to it themselves."""
    return max([COUNT, *(scenario.adapters for scenario in scenarios if not scenario.own_server)])


def play(contestants: Sequence[Contestant], rounds: int) -> dict[str, list[Turn]]:
    """Everybody's turn, round after round."""
    turns: dict[str, list[Turn]] = {one.name: [] for one in contestants}
    for one in contestants:
        one.prepare()
    for number in range(rounds):
        for one in contestants:
            turn = one.turn()
            turns[one.name].append(turn)
            print(f"  round {number + 1}/{rounds}  {one.name}: {turn.seconds:.1f} s", file=sys.stderr)
    return turns


def figure_of(one: Contestant, turns: Sequence[Turn], parity: Parity) -> Figure:
    """Details are the medians of the rounds."""
    details = {key: median(turn.details[key] for turn in turns) for key in turns[0].details}
    return Figure(one.name, "tok/s", [turn.rate for turn in turns], one.note, details, parity)


def measure_start(scenario: Scenario, options: argparse.Namespace, directory: Path) -> Result:
    """Whole processes, one at a time; the model is in the cache and its files in memory from the first on."""
    model_directory(options.model)
    ready, helps = [], []
    for number in range(options.rounds):
        with ServerProcess(options.model, directory / f"start-{number}", threads=options.threads) as server:
            ready.append(server.wait_ready()[1])
        start = time.perf_counter()
        subprocess.run([str(LORAMUX), "--help"], check=True, stdout=subprocess.DEVNULL)
        helps.append(time.perf_counter() - start)
    settings: dict[str, Any] = {"model": options.model, "rounds": options.rounds, "threads": options.threads}
    return Result(scenario, settings, [Figure(READY, "s", ready), Figure(HELP, "s", helps)])


def chosen_scenarios(options: argparse.Namespace) -> list[Scenario]:
    """Those named, or all; with the sizes given. A server that already runs has no start to measure."""
    names = options.scenarios or [
        name
        for name, known in SCENARIOS.items()
        if not ((known.is_start or known.own_server) and options.url)
    ]
    scenarios = []
    for name in names:
        scenario = SCENARIOS.get(name)
        if scenario is None:
            raise BenchError(f"{name} is no scenario; choose from {', '.join(SCENARIOS)}")
        if (scenario.is_start or scenario.own_server) and options.url:
            raise BenchError(f"{name} measures a server of its own; leave out --url")
        if not scenario.is_start:
            scenario = scenario.resized(options.streams, options.prompt_tokens, options.new_tokens)
        scenarios.append(scenario)
    return scenarios


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return options_parser("python -m loadtests.bench", "Run benchmark scenarios.").parse_args(arguments)


def options_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The options that benchmarks share."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="default: all; see --list")
    parser.add_argument("--list", action="store_true", help="say what the scenarios are")
    parser.add_argument("--url", help="a running server; default: start one and stop it")
    parser.add_argument("--model", default="demo", help="'demo' or a model directory")
    parser.add_argument("--rounds", type=_positive, default=3, help="turns of each contestant")
    parser.add_argument("--streams", type=_positive, help="requests at once, instead of the scenario's")
    parser.add_argument("--prompt-tokens", type=_positive, help="instead of the scenario's")
    parser.add_argument("--new-tokens", type=_positive, help="instead of the scenario's; not for prefill")
    parser.add_argument("--threads", type=_positive, default=usable_cores(), help="of server and peers each")
    parser.add_argument(
        "--no-peers", action="store_true", help="time only loramux; answers are still checked"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    parser.add_argument("--save", action="store_true", help="write each result to loadtests/results/")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def run(options: argparse.Namespace, console: Console) -> list[Result]:
    scenarios = chosen_scenarios(options)
    results = []
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as name, ExitStack() as stack:
        bench = Bench(options, Path(name))
        stack.callback(bench.close)
        bench.loras = loras_for(scenarios)
        for scenario in scenarios:
            if scenario.is_start:
                result = measure_start(scenario, options, Path(name))
            elif scenario.own_server:
                result = MEASURES[scenario.name](bench, scenario)
            else:
                result = bench.run(scenario)
            print_result(result, console)
            if options.save:
                console.print(f"  saved {save(result)}")
            results.append(result)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        for scenario in SCENARIOS.values():
            print(f"{scenario.name:16}{scenario.summary}")
        return 0
    try:
        results = run(options, Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH))
    except (BenchError, subprocess.CalledProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if options.json:
        write_json(results, options.json)
    return 0


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # as an exception, so that what was started is stopped
    sys.exit(main())
