"""What options of a request cost: log-probabilities, random draws, a JSON schema, four choices, beside the plain request.

The same number of tokens every time, greedy where nothing else is said, over HTTP, on one server; the kinds take turns.
Answers are not checked here: the plain ones are those of `base-32`. Asserts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loadtests import scenarios as names
from loadtests.client import Request, run_load
from loadtests.prompts import make_prompts
from loadtests.report import Figure, Result
from loadtests.scenarios import Scenario
from loadtests.server import base_name

if TYPE_CHECKING:
    from loadtests.bench import Bench

CHOICES = 4
_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
# Too long to be finished: every answer ends at the number of tokens that was asked for.
_SCHEMA = {"type": "array", "items": _PERSON, "minItems": 10_000}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "people", "schema": _SCHEMA}}
_KINDS: Mapping[str, Mapping[str, Any]] = {
    names.PLAIN: {},
    names.LOGPROBS: {"logprobs": 5},
    names.SAMPLED: {"temperature": 0.7, "top_p": 0.95},
    names.SCHEMA: {"response_format": _FORMAT, "ignore_eos": False},
    names.N_4: {"n": CHOICES},
}


def features(bench: Bench, scenario: Scenario) -> Result:
    prompts = make_prompts(bench.tokens.encode, scenario.streams, scenario.prompt_tokens)
    requests = [Request(prompt, None, scenario.new_tokens) for prompt in prompts]
    fewer = requests[: max(1, len(requests) // CHOICES)]
    url = bench.url
    base = base_name(url, [])
    rates: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    for number in range(-1, bench.options.rounds):  # the first round warms up
        for kind, extra in _KINDS.items():
            load = run_load(url, base, fewer if kind == names.N_4 else requests, extra=extra)
            if number >= 0:
                rates[kind].append(load.generated_per_s)
    figures = [
        Figure(kind, "tok/s", values, f"{len(fewer)} prompts" if kind == names.N_4 else "")
        for kind, values in rates.items()
    ]
    settings = {
        "model": bench.options.model,
        "streams": scenario.streams,
        "prompt_tokens": scenario.prompt_tokens,
        "new_tokens": scenario.new_tokens,
        "rounds": bench.options.rounds,
        "threads": bench.options.threads,
    }
    return Result(scenario, settings, figures)
