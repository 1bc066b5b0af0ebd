"""`python -m loadtests.bench_peers`: loramux beside the servers a user would start instead, over HTTP, in alternation.

The scenarios, prompts, adapters, threads and token counts are bench.py's, and so is the reference that every answer is
held against; what is added are llama.cpp's server and vLLM, whichever `make peers` has installed. Each server is started
once, with all adapters, and waits while it is not its turn. Prints figures and ratios, asserts none. See README.md.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from rich.console import Console

from loadtests import BenchError, bench
from loadtests.bench import Bench
from loadtests.contestants import Contestant
from loadtests.peers import PeerProcess
from loadtests.peers.checkpoint import write_served_base
from loadtests.peers.churn import churn
from loadtests.peers.http_peer import HttpPeer
from loadtests.peers.servers import KINDS, PeerServer, Room, ServerKind
from loadtests.report import print_result, save, write_json
from loadtests.scenarios import OURS, OURS_BASE, SCENARIOS, Goal, Scenario, zipf_draws

_EACH, _CHURN = "peft-set-adapter", "churn"
# Which scenarios, and what we want to reach, on two cores with the embedded model.
GOALS: Mapping[str, tuple[Goal, ...]] = {
    "single": (Goal(OURS, 1.0, over="llama.cpp"),),
    "base-8": (),
    "base-16": (),
    "base-32": (Goal(OURS, 1.2, over="vllm"),),
    "one-adapter-32": (),
    "adapters-32": (),
    "mixed": (
        Goal(OURS, 10, over="vllm"),
        Goal(OURS, 2.5, over="llama.cpp"),
        Goal(OURS, 12, over=_EACH),
        Goal(OURS, 0.85, over=OURS_BASE),
    ),
    "prefill": (Goal(OURS, 7, over="llama.cpp"),),
    "long-prompts": (),
    "zipf": (),
    "shared-prefix": (),
    _CHURN: (),
}
_DRAWN = 64
# Those that bench.py has not, or has only for loramux.
_OWN = {
    "zipf": Scenario(
        "zipf",
        f"{_DRAWN} streams whose adapters are drawn by Zipf's law from 1,000 (r16, all linears); servers have those drawn",
        streams=_DRAWN,
        adapters=len(set(zipf_draws(_DRAWN, 1000))),
        new_tokens=32,
        drawn_from=1000,
        peers=(_EACH,),
    ),
    "shared-prefix": Scenario(
        "shared-prefix",
        "8 streams whose prompts begin with the same 1,024 tokens, which are in the prefix cache; counts prompt tokens",
        streams=8,
        prompt_tokens=1024 + 15,  # what is not shared is less than a block of the cache
        new_tokens=16,
        figure="prompt",
        shared_tokens=1024,
        peers=("transformers",),
    ),
    _CHURN: Scenario(
        _CHURN,
        "8 new adapters a round, one after the other: loaded, asked once, unloaded (r16, all linears)",
        streams=8,
        prompt_tokens=32,
        new_tokens=8,
    ),
}
KNOWN: Mapping[str, Scenario] = {name: _OWN.get(name) or SCENARIOS[name] for name in GOALS}


class PeerBench(Bench):
    """Adds the servers that were chosen to the contestants of every scenario."""

    def __init__(
        self, options: argparse.Namespace, directory: Path, kinds: Sequence[ServerKind], room: Room
    ) -> None:
        super().__init__(options, directory)
        self._kinds, self._room = kinds, room

    @cached_property
    def servers(self) -> dict[str, str]:
        """Addresses by name. Started one after the other: each start takes all cores."""
        checkpoint = self.directory / "served-base"
        write_served_base(self.model, checkpoint)
        addresses = {}
        for kind in self._kinds:
            folder = self.directory / kind.name
            folder.mkdir()
            launch = kind.launch(checkpoint, folder, self.adapters, self._room, self.options.threads)
            server = PeerServer(launch, folder / "server.log")
            addresses[kind.name] = self._server.enter_context(server).wait_ready()
        return addresses

    def _contestants(self, scenario: Scenario, base: str, process: PeerProcess) -> list[Contestant]:
        names = [adapter.name for adapter in self.adapters]
        requests = scenario.requests(names, self.tokens.encode)
        return super()._contestants(scenario, base, process) + [
            HttpPeer(kind, self.servers[kind.name], names, requests, scenario.figure, self.tokens)
            for kind in self._kinds
        ]

    def keep(self, process: PeerProcess) -> PeerProcess:
        """Until the benchmark ends."""
        return self._server.enter_context(process)


def chosen_scenarios(options: argparse.Namespace) -> list[Scenario]:
    if unknown := [name for name in options.scenarios if name not in GOALS]:
        raise BenchError(f"{unknown[0]} is no scenario here; choose from {', '.join(GOALS)}")
    return [
        replace(KNOWN[name], name=f"peers-{name}", goals=GOALS[name]).resized(
            options.streams, options.prompt_tokens, options.new_tokens
        )
        for name in options.scenarios or GOALS
    ]


def chosen_kinds(names: Sequence[str]) -> list[ServerKind]:
    """Those named, or all that are installed."""
    known = {kind.name: kind for kind in KINDS}
    for name in names:
        if name not in known:
            raise BenchError(f"--peer {name}: choose from {', '.join(known)}")
        if not known[name].program.is_file():
            raise BenchError(
                f"--peer {name}: is not installed; run `python -m loadtests.peers.install {name}`"
            )
    found = [kind for kind in KINDS if (kind.name in names if names else kind.program.is_file())]
    if not found:
        raise BenchError("no peer is installed; run `make peers`")
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = bench.options_parser("python -m loadtests.bench_peers", "Run scenarios beside other servers.")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME", help="default: all installed")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console) -> None:
    scenarios = chosen_scenarios(options)
    kinds = chosen_kinds(options.peer)
    room = Room(
        max(scenario.streams for scenario in scenarios),
        max(scenario.prompt_tokens + scenario.new_tokens for scenario in scenarios),
    )
    results = []
    with tempfile.TemporaryDirectory(prefix="loramux-peers-") as name:
        peers = PeerBench(options, Path(name), kinds, room)
        peers.loras = bench.loras_for(scenarios)
        try:
            for scenario in scenarios:
                measure = churn if scenario.name == f"peers-{_CHURN}" else PeerBench.run
                results.append(measure(peers, scenario))
                print_result(results[-1], console)
                if options.save:
                    console.print(f"  saved {save(results[-1])}")
        finally:
            peers.close()
    if options.json:
        write_json(results, options.json)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        for name in GOALS:
            print(f"{name:16}{KNOWN[name].summary}")
        return 0
    try:
        run(options, Console(width=None if sys.stdout.isatty() else bench.PLAIN_WIDTH))
    except (BenchError, subprocess.CalledProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # As an exception, so that what was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
