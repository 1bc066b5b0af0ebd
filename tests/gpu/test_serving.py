"""A mixed batch on the device against PEFT on the CPU, in fp32, on the values that the device's own NF4 weights have."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loramux_adapters.nf4 import NF4Linear
from loramux_server.base.loading import ResidentBase
from tests.server.support import EngineFactory, Recipe, Reference, request, run, tokens_of, write_adapter

LOGPROB_BOUND = 1e-3  # fp32 on both sides; sums are taken in other orders


def on_the_values_of(reference: Reference, base: ResidentBase) -> Reference:
    """Both devices may round a code differently where two are equally near: the CPU computes with the device's."""
    inner = reference._model.base_model.model
    with torch.no_grad():
        for name, module in base.model.named_modules():
            linear = getattr(module, "base_layer", module)
            if isinstance(linear, NF4Linear) and not name.endswith("base_layer"):
                mirrored = inner.get_submodule(name)
                weight = getattr(mirrored, "base_layer", mirrored).weight
                weight.copy_(linear.dequantize(torch.float32).cpu())
    return reference


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_a_mixed_batch_is_what_peft_gives_on_the_cpu(
    architecture: str, make_engine: EngineFactory, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = make_engine(architecture, max_loras=4)
    attention_only = ("o_proj", "qkv_proj") if architecture == "phi3" else ("q_proj", "v_proj")
    recipes = {
        "rank1": Recipe(r=1, seed=1),
        "rank8-partial": Recipe(r=8, seed=2, targets=attention_only),
        "rank64-rslora": Recipe(r=64, seed=3, use_rslora=True),
    }
    adapters = {
        name: write_adapter(tmp_path / name, engine.base.geometry, recipe) for name, recipe in recipes.items()
    }
    reference = Reference(tiny_model(architecture), engine.base.geometry, adapters)
    on_the_values_of(reference, engine.base)

    rng = random.Random(7)
    who = [None, "rank1", "rank8-partial", "rank64-rslora", None, "rank64-rslora", "rank1", "rank8-partial"]
    prompts = [[rng.randrange(3, 320) for _ in range(rng.randrange(5, 70))] for _ in who]
    arrivals = [
        (rng.randrange(12), request(f"r{i}", prompt, adapters.get(name or ""), logprobs=3))
        for i, (prompt, name) in enumerate(zip(prompts, who, strict=True))
    ]
    answers = run(engine, arrivals)

    for i, (prompt, name) in enumerate(zip(prompts, who, strict=True)):
        tokens = tokens_of(answers[f"r{i}"])
        assert tokens == reference.greedy(prompt, 16, name), f"request {i} on {name}"
        expected = torch.log_softmax(reference.logits(prompt + tokens, name)[len(prompt) - 1 : -1], -1)
        for position, output in enumerate(answers[f"r{i}"]):
            assert output.logprobs is not None
            for token, value in output.logprobs[0].top:
                assert value == pytest.approx(float(expected[position, token]), abs=LOGPROB_BOUND)
    engine.check_integrity()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_take_tokens_that_fp32_holds_for_nearly_the_best(
    dtype: str, make_engine: EngineFactory, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = make_engine("llama", dtype=dtype)
    adapters = {
        name: write_adapter(tmp_path / name, engine.base.geometry, Recipe(r=8, seed=seed))
        for seed, name in enumerate(("one", "two"), 1)
    }
    reference = Reference(tiny_model("llama"), engine.base.geometry, adapters)
    on_the_values_of(reference, engine.base)
    who = [None, "one", "two", "one"]
    prompts = [list(range(5 + i, 45 + 3 * i)) for i in range(len(who))]
    answers = run(
        engine,
        [
            (0, request(f"r{i}", prompt, adapters.get(name or "")))
            for i, (prompt, name) in enumerate(zip(prompts, who, strict=True))
        ],
    )
    for i, (prompt, name) in enumerate(zip(prompts, who, strict=True)):
        tokens = tokens_of(answers[f"r{i}"])
        logits = reference.logits(prompt + tokens, name)[len(prompt) - 1 : -1]
        behind = logits.max(-1).values - logits[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert float(behind.max()) < 0.1 * float(logits.std()), f"request {i} on {name}"
