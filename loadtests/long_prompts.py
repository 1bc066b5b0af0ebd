"""The scenarios about long prompts: one that many requests begin with, and those that arrive while others are answered.

Answers are held against the reference, those that come out of the prefix cache included. Asserts nothing.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING
from uuid import uuid4

from loadtests import scenarios as names
from loadtests.client import Load, Request, run_load
from loadtests.contestants import Answer
from loadtests.prompts import make_prompts
from loadtests.report import Figure, Result
from loadtests.rounds import answers_of, asking, held_against_reference, p99_gap, repeats, settings_of
from loadtests.scenarios import Scenario
from loadtests.server import base_name

if TYPE_CHECKING:
    from loadtests.bench import Bench

_TAIL = 32  # tokens of its own at the end of a prompt that begins like all others
_SPOKEN = 128  # tokens in the prompts of those that are being answered when long ones arrive
_LONG = 4  # different long prompts


def shared_prefix(bench: Bench, scenario: Scenario) -> Result:
    """One request at a time; time to the first token with the shared part in the cache, and without."""
    encode = bench.tokens.encode
    (prefix,) = make_prompts(encode, 1, scenario.prompt_tokens)
    tails = make_prompts(encode, scenario.streams + 1, _TAIL)
    first, *requests = [Request([*prefix, *tail], None, scenario.new_tokens) for tail in tails]
    url, base = bench.url, base_name(bench.url, [])

    def one_by_one(kind: str, *, token_names: bool = False) -> Load:
        salt = {"cache_salt": uuid4().hex} if kind == names.CACHED else {}
        run_load(url, base, [first], extra=salt)
        streams = [
            run_load(url, base, [request], token_names=token_names, extra=salt).streams[0]
            for request in requests
        ]
        return Load(streams, sum(len(request.prompt) for request in requests))

    kinds = (names.UNCACHED, names.CACHED)
    checked = {kind: one_by_one(kind, token_names=True) for kind in kinds}
    rounds: dict[str, list[float]] = {kind: [] for kind in kinds}
    texts: dict[str, tuple[int, int]] = {}
    for _ in range(bench.options.rounds):
        for kind in kinds:
            load = one_by_one(kind)
            rounds[kind].append(1e3 * median(stream.ttft for stream in load.streams))
            texts[kind] = repeats(texts.get(kind, (0, 0)), load, checked[kind])
    answers: dict[str, list[Answer]] = {kind: answers_of(bench, requests, checked[kind]) for kind in kinds}
    parities = held_against_reference(bench, scenario, {}, answers, texts)
    figures = []
    for kind in kinds:
        found = median(stream.cached_tokens for stream in checked[kind].streams)
        note = f"{found:g} of {len(first.prompt)} prompt tokens from the cache"
        figures.append(Figure(kind, "ms", rounds[kind], note, parity=parities[kind]))
    return Result(scenario, settings_of(bench, scenario), figures)


def long_prompts_beside(bench: Bench, scenario: Scenario) -> Result:
    """The same streams alone, and while long prompts arrive one after the other, each for one token."""
    encode = bench.tokens.encode
    spoken = make_prompts(encode, scenario.streams, min(_SPOKEN, scenario.prompt_tokens))
    requests = [Request(prompt, None, scenario.new_tokens) for prompt in spoken]
    long = [Request(prompt, None, 1) for prompt in make_prompts(encode, _LONG, scenario.prompt_tokens)]
    url, base = bench.url, base_name(bench.url, [])
    supplies: dict[str, list[Request]] = {names.ALONE: [], names.BESIDE_PROMPTS: long}
    checked = {}  # by streams that also pay for what is recorded once
    for kind, supply in supplies.items():
        with asking(url, base, supply):
            checked[kind] = run_load(url, base, requests, token_names=True)
    gaps: dict[str, list[float]] = {kind: [] for kind in supplies}
    beside = dict.fromkeys(supplies, 0)
    texts: dict[str, tuple[int, int]] = {}
    for _ in range(bench.options.rounds):
        for kind, supply in supplies.items():
            with asking(url, base, supply) as count:
                load = run_load(url, base, requests)
            beside[kind] += count[0]
            gaps[kind].append(1e3 * p99_gap(load))
            texts[kind] = repeats(texts.get(kind, (0, 0)), load, checked[kind])
    answers = {kind: answers_of(bench, requests, checked[kind]) for kind in supplies}
    parities = held_against_reference(bench, scenario, {}, answers, texts)
    figures = [
        Figure(kind, "ms", values, f"{beside[kind]} prompts beside", parity=parities[kind])
        for kind, values in gaps.items()
    ]
    return Result(scenario, settings_of(bench, scenario), figures)
