"""How long an adapter takes from its files to where requests can use it: our engine or PEFT, in a process of their own.

Ours: the gate and the hash, the host copy, the device's rank rows, as the server does it. PEFT: `load_adapter` into a model
of dense layers with the same NF4 values. Each load begins from the files; what was loaded before is gone. One JSON object
per line, as peft_peer.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from loadtests.peers.peft_peer import PeftPeer
from loramux_adapters.gate import smallest_geometry
from loramux_adapters.weights import GateLimits, LoraWeights
from loramux_server.base.loading import LoadOptions, load_base
from loramux_server.engine.engine import Engine, EngineOptions
from loramux_server.engine.messages import AdapterRef, AddRequest, SamplingParams

_POLL_S = 0.0002


class Loader(Protocol):
    def load(self, path: str) -> None: ...
    def unload(self) -> None: ...
    def answer(self, path: str, prompt: list[int], count: int) -> list[int]: ...
    def close(self) -> None: ...


class OurLoader:
    """An engine with room for one adapter: the next one always takes the whole way."""

    def __init__(self, model: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        base = load_base(LoadOptions(model=str(model), name="bench"))
        self._engine = Engine(base, EngineOptions(num_blocks=64, max_loras=1, max_cpu_loras=1, lora_rows=64))
        self._generations: dict[str, str] = {}

    def load(self, path: str) -> None:
        generation = self._generation(path)
        while not self._engine.bank.prepare(generation, path):
            time.sleep(_POLL_S)

    def unload(self) -> None:
        """Nothing: the next load evicts."""

    def answer(self, path: str, prompt: list[int], count: int) -> list[int]:
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        self._engine.add(AddRequest("one", prompt, params, AdapterRef(self._generation(path), path)))
        tokens: list[int] = []
        while self._engine.has_work:
            for output in self._engine.step().outputs:
                tokens += output.tokens
        return tokens

    def close(self) -> None:
        self._engine.close()

    def _generation(self, path: str) -> str:
        """A server knows it since the upload, so it is not part of the load."""
        if path not in self._generations:
            weights = LoraWeights.read(Path(path), smallest_geometry(Path(path), GateLimits()))
            self._generations[path] = weights.generation
        return self._generations[path]


class PeftLoader:
    """One resident adapter beside a placeholder, as PEFT needs one to begin with."""

    _NAME = "loaded"

    def __init__(self, model: Path, threads: int) -> None:
        self._model, self._threads = model, threads
        self._peer: PeftPeer | None = None

    def load(self, path: str) -> None:
        if self._peer is None:
            self._peer = PeftPeer(self._model, {"placeholder": path}, self._threads)
        self._peer.load(path, self._NAME)

    def unload(self) -> None:
        if self._peer is not None:
            self._peer.unload(self._NAME)

    def answer(self, path: str, prompt: list[int], count: int) -> list[int]:
        self.load(path)
        assert self._peer is not None
        request = {"prompt": prompt, "adapter": self._NAME, "new_tokens": count}
        _, [tokens] = self._peer.generate("each", [request])
        self.unload()
        return tokens

    def close(self) -> None:
        """Nothing: PEFT keeps no threads."""


def timed(loader: Loader, paths: Mapping[str, str]) -> float:
    seconds = 0.0
    for path in paths.values():
        start = time.perf_counter()
        loader.load(path)
        seconds += time.perf_counter() - start
        loader.unload()
    return seconds


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    setup = json.loads(sys.stdin.readline())
    kind = OurLoader if setup["kind"] == "loramux" else PeftLoader
    loader: Loader = kind(Path(setup["model"]), setup["threads"])
    answer({"kind": setup["kind"]})
    for line in sys.stdin:
        match json.loads(line):
            case {"op": "load", "paths": paths}:
                answer({"seconds": timed(loader, paths)})
            case {"op": "answer", "path": path, "prompt": prompt, "count": count}:
                answer({"tokens": loader.answer(path, prompt, count)})


if __name__ == "__main__":
    main()
