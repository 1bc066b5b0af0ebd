"""The engine driven as its worker drives it, without a server: decode, prefill, a cold adapter, a training step.

Every function gives one value a round and checks that the steps it timed were what it meant to time.
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch

from loadtests import BenchError
from loadtests.gpu.roof import synchronize
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.training.batches import Batches
from loramux_adapters.training.layerwise import LayerStack
from loramux_adapters.training.lora import TrainedAdapter
from loramux_adapters.training.recipe import Recipe, resolve
from loramux_adapters.training.run import training_base
from loramux_adapters.training.samples import Sample
from loramux_adapters.training.trainer import Trainer
from loramux_adapters.twin import twin_of
from loramux_server.base.loading import ResidentBase
from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import AdapterRef, AddRequest, SamplingParams, StepOutput, TokenOutput

_LOADING_S = 0.0005  # nothing can run: an adapter is being read
_names = count()


@dataclass
class Driver:
    """One engine, its requests, and the clock."""

    engine: Engine
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def base(self) -> ResidentBase:
        return self.engine.base

    def prompt(self, tokens: int) -> list[int]:
        return [self.rng.randrange(self.base.config.vocab_size) for _ in range(tokens)]

    def add(self, prompt: list[int], new_tokens: int, adapter: AdapterRef | None) -> str:
        name = f"r{next(_names)}"
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        self.engine.add(AddRequest(name, prompt, params, adapter))
        return name

    def step(self) -> StepOutput:
        output = self.engine.step()
        for one in output.outputs:
            if one.error is not None:
                raise BenchError(f"a request failed: {one.error}")
        if output.stats.batch_tokens == 0:
            time.sleep(_LOADING_S)
        return output

    def until_first(self, names: Sequence[str]) -> None:
        """Step until each of these has its first token."""
        waiting = set(names)
        while waiting:
            waiting -= {one.id for one in self.step().outputs}

    def finish(self) -> list[TokenOutput]:
        outputs: list[TokenOutput] = []
        while self.engine.has_work:
            outputs += self.step().outputs
        return outputs

    def now(self) -> float:
        synchronize(self.base.device)
        return time.perf_counter()


def answers(
    driver: Driver, prompts: Sequence[list[int]], adapters: Sequence[AdapterRef | None], new_tokens: int
) -> list[list[int]]:
    """Greedy, all in one batch."""
    names = [driver.add(p, new_tokens, a) for p, a in zip(prompts, adapters, strict=True)]
    found: dict[str, list[int]] = {name: [] for name in names}
    for output in driver.finish():
        found[output.id] += output.tokens
    return [found[name] for name in names]


def decode(
    driver: Driver, adapters: Sequence[AdapterRef | None], context: int, steps: int, rounds: int
) -> list[float]:
    """Seconds of one step in which a stream for each of `adapters` takes one token."""
    streams = len(adapters)
    # Before the clock runs: streams whose adapter is there would decode their tokens away while others are read.
    warm = [driver.add(driver.prompt(1), 1, one) for one in {a.generation: a for a in adapters if a}.values()]
    driver.until_first(warm)
    new_tokens = decode_tokens(streams, steps, rounds)
    names = [driver.add(driver.prompt(context), new_tokens, adapter) for adapter in adapters]
    driver.until_first(names)
    driver.step()  # which is recorded, if steps are
    taken = []
    for _ in range(rounds):
        started = driver.now()
        for _ in range(steps):
            output = driver.step()
            if output.stats.batch_tokens != streams or len(output.outputs) != streams:
                raise BenchError(f"a decode step of {streams} streams ran {output.stats.batch_tokens} tokens")
        taken.append((driver.now() - started) / steps)
    for name in names:
        driver.engine.abort(name)
    return taken


def decode_tokens(streams: int, steps: int, rounds: int) -> int:
    """New tokens a stream needs: it decodes while later ones are still read in."""
    return rounds * steps + 2 * streams + 3


def prefill(driver: Driver, adapter: AdapterRef | None, tokens: int, rounds: int) -> list[float]:
    """Seconds from a prompt to its first token; what is compiled or allocated once is not in it."""
    driver.until_first([driver.add(driver.prompt(tokens), 1, adapter)])
    taken = []
    for _ in range(rounds):
        started = driver.now()
        driver.until_first([driver.add(driver.prompt(tokens), 1, adapter)])
        taken.append(driver.now() - started)
    return taken


def cold_adapters(driver: Driver, adapters: Sequence[AdapterRef], tokens: int) -> list[float]:
    """Seconds that each adds to the first token when it comes from its files, over when it is resident."""
    added = []
    for adapter in adapters:
        if adapter.generation in driver.engine.bank.resident():
            raise BenchError("an adapter that is to be cold is resident")
        took = []
        for _ in range(2):
            started = driver.now()
            driver.until_first([driver.add(driver.prompt(tokens), 1, adapter)])
            took.append(driver.now() - started)
        added.append(took[0] - took[1])
    return added


def training_steps(base: ResidentBase, tokens: int, rounds: int) -> tuple[list[float], int]:
    """Seconds of an optimizer step over one row of `tokens`, rank 16 on every linear; bytes beside the model at most."""
    rng = random.Random(1)
    rows = [[rng.randrange(base.config.vocab_size) for _ in range(tokens)] for _ in range(rounds + 1)]
    samples = [Sample(array("i", row), b"\0" + b"\1" * (tokens - 1)) for row in rows]
    fields = {"r": 16, "lora_alpha": 32.0, "batch_size": 1, "n_epochs": 1, "max_seq_length": tokens}
    recipe, _ = resolve(Recipe.parse(fields), training_base(base.model, base.geometry), len(samples))
    on_gpu = base.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(base.device)
    before = torch.cuda.memory_allocated(base.device) if on_gpu else 0
    twin = twin_of(base.model)
    spec = AdapterSpec(recipe.r, recipe.lora_alpha, recipe.target_modules)
    adapter = TrainedAdapter.install(twin, spec, base.geometry, seed=recipe.seed)
    batches = Batches([(index,) for index in range(len(samples))], 1, 1, recipe.seed)
    trainer = Trainer(LayerStack(twin), adapter, recipe, samples, batches)
    taken = []
    for _ in samples:
        synchronize(base.device)
        started = time.perf_counter()
        for _ in trainer.slices():
            pass
        synchronize(base.device)
        taken.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(base.device) - before if on_gpu else 0
    return taken[1:], peak
