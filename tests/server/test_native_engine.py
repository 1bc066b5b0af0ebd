"""The engine in bf16 on compiled kernels: company changes not a bit, and torch says nearly the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from loramux_adapters.errors import BaseModelError
from loramux_server.base.loading import LoadOptions, load_base
from loramux_server.engine.engine import Engine, EngineOptions
from loramux_server.engine.messages import TokenOutput
from loramux_server.engine.recorded_adapters import PooledAdapters
from loramux_server.engine.scheduler import SchedulerLimits
from tests.server.support import Recipe, request, run, tokens_of, write_adapter

Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its sizes are those the kernels take, the head's too."""
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler")
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=320,
            max_position_embeddings=512,
        )
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0, 0.6 if "embed" in name else 0.12)
    directory = tmp_path_factory.mktemp("models") / "tiny"
    made.save_pretrained(directory)
    return directory


@pytest.fixture
def make(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    kernels = tmp_path_factory.getbasetemp() / "kernels"
    engines: list[Engine] = []

    def engine(
        *, native: bool = True, dtype: str = "bfloat16", quantization: Any = "nf4", **options: Any
    ) -> Engine:
        base = load_base(
            LoadOptions(
                str(model),
                "tiny",
                device="cpu",
                dtype=dtype,
                quantization=quantization,
                cpu_kernels=kernels if native else None,
            )
        )
        chosen = {"num_blocks": 128, "max_model_len": 256, "max_loras": 4, "lora_rows": 128, **options}
        limits = SchedulerLimits(16, 512, long_prompt_tokens=32)
        engines.append(Engine(base, EngineOptions(limits=limits, **chosen)))
        return engines[-1]

    yield engine
    for one in engines:
        one.close()


RECIPES = {
    "a": Recipe(r=1, seed=1),
    "b": Recipe(r=8, seed=2, targets=("q_proj", "v_proj")),
    "c": Recipe(r=16, seed=3),
}
WHO = [None, "a", "b", "c", None, "c", "a", "b", "c"]


def requests_on(engine: Engine, directory: Path, count: int = 12) -> list[Any]:
    refs = {name: write_adapter(directory / name, engine.base.geometry, one) for name, one in RECIPES.items()}
    return [
        request(
            f"r{i}",
            [(7 * i + 3 * k) % 300 + 5 for k in range(20 + 5 * i)],
            refs.get(name) if name else None,
            max_tokens=count,
            logprobs=3,
        )
        for i, name in enumerate(WHO)
    ]


def scores(outputs: list[TokenOutput]) -> list[Any]:
    return [output.logprobs for output in outputs]


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_company_changes_not_a_bit(make: Make, tmp_path: Path, quantization: str) -> None:
    engine = make(quantization=quantization)
    if engine.base.native is not None and engine.base.native.products is None:
        pytest.skip("oneDNN multiplies here, whose bits depend on the batch")
    items = requests_on(engine, tmp_path)
    mixed = run(engine, [(0, item) for item in items])
    for item in items:
        alone = run(engine, [(0, item)])[item.id]
        assert tokens_of(alone) == tokens_of(mixed[item.id])
        assert scores(alone) == scores(mixed[item.id])
    assert len({tuple(tokens_of(outputs)) for outputs in mixed.values()}) == len(WHO)


def test_recorded_steps_say_the_same_to_the_bit(make: Make, tmp_path: Path) -> None:
    recorded, plain = make(), make(enforce_eager=True)
    if recorded.base.native is not None and recorded.base.native.products is None:
        pytest.skip("oneDNN multiplies here, whose bits depend on how many rows a step is filled up to")
    assert plain.runner.graphs is None
    graphs = recorded.runner.graphs
    assert graphs is not None
    for count in (1, 2, 9):
        for first in (1, 0):  # on an adapter, which is loaded from then on; on the base
            chosen = slice(first, first + count)
            ours = run(recorded, [(0, one) for one in requests_on(recorded, tmp_path / "one")[chosen]])
            theirs = run(plain, [(0, one) for one in requests_on(plain, tmp_path / "two")[chosen]])
            for name, outputs in ours.items():
                assert tokens_of(outputs) == tokens_of(theirs[name])
                assert scores(outputs) == scores(theirs[name])
    assert graphs.works
    kinds = {kind for _, kind in graphs._recordings}
    assert {frozenset(), recorded.bank.pool.by_rows and recorded.bank.pool.by_rows.names} <= kinds
    assert {shape.decoding for shape, _ in graphs._recordings} >= {1, 2, 16}


@pytest.mark.parametrize("size", [10, 16, 20])
def test_recorded_parts_of_prompts_say_the_same_to_the_bit(make: Make, tmp_path: Path, size: int) -> None:
    recorded, plain = (make(enforce_eager=eager, enable_prefix_caching=False) for eager in (False, True))
    if recorded.base.native is not None and recorded.base.native.products is None:
        pytest.skip("oneDNN multiplies here, whose bits depend on how many rows a step is filled up to")
    found = []
    for engine in (recorded, plain):
        engine.scheduler.pace.tokens = lambda streams: size  # type: ignore[method-assign]
        items = requests_on(engine, tmp_path / str(len(found)), count=40)
        for item in items:  # every adapter is loaded before two engines are compared step by step
            run(engine, [(0, item)])
        found.append(run(engine, [(6 * number, item) for number, item in enumerate(items)]))
    for name, outputs in found[0].items():
        assert tokens_of(outputs) == tokens_of(found[1][name])
        assert scores(outputs) == scores(found[1][name])
    assert recorded.runner.graphs is not None
    parts = {shape.part for shape, _ in recorded.runner.graphs._recordings}
    assert parts == {0, 16 if size <= 16 else 32}


def test_company_of_the_same_adapter_changes_not_a_bit(make: Make, tmp_path: Path) -> None:
    """Prompts of one adapter that fill a step: a dense product would do, but its bits depend on the rows."""
    engine = make()
    if engine.base.native is not None and engine.base.native.products is None:
        pytest.skip("oneDNN multiplies here, whose bits depend on the batch")
    items = [item for item, who in zip(requests_on(engine, tmp_path), WHO, strict=True) if who == "c"]
    together = run(engine, [(0, item) for item in items])
    for item in items:
        alone = run(engine, [(0, item)])[item.id]
        assert scores(alone) == scores(together[item.id])


def test_no_more_kinds_are_recorded_than_a_few(make: Make, tmp_path: Path) -> None:
    """Adapters may target any linears; after some combinations a step is recorded for all of them."""
    engine = make(max_loras=8, lora_rows=64)
    adapters = engine.runner.graphs and engine.runner.graphs._adapters
    assert isinstance(adapters, PooledAdapters)
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    found = {}
    for number, leaf in enumerate(leaves):
        ref = write_adapter(tmp_path / leaf, engine.base.geometry, Recipe(r=4, seed=number, targets=(leaf,)))
        outputs = run(engine, [(0, request(leaf, [5, 6, 7], ref, max_tokens=6, logprobs=1))])[leaf]
        plain = make(enforce_eager=True, max_loras=8, lora_rows=64)
        assert scores(outputs) == scores(
            run(plain, [(0, request(leaf, [5, 6, 7], ref, max_tokens=6, logprobs=1))])[leaf]
        )
        found[leaf] = tokens_of(outputs)
    by_rows = engine.bank.pool.by_rows
    assert by_rows is not None
    assert len(adapters._kinds) == 5
    assert by_rows.names in adapters._kinds
    assert engine.runner.graphs is not None
    assert engine.runner.graphs.works


def test_torch_says_nearly_the_same(make: Make, tmp_path: Path) -> None:
    """One token each, and its log-probability: what follows hangs on roundings."""
    native, plain = make(), make(native=False)
    ours = run(native, [(0, item) for item in requests_on(native, tmp_path / "one", 1)])
    theirs = run(plain, [(0, item) for item in requests_on(plain, tmp_path / "two", 1)])
    for name, outputs in ours.items():
        (mine,), (other,) = scores(outputs)[0], scores(theirs[name])[0]
        best, value = other.top[0]
        assert dict(mine.top)[best] == pytest.approx(value, abs=0.15)


def test_every_kernel_is_used(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    native = engine.base.native
    assert native is not None
    by_rows = engine.bank.pool.by_rows
    assert by_rows is not None
    calls = set()

    def note(owner: object, attribute: str, name: str) -> None:
        original = getattr(owner, attribute)

        def noted(*arguments: Any, **options: Any) -> Any:
            calls.add(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, attribute, noted)

    for name in ("rms_norm", "rotate", "gate", "attend", "attend_prompts", "write"):
        note(native, name, name)
    note(by_rows, "_product", "lora")
    run(engine, [(0, item) for item in requests_on(engine, tmp_path, 4)])
    used = {"rms_norm", "rotate", "gate", "lora", "attend", "write"}
    assert calls == used | ({"attend_prompts"} if engine.runner.kernels.prefill else set())
    assert engine.runner.kernels.decode is not None
    kinds = {
        type(module.kernel).__name__ for module in engine.base.model.modules() if hasattr(module, "kernel")
    }
    assert kinds == ({"FusedPart", "CodesKernel"} if native.products else {"FusedPart", "DenseKernel"})


@pytest.mark.parametrize("wrong", ["rms_norm", "rotate", "gate"])
def test_the_check_at_the_start_is_against_torch(
    make: Make, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that is right on its probe and wrong on this model: the model's own code is what it is held against."""
    native = make().base.native
    assert native is not None
    right = getattr(type(native), wrong)
    armed = False
    monkeypatch.setattr(
        type(native),
        wrong,
        lambda *given, **options: 3 * right(*given, **options) if armed else right(*given, **options),
    )
    engine = make()
    engine.base.model.set_attn_implementation("eager")  # as it is when a runner begins
    engine.runner._self_check()
    armed = True
    with pytest.raises(BaseModelError, match="gives other logits on the paged KV cache"):
        engine.runner._self_check()


@pytest.mark.parametrize("options", [{"native": False}, {"dtype": "float32"}])
def test_without_kernels(make: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    engine = make(**options)
    assert engine.base.native is None
    assert engine.runner.kernels.decode is None
    items = requests_on(engine, tmp_path, 3)
    assert len(run(engine, [(0, item) for item in items])) == len(WHO)


def test_adapters_that_come_and_go(make: Make, tmp_path: Path) -> None:
    """Rows of the pool are reused by others; nothing of them is kept."""
    engine = make(max_loras=2, lora_rows=24, max_cpu_loras=2)
    refs = [
        write_adapter(tmp_path / str(i), engine.base.geometry, Recipe(r=1 + 3 * i, seed=10 + i))
        for i in range(5)
    ]
    prompt = list(range(20, 50))
    answers = run(engine, [(i, request(f"r{i}", prompt, ref)) for i, ref in enumerate(refs)])
    roomy = make(max_loras=8)
    for i, ref in enumerate(refs):
        alone = run(roomy, [(0, request("alone", prompt, ref))])["alone"]
        assert tokens_of(answers[f"r{i}"]) == tokens_of(alone)
    assert len({tuple(tokens_of(one)) for one in answers.values()}) == len(refs)
