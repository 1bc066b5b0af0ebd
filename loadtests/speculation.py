"""The scenario about drafts: answers that repeat what the prompt holds, with `--speculative-config` and without.

Two servers take turns, one stream and then many; each one's answers are held against the reference. Asserts nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtests import BenchError
from loadtests import scenarios as names
from loadtests.client import Request, run_load
from loadtests.prompts import make_repetitions
from loadtests.report import Figure, Result
from loadtests.rounds import answers_of, held_against_reference, repeats, settings_of
from loadtests.scenarios import Scenario
from loadtests.server import ServerProcess, base_name

if TYPE_CHECKING:
    from loadtests.bench import Bench

CONFIG = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
_DRAFTED = "loramux_spec_decode_num_draft_tokens_total"
_RIGHT = "loramux_spec_decode_num_accepted_tokens_total"


def speculation(bench: Bench, scenario: Scenario) -> Result:
    """Greedy, over HTTP. Figures with drafts come first in each pair."""
    prompts = make_repetitions(bench.tokens.encode, scenario.streams, scenario.prompt_tokens)
    requests = [Request(prompt, None, scenario.new_tokens) for prompt in prompts]
    arguments = ["--speculative-config", json.dumps(CONFIG)]
    options = bench.options
    with ServerProcess(
        options.model, bench.directory / "drafts", threads=options.threads, arguments=arguments
    ) as server:
        drafting, _ = server.wait_ready()
        kinds = {
            names.drafts_kind(count, drafts=drafts): (drafting if drafts else bench.url, requests[:count])
            for count in sorted({1, scenario.streams})
            for drafts in (True, False)
        }
        base = base_name(bench.url, [])
        checked = {kind: run_load(url, base, some, token_names=True) for kind, (url, some) in kinds.items()}
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        texts: dict[str, tuple[int, int]] = {}
        right = {kind: Counter[str]() for kind in kinds}
        for _ in range(options.rounds):
            for kind, (url, some) in kinds.items():
                before = _drafts(url)
                load = run_load(url, base, some)
                rates[kind].append(load.generated_per_s)
                texts[kind] = repeats(texts.get(kind, (0, 0)), load, checked[kind])
                right[kind] += _drafts(url) - before
    answers = {kind: answers_of(bench, some, checked[kind]) for kind, (_, some) in kinds.items()}
    parities = held_against_reference(bench, scenario, {}, answers, texts)
    figures = [
        Figure(kind, "tok/s", rates[kind], _note(right[kind]), parity=parities[kind]) for kind in kinds
    ]
    return Result(scenario, settings_of(bench, scenario) | {"speculative_config": CONFIG}, figures)


def _drafts(url: str) -> Counter[str]:
    """What a server says of its drafts since its start."""
    try:
        text = httpx.get(f"{url}/metrics", timeout=10, trust_env=False).raise_for_status().text
    except httpx.HTTPError as error:
        raise BenchError(f"{url}/metrics: {error}") from error
    return Counter(
        {
            sample.name: int(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in (_DRAFTED, _RIGHT)
        }
    )


def _note(counts: Counter[str]) -> str:
    return f"{counts[_RIGHT]} of {counts[_DRAFTED]} drafts right" if counts[_DRAFTED] else ""
