"""Answers that follow a grammar, and the scores of prompts: in mixed batches, over preemption, without side effects."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from loramux_adapters.errors import RequestError
from loramux_server.api.structured import of_schema
from loramux_server.base.loading import LoadOptions, load_base
from loramux_server.engine.constraints import Grammars
from loramux_server.engine.engine import Engine, EngineOptions
from loramux_server.engine.messages import TokenOutput
from loramux_server.engine.scheduler import SchedulerLimits
from tests.api.conftest import byte_level_tokenizer
from tests.server.schemas import random_schema
from tests.server.support import Recipe, Reference, request, run, tokens_of, write_adapter

END = 1
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def ll_tokenizer(tokenizer: PreTrainedTokenizerFast) -> LLTokenizer:
    return from_tokenizer(tokenizer, n_vocab=320, eos_token=[END])


@pytest.fixture
def make(tiny_model: Callable[[str], Path], ll_tokenizer: LLTokenizer) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def build(read: Callable[[], LLTokenizer] = lambda: ll_tokenizer, **options: Any) -> Engine:
        base = load_base(
            LoadOptions(model=str(tiny_model("llama")), name="tiny", device="cpu", dtype="float32")
        )
        chosen: dict[str, Any] = {"num_blocks": 256, "max_model_len": 256, "lora_rows": 8, **options}
        limits = SchedulerLimits(16, 48)
        grammars = Grammars(read)
        engines.append(
            Engine(replace(base, eos_token_ids=(END,)), EngineOptions(limits=limits, **chosen), grammars)
        )
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


def text_of(tokenizer: PreTrainedTokenizerFast, outputs: list[TokenOutput]) -> str:
    tokens = tokens_of(outputs)
    assert END not in tokens[:-1]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def test_finished_answers_validate_and_neighbours_do_not_notice(
    make: MakeEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = make()
    random = Random(0)
    schemas = [random_schema(random) for _ in range(80)]
    asked = [
        request(f"{i}", [5, 6, 7 + i], temperature=1.0, seed=i, max_tokens=200, grammar=of_schema(schema))
        for i, schema in enumerate(schemas)
    ]
    free = [request(f"free{i}", [9, 8, 7 + i], seed=i, temperature=1.0, max_tokens=30) for i in range(8)]
    alone = run(engine, [(0, one) for one in free])
    together = run(engine, [(i // 4, one) for i, one in enumerate([*asked, *free])])
    finished = 0
    for index, schema in enumerate(schemas):
        outputs = together[str(index)]
        text = text_of(tokenizer, outputs)
        if outputs[-1].finish == "stop":
            jsonschema.validate(json.loads(text), schema)
            finished += 1
    assert finished >= 75
    for one in free:
        assert tokens_of(together[one.id]) == tokens_of(alone[one.id])
    engine.check_integrity()


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (LLMatcher.grammar_from_regex("(ab){3}"), "ababab"),
        (LLMatcher.grammar_from_lark('start: "yes" | "no"'), "yes no"),
    ],
)
def test_the_end_comes_only_where_the_grammar_allows(
    make: MakeEngine, tokenizer: PreTrainedTokenizerFast, grammar: str, pattern: str
) -> None:
    eager = request("eager", [3, 4], grammar=grammar, logit_bias={END: 100.0}, max_tokens=40)
    outputs = run(make(), [(0, eager)])["eager"]
    assert outputs[-1].finish == "stop"
    assert text_of(tokenizer, outputs) in pattern.split()


def test_max_tokens_cuts(make: MakeEngine) -> None:
    long = request("long", [3, 4], grammar=LLMatcher.grammar_from_regex("[ab]{500}"), max_tokens=20)
    outputs = run(make(), [(0, long)])["long"]
    assert (outputs[-1].finish, len(tokens_of(outputs))) == ("length", 20)


def test_a_preempted_answer_goes_on_in_its_grammar(
    make: MakeEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = make(num_blocks=9, max_model_len=128)
    grammar = LLMatcher.grammar_from_regex("[a-z]{60}!")
    outputs = run(
        engine,
        [
            (0, request(f"{i}", [3, 4 + i] * 10, grammar=grammar, seed=i, temperature=1.0, max_tokens=90))
            for i in range(4)
        ],
    )
    assert engine.scheduler.preemptions
    for one in outputs.values():
        text = text_of(tokenizer, one)
        assert len(text) == 61
        assert text[:-1].islower()
        assert text[-1] == "!"


def test_a_grammar_that_cannot_be_used_ends_its_request_alone(make: MakeEngine) -> None:
    engine = make()
    outputs = run(engine, [(0, request("bad", [3], grammar="start: nothing")), (0, request("good", [3]))])
    assert outputs["bad"][-1].finish == "error"
    assert "nothing" in str(outputs["bad"][-1].error)
    assert outputs["bad"][-1].error_code == "invalid_request"
    assert tokens_of(outputs["good"])
    engine.check_integrity()


def test_nobody_waits_for_a_grammar_but_its_own_request(make: MakeEngine, ll_tokenizer: LLTokenizer) -> None:
    gate = threading.Event()

    def read() -> LLTokenizer:
        assert gate.wait(20)
        return ll_tokenizer

    engine = make(read)
    grammar = LLMatcher.grammar_from_regex("ab")
    for name in ("slow", "dropped"):
        engine.add(request(name, [3], grammar=grammar))
    engine.add(request("quick", [3]))
    seen: set[str] = set()
    while "quick" not in seen:
        seen |= {one.id for one in engine.step().outputs if one.finish}
    assert engine.stats().waiting == 2
    engine.abort("dropped")
    gate.set()
    deadline = time.monotonic() + 60
    while engine.has_work and time.monotonic() < deadline:
        seen |= {one.id for one in engine.step().outputs if one.finish}
    assert seen == {"quick", "slow"}
    engine.check_integrity()


def test_an_engine_without_a_tokenizer_says_so(
    make_engine: Callable[..., Engine],
) -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        make_engine().add(request("x", [3], grammar="start: /a/"))


def test_prompts_are_scored_as_by_the_reference(
    make: MakeEngine, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = make()
    prompt = [
        int(token) for token in torch.randint(3, 300, (130,), generator=torch.Generator().manual_seed(1))
    ]
    asked = [
        request("scored", prompt, prompt_logprobs=3, logprobs=0, max_tokens=2),
        request("bare", prompt[:60], prompt_logprobs=0, max_tokens=1),
        request("one", [5], prompt_logprobs=2, max_tokens=1),
        request("other", prompt[:50], max_tokens=5),
    ]
    outputs = run(engine, [(0, one) for one in asked])
    adapter = write_adapter(tmp_path / "any", engine.base.geometry, Recipe(r=2))
    reference = torch.log_softmax(
        Reference(tiny_model("llama"), engine.base.geometry, {"any": adapter}).logits(prompt, None), -1
    )
    scores = outputs["scored"][0].prompt_logprobs
    assert scores is not None
    assert len(scores) == len(prompt) - 1
    for position, one in enumerate(scores):
        row, token = reference[position], prompt[position + 1]
        assert one.logprob == pytest.approx(float(row[token]), abs=2e-3)
        assert abs(one.rank - 1 - int((row > row[token]).sum())) <= 1
        assert [value for _, value in one.top] == pytest.approx(row.topk(3).values.tolist(), abs=2e-3)
    bare = outputs["bare"][0].prompt_logprobs
    assert bare is not None
    assert [one.logprob for one in bare] == pytest.approx([one.logprob for one in scores[:59]], abs=1e-3)
    assert outputs["scored"][1].prompt_logprobs is None
    assert outputs["one"][0].prompt_logprobs is None
    assert outputs["other"][0].prompt_logprobs is None


def test_a_preempted_prompt_is_scored_once(make: MakeEngine) -> None:
    prompt = [4, 5, 6, 7] * 10
    asked = [request(f"{i}", prompt, prompt_logprobs=1, max_tokens=60, ignore_eos=True) for i in range(4)]
    tight = make(num_blocks=14, max_model_len=128)
    outputs = run(tight, [(0, one) for one in asked])
    assert tight.scheduler.preemptions
    for one in outputs.values():
        scores = [output.prompt_logprobs for output in one if output.prompt_logprobs is not None]
        assert [len(score) for score in scores] == [39]
