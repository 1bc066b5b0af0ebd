"""The named scenarios: how many streams, over how many adapters, against whom, and what we want to reach.

A scenario is only a description; bench.py runs it. Goals are printed beside the figures and never asserted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loadtests.client import Request
from loadtests.prompts import Encode, make_prompts

OURS = "loramux"
OURS_BASE = "loramux, base only"
READY = "process start to ready"
HELP = "loramux --help"
COLD, WARM, DIFFERENCE = "first token, adapter on disk", "first token, adapter resident", "difference"
ALONE, BESIDE_WARM, BESIDE_LOADS = (
    "alone",
    "beside requests to a resident adapter",
    "beside requests that load one",
)
ZIPF, EIGHT = "loramux, 1,000 adapters", "loramux, 8 adapters"
EMPTY_START, FULL_START = "start without adapters", "start with adapters"
MORE_TIME, MORE_MEMORY = "time for the adapters", "memory for the adapters"
PEFT_LOAD = "PEFT load_adapter"
UNCACHED, CACHED = "first token, prompt computed", "first token, shared prefix in the cache"
BESIDE_PROMPTS = "beside long prompts"
BESIDE_JOB, HALF_LOAD, IDLE = "beside streams", "at half load", "while idle"
DEFAULT_BUDGET, LARGE_BUDGET = "default budget", "budget 100 ms"
PLAIN, LOGPROBS, SCHEMA, N_4 = "plain", "logprobs: 5", "json_schema", "n: 4"
SAMPLED = "temperature: 0.7, top_p: 0.95"


def drafts_kind(streams: int, *, drafts: bool) -> str:
    """The name of a contestant of the scenario "speculation"."""
    return f"{streams} stream{'s' if streams > 1 else ''}{', drafts' if drafts else ''}"


# "decode": generated tokens while every stream decodes, without the time the prompts take.
Figure = Literal["generated", "prompt", "decode"]


@dataclass(frozen=True)
class Goal:
    """A bound on a contestant's median, or on its ratio to another's."""

    of: str
    bound: float
    over: str | None = None
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def zipf_draws(count: int, adapters: int) -> list[int]:
    """`count` draws by Zipf's law, each as the place of what was drawn among all that were, in order of appearance."""
    weights = [1 / (rank + 1) for rank in range(adapters)]
    drawn = random.Random(0).choices(range(adapters), weights, k=count)
    places = {one: place for place, one in enumerate(dict.fromkeys(drawn))}
    return [places[one] for one in drawn]


@dataclass(frozen=True)
class Scenario:
    """`figure` says which tokens the rate counts. `base_too` also runs the same prompts on the base alone."""

    name: str
    summary: str
    streams: int = 0
    adapters: int = 0
    prompt_tokens: int = 128
    new_tokens: int = 64
    figure: Figure = "generated"
    base_too: bool = False
    peers: tuple[str, ...] = ()
    goals: tuple[Goal, ...] = ()
    own_server: bool = False  # measured by a function of MEASURES, on a server that it sets up itself
    shared_tokens: int = 0  # of the prompts, the same in all, and in the prefix cache from the first round on
    drawn_from: int = (
        0  # adapters that each request's is drawn from by Zipf's law; `adapters` are those that were
    )

    @property
    def is_start(self) -> bool:
        return self.streams == 0

    def resized(self, streams: int | None, prompt_tokens: int | None, new_tokens: int | None) -> Scenario:
        """With the sizes that are given. Goals are for the scenario's own sizes and go when one is changed."""
        changed = replace(
            self,
            streams=streams or self.streams,
            prompt_tokens=prompt_tokens or self.prompt_tokens,
            new_tokens=new_tokens if new_tokens and self.figure != "prompt" else self.new_tokens,
        )
        if changed == self:
            return self
        sizes = f"{changed.streams} streams, {changed.prompt_tokens} + {changed.new_tokens} tokens"
        return replace(changed, summary=f"{self.summary}; resized to {sizes}", goals=())

    def requests(self, adapters: Sequence[str], encode: Encode) -> list[Request]:
        """The same in every call; adapters take turns, or are drawn."""
        names: Sequence[str | None] = adapters[: self.adapters] or [None]
        chosen = zipf_draws(self.streams, self.drawn_from) if self.drawn_from else range(self.streams)
        prompts = make_prompts(encode, self.streams, self.prompt_tokens)
        salt = "shared" if self.shared_tokens else None
        for prompt in prompts[1:]:
            prompt[: self.shared_tokens] = prompts[0][: self.shared_tokens]
        return [
            Request(prompt, names[index % len(names)], self.new_tokens, salt)
            for index, prompt in zip(chosen, prompts, strict=True)
        ]


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "start",
            "from process start to ready with the model in the cache; loramux --help",
            goals=(Goal(READY, 15, at_most=True), Goal(HELP, 0.3, at_most=True)),
        ),
        Scenario("single", "one stream on the base", streams=1, peers=("transformers",)),
        Scenario("base-8", "8 streams on the base", streams=8, peers=("transformers",)),
        Scenario("base-16", "16 streams on the base", streams=16, peers=("transformers",)),
        Scenario(
            "base-32",
            "32 streams on the base",
            streams=32,
            peers=("transformers",),
        ),
        Scenario(
            "decode-32",
            "32 streams on the base, decode steps only; goal: 300 tok/s where the lean loop gets 392",
            streams=32,
            figure="decode",
            peers=("lean-loop",),
            goals=(Goal(OURS, 300 / 392, over="lean-loop"),),
        ),
        Scenario(
            "mixed",
            "32 streams over 8 adapters (r16, all linears)",
            streams=32,
            adapters=8,
            base_too=True,
            peers=("peft-set-adapter", "peft-adapter-names"),
            goals=(Goal(OURS, 10, over="peft-set-adapter"), Goal(OURS, 0.75, over=OURS_BASE)),
        ),
        Scenario(
            "one-adapter-32",
            "32 streams on one adapter",
            streams=32,
            adapters=1,
            base_too=True,
            peers=("peft-set-adapter", "peft-batch"),
        ),
        Scenario(
            "adapters-32",
            "32 streams over 32 adapters (r16, all linears)",
            streams=32,
            adapters=32,
            base_too=True,
            peers=("peft-set-adapter", "peft-adapter-names"),
        ),
        Scenario(
            "long-prompts",
            "8 streams with prompts of 2,048 tokens and short answers",
            streams=8,
            prompt_tokens=2048,
            new_tokens=16,
            peers=("transformers",),
        ),
        Scenario(
            "prefill",
            "long prompts, one new token each; counts prompt tokens; goal: 1500 tok/s where transformers has 2036",
            streams=8,
            prompt_tokens=1024,
            new_tokens=1,
            figure="prompt",
            peers=("transformers-each",),
            goals=(Goal(OURS, 1500 / 2036, over="transformers-each"),),
        ),
        Scenario(
            "cold-adapter",
            "time to the first token of an adapter on disk against one that is resident (r16, all linears)",
            streams=8,
            prompt_tokens=32,
            new_tokens=8,
            own_server=True,
        ),
        Scenario(
            "loads-beside",
            "p99 gap between tokens of 8 streams while other adapters are loaded one after the other",
            streams=8,
            adapters=4,
            own_server=True,
            goals=(Goal(BESIDE_LOADS, 1.05, over=BESIDE_WARM, at_most=True),),
        ),
        Scenario(
            "zipf-1000",
            "128 requests drawn by Zipf's law from 1,000 adapters (r8, q and v), against 8 of them in turn",
            streams=128,
            adapters=1000,
            new_tokens=32,
            own_server=True,
            goals=(Goal(ZIPF, 0.8, over=EIGHT),),
        ),
        Scenario(
            "registered-1000",
            "what 1,000 registered adapters cost before one is used: time at start and memory",
            streams=1,
            adapters=1000,
            own_server=True,
            goals=(Goal(MORE_TIME, 5, at_most=True), Goal(MORE_MEMORY, 50, at_most=True)),
        ),
        Scenario(
            "adapter-load",
            "an adapter's way from its files to where requests can use it (r16, all linears), without a server",
            streams=1,
            adapters=8,
            prompt_tokens=32,
            new_tokens=8,
            own_server=True,
            goals=(Goal(OURS, 4, over=PEFT_LOAD),),
        ),
        Scenario(
            "features",
            "32 streams on the base: plain, with log-probabilities, random draws, a JSON schema, and 4 choices of 8 prompts",
            streams=32,
            own_server=True,
            goals=(Goal(SCHEMA, 0.85, over=PLAIN), Goal(SAMPLED, 0.85, over=PLAIN)),
        ),
        Scenario(
            "shared-prefix",
            "time to the first token of prompts that begin with the same 1,024 tokens, with and without the prefix cache",
            streams=8,
            prompt_tokens=1024,
            new_tokens=8,
            own_server=True,
            goals=(Goal(UNCACHED, 5, over=CACHED),),
        ),
        Scenario(
            "speculation",
            "answers that repeat a list of the prompt, 1 stream and 8, with n-gram drafts and without",
            streams=8,
            prompt_tokens=256,
            new_tokens=128,
            own_server=True,
            goals=(Goal(drafts_kind(1, drafts=True), 1.3, over=drafts_kind(1, drafts=False)),),
        ),
        Scenario(
            "training-beside",
            "a fine-tuning job beside streams: tokens it trains on a second, and the p99 gap of 4 streams with and without",
            streams=4,
            prompt_tokens=32,
            new_tokens=128,
            own_server=True,
            goals=(
                Goal(
                    f"{DEFAULT_BUDGET}: trained {HALF_LOAD}", 0.76, over=f"{DEFAULT_BUDGET}: trained {IDLE}"
                ),
                Goal(f"{LARGE_BUDGET}: trained {HALF_LOAD}", 0.76, over=f"{LARGE_BUDGET}: trained {IDLE}"),
            ),
        ),
        Scenario(
            "long-prompts-beside",
            "p99 gap between tokens of 8 streams while prompts of 2,048 tokens arrive one after the other",
            streams=8,
            prompt_tokens=2048,
            own_server=True,
            goals=(Goal(BESIDE_PROMPTS, 2, over=ALONE, at_most=True),),
        ),
    )
}
