"""What a user would pick instead, as contestants of the same rounds.

A peer is a process of its own that keeps its model loaded and waits, without using the CPU, for its turn: one JSON
object per line in (`{"op": ...}`) and out. It may run in another environment, so nothing here imports its libraries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from loadtests import BenchError
from loadtests.client import Request

REFERENCE_MODULE = "loadtests.peers.peft_peer"
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class PeerKind:
    """How a peer works through the requests: one after another, or all as one batch ("lean": times decoding only)."""

    mode: Literal["each", "batch", "lean"]
    note: str
    subset: int | None = None  # only so many of the requests; its rate stands for all


PEERS: Mapping[str, PeerKind] = {
    "peft-set-adapter": PeerKind("each", "PEFT set_adapter + generate, one request at a time", subset=8),
    "peft-adapter-names": PeerKind("batch", "PEFT generate(adapter_names=...), one batch"),
    "peft-batch": PeerKind("batch", "PEFT set_adapter + generate, one batch"),
    "transformers": PeerKind("batch", "transformers generate, one batch"),
    "lean-loop": PeerKind("lean", "hand-written decode loop for this architecture, one batch, no adapters"),
    "transformers-each": PeerKind("each", "transformers generate, one request at a time"),
}


@dataclass(frozen=True)
class PeerRun:
    """What one turn of a peer took."""

    seconds: float
    tokens: list[list[int]]  # the answers, in the order of the requests that were run


class PeerProcess:
    """A peer's process: started at once, its model read in the background; `ready` waits for it."""

    def __init__(self, module: str, setup: Mapping[str, Any], log: Path, *, threads: int) -> None:
        self._log = log
        # At its start, so that every native library's thread pool has the same size.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                cwd=_ROOT,
                env=environment,
            )
        self._send({"op": "setup", "threads": threads, **setup})

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ready(self) -> dict[str, Any]:
        """What it says about itself: dtype, device, versions. To be called once."""
        return self._receive()

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        self._send({"op": op, **fields})
        return self._receive()

    def generate(self, mode: str, requests: Sequence[Request]) -> PeerRun:
        answer = self.call("generate", mode=mode, requests=[asdict(request) for request in requests])
        return PeerRun(answer["seconds"], answer["tokens"])

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _died(self) -> BenchError:
        return BenchError(f"a peer process ended:\n{self._log.read_text(errors='replace')[-2000:]}")
