"""Adapters come, change, go back and go while requests run; every answer is held against the generation it began with.

A real engine over a real registry and store, driven as the server drives them: a request leases what its name means and is
answered by that. Promises that a finished answer is the reference's tokens for exactly that generation, that nothing leaks
between steps, and that the store holds what names, histories and leases need, no more after a sweep. Threads load adapters
meanwhile, so a seed repeats the decisions, not the interleaving.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from loramux_adapters.registry import AdapterRegistry, Lease
from loramux_adapters.weights import LoraWeights
from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import AdapterRef, TokenOutput
from tests.server.support import request

Expected = Mapping[tuple[str | None, int], Sequence[int]]  # (generation, prompt) -> greedy tokens

NAMES = tuple(f"team-{number}/model" for number in range(6))
MAX_RUNNING = 10
MAX_SILENT_S = 60.0  # without a token while requests run


@dataclass
class _Running:
    """A request under way, and what it must become."""

    lease: Lease | None
    prompt: int
    wanted: int
    tokens: list[int]

    @property
    def generation(self) -> str | None:
        return self.lease.record.generation if self.lease else None


class Churn:
    """`run`, then `drain`."""

    def __init__(
        self,
        engine: Engine,
        registry: AdapterRegistry,
        adapters: Sequence[LoraWeights],
        prompts: Sequence[list[int]],
        expected: Expected,
        seed: int,
    ) -> None:
        self.engine = engine
        self.registry = registry
        self.done: Counter[str] = Counter()
        self.steps = 0
        self._adapters = adapters
        self._prompts = prompts
        self._expected = expected
        self._random = Random(seed)
        self._running: dict[str, _Running] = {}
        self._last_token = time.monotonic()
        self._number = 0

    def run(self, steps: int, check_every: int = 100) -> None:
        """So many steps more, the cheap checks every ten, all of them every `check_every`."""
        for _ in range(steps):
            self.step()
            if self.steps % 10 == 0:
                self.engine.check_integrity()
            if self.steps % check_every == 0:
                self.check()

    def step(self) -> None:
        self.steps += 1
        action = self._random.random()
        if action < 0.5:
            self._ask()
        elif action < 0.56:
            self._publish()
        elif action < 0.58:
            self._roll_back()
        elif action < 0.59:
            self._delete()
        elif action < 0.60:
            self._abort()
        elif action < 0.605:
            self._pin()
        elif action < 0.61:
            self.registry.sweep(min_age=0)
            self.done["sweeps"] += 1
        self._advance()

    def drain(self) -> None:
        """Let what runs come to its end; then nothing holds anything."""
        self.engine.bank.pin({})
        while self._running:
            self._advance()
        self.check()
        assert self.engine.blocks.num_used == 0
        assert not any(slot.references for slot in self.engine.bank.tier.slots.values())

    def check(self) -> None:
        """Everything that must hold between steps, from the device to the disk."""
        self.engine.check_integrity()
        leased = Counter(one.generation for one in self._running.values() if one.generation)
        for generation in {weights.generation for weights in self._adapters}:
            assert self.registry.in_flight(generation) == leased[generation]
        self.registry.sweep(min_age=0)
        named = {entry.generation for record in self.registry.list() for entry in record.history}
        stored = set(self.registry.store)
        assert stored == named | set(leased), "the store has what nobody needs, or lacks what somebody does"
        if stored:
            self.registry.store.verify(self._random.choice(sorted(stored)))
        self.done["checks"] += 1

    def _name(self) -> str | None:
        names = [record.name for record in self.registry.list()]
        return self._random.choice(names) if names else None

    def _ask(self) -> None:
        if len(self._running) >= MAX_RUNNING:
            return
        name = self._name() if self._random.random() < 0.9 else None
        lease = None
        if name is not None:
            if self._random.random() < 0.2:  # an earlier generation, by its pin
                generation = self._random.choice(self.registry.get(name).history).generation
                name = f"{name}@{generation[:16]}"
                self.done["pinned requests"] += 1
            lease = self.registry.lease(name)
        prompt = self._random.randrange(len(self._prompts))
        wanted = self._random.randint(1, len(self._expected[None, prompt]))
        one = _Running(lease, prompt, wanted, [])
        ref = None
        if lease is not None:
            generation = lease.record.generation
            ref = AdapterRef(generation, str(self.registry.store.path(generation)))
        self._number += 1
        self._running[f"r{self._number}"] = one
        self.engine.add(
            request(f"r{self._number}", self._prompts[prompt], ref, max_tokens=wanted, ignore_eos=True)
        )
        self._last_token = self._last_token if len(self._running) > 1 else time.monotonic()

    def _publish(self) -> None:
        name, weights = self._random.choice(NAMES), self._random.choice(self._adapters)
        kind = "replaced" if name in self.registry else "loaded"
        generation = self.registry.store.publish(weights)
        self.registry.put(name, generation, source="upload")
        self.done[kind] += 1

    def _roll_back(self) -> None:
        name = self._name()
        if name is not None and len(self.registry.get(name).history) > 1:
            self.registry.rollback(name)
            self.done["rolled back"] += 1

    def _delete(self) -> None:
        name = self._name()
        if name is not None:
            self.registry.delete(name)
            self.done["deleted"] += 1

    def _pin(self) -> None:
        """Another adapter, or none, is to stay on the device, as the catalogue tells the worker."""
        name = self._name() if self._random.random() < 0.7 else None
        generation = self.registry.get(name).generation if name else None
        path = self.registry.store.path
        self.engine.bank.pin({generation: str(path(generation))} if generation else {})
        self.done["pins"] += 1

    def _abort(self) -> None:
        if self._running:
            chosen = self._random.choice(sorted(self._running))
            self.engine.abort(chosen)
            self._end(chosen)
            self.done["aborted"] += 1

    def _advance(self) -> None:
        outputs = self.engine.step().outputs
        for output in outputs:
            self._take(output)
        if outputs:
            self._last_token = time.monotonic()
        elif self._running:
            time.sleep(0.0002)  # everybody waits for a loader, which needs the interpreter
            assert time.monotonic() - self._last_token < MAX_SILENT_S, (
                f"step {self.steps}: {len(self._running)} requests and no token for {MAX_SILENT_S:g} s"
            )

    def _take(self, output: TokenOutput) -> None:
        one = self._running[output.id]
        assert output.error is None, f"step {self.steps}, {output.id}: {output.error}"
        one.tokens += output.tokens
        if output.finish is None:
            return
        expected = list(self._expected[one.generation, one.prompt][: one.wanted])
        assert one.tokens == expected, (
            f"step {self.steps}, {output.id} was admitted under {(one.generation or 'the base')[:12]}: "
            f"{one.tokens} is not {expected}; {self._whose(one)}"
        )
        self.done["answers"] += 1
        self._end(output.id)

    def _whose(self, one: _Running) -> str:
        """What the wrong tokens are instead: the first thing to know."""
        owners = [
            str(generation)[:12]
            for (generation, prompt), tokens in self._expected.items()
            if prompt == one.prompt and list(tokens[: one.wanted]) == one.tokens
        ]
        return f"these are the tokens of {owners}" if owners else "nobody has these tokens"

    def _end(self, request_id: str) -> None:
        one = self._running.pop(request_id)
        if one.lease is not None:
            one.lease.release()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
