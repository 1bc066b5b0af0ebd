"""Exported bf16 checkpoints, loaded by plain transformers, against an independent build of the served model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from loramux_adapters.export import ExportOptions, VerifyOptions, WeightedAdapter, plan_export, run_export

from .conftest import Recipe, make_adapter

UNVERIFIED = VerifyOptions(prompts=0)

RECIPES: dict[str, Recipe] = {
    "llama": Recipe(),
    "mistral": Recipe({"use_rslora": True, "lora_alpha": 6}),
    "qwen2": Recipe({"rank_pattern": {"q_proj": 4, "down_proj": 2}, "alpha_pattern": {"q_proj": 32}}),
    "qwen3": Recipe({"r": 1, "lora_alpha": 2}),
    "gemma2": Recipe({"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj", "mlp.up_proj"]}),
    "phi3": Recipe(),
}
SMALL, LARGE = 0.02, 0.1


def nf4_rounded(weight: torch.Tensor) -> torch.Tensor:
    packed, state = bnb.quantize_4bit(
        weight.bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return bnb.dequantize_4bit(packed, state)


def served_model(base: Path, adapters: tuple[Path, ...] = ()) -> Any:
    """transformers with every decoder linear rounded to NF4, the adapters applied by PEFT; fp32 arithmetic."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            module.weight.data = nf4_rounded(module.weight.data).float()
    for number, path in enumerate(adapters):
        if number == 0:
            model = PeftModel.from_pretrained(model, path, adapter_name="a0")
        else:
            model.load_adapter(path, adapter_name=f"a{number}")
    return model.eval()


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens).logits.double().flatten(0, 1).log_softmax(-1)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """1,280 positions."""
    return torch.randint(2, 258, (8, 160), generator=torch.Generator().manual_seed(3))


def export(base: Path, adapter: Path, out: Path, **options: Any) -> Any:
    options.setdefault("verify", UNVERIFIED)
    adapters = (WeightedAdapter(adapter),)
    return run_export(plan_export(ExportOptions(base, adapters, out, **options)))


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("family", RECIPES)
def test_export_is_the_served_model(
    bases: Callable[[str], Path], tokens: torch.Tensor, family: str, size: float, tmp_path: Path
) -> None:
    base = bases(family)
    adapter = make_adapter(tmp_path / "adapter", base, Recipe(RECIPES[family].config, size=size))
    export(base, adapter, tmp_path / "merged")

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    exported = logits_of(model, tokens)
    served = logits_of(served_model(base, (adapter,)), tokens)
    bare = logits_of(served_model(base), tokens)

    assert kl(exported, served) <= 1e-5
    assert (exported.argmax(-1) == served.argmax(-1)).double().mean() >= 0.999
    assert kl(bare, served) > 20 * kl(exported, served), "the adapter must matter for this to show anything"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_each_tensor_is_what_it_should_be(bases: Callable[[str], Path], family: str, tmp_path: Path) -> None:
    base = bases(family)
    targets = ["model.layers.1.mlp.down_proj"]
    adapter = make_adapter(tmp_path / "adapter", base, Recipe({"target_modules": targets}, size=LARGE))
    result = export(base, adapter, tmp_path / "merged")
    before, after = (load_file(directory / "model.safetensors") for directory in (base, result.out))

    assert list(after) == list(before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    actions = {tensor["name"]: tensor["action"] for tensor in result.report["tensors"]}
    for name, tensor in after.items():
        if "_proj.weight" not in name:
            assert actions[name] == "copied"
            assert torch.equal(tensor, before[name])
        elif name != "model.layers.1.mlp.down_proj.weight":
            assert actions[name] == "dequantized"
            assert torch.equal(tensor, nf4_rounded(before[name]))
        else:
            assert actions[name] == "merged"
            assert not torch.equal(tensor, nf4_rounded(before[name]))


def test_merged_values_are_rounded_once(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    adapter = make_adapter(tmp_path / "adapter", base, Recipe({"use_rslora": True}, size=LARGE))
    export(base, adapter, tmp_path / "merged")
    lora = load_file(adapter / "adapter_model.safetensors")
    before, after = (load_file(d / "model.safetensors") for d in (base, tmp_path / "merged"))
    module = "model.layers.0.self_attn.o_proj"
    a, b = (lora[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")

    exact = nf4_rounded(before[f"{module}.weight"]).double() + 16 / 8**0.5 * b @ a
    error = (after[f"{module}.weight"].double() - exact).abs()
    assert bool((error <= exact.abs() * 2**-8 * 1.0001 + 1e-7).all())


def test_several_adapters_add_up(bases: Callable[[str], Path], tokens: torch.Tensor, tmp_path: Path) -> None:
    base = bases("llama")
    first = make_adapter(tmp_path / "first", base, Recipe({"r": 4}, size=LARGE))
    second = make_adapter(
        tmp_path / "second", base, Recipe({"target_modules": ["q_proj", "up_proj"]}, size=LARGE, seed=2)
    )
    adapters = (WeightedAdapter.parse(f"{first}=0.7"), WeightedAdapter.parse(f"{second}=-0.3"))
    options = ExportOptions(base, adapters, tmp_path / "merged", verify=UNVERIFIED)
    run_export(plan_export(options))

    served = served_model(base, (first, second))
    for name, weight in (("a0", 0.7), ("a1", -0.3)):
        for module in served.modules():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= weight
    served.base_model.set_adapter(["a0", "a1"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert kl(logits_of(model, tokens), logits_of(served, tokens)) <= 1e-6


def test_the_proof_agrees_with_transformers(
    bases: Callable[[str], Path], adapter: Path, tmp_path: Path
) -> None:
    """The streamed comparison and two whole models in memory give the same figures."""
    base = bases("llama")
    text = "The tide tables hang by the door. " * 8
    verify = VerifyOptions(prompts=1, texts=(text,), tokens=200, compare=True)
    proof = export(base, adapter, tmp_path / "merged", verify=verify).proof
    tokens = torch.tensor(
        [transformers.AutoTokenizer.from_pretrained(base).encode(text)[:200]], dtype=torch.long
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    )
    exported = logits_of(model, tokens)
    served = logits_of(served_model(base, (adapter,)), tokens)
    loss = -served[:-1].gather(-1, tokens[0, 1:, None]).mean()

    assert proof.export.positions == 200
    assert proof.export.kl == pytest.approx(kl(exported, served), rel=0.02)
    assert proof.export.served_loss == pytest.approx(float(loss), rel=1e-4)
    assert proof.other.kl > 100 * proof.export.kl
    assert proof.failures == ()


def test_sharded_bases_and_exports(bases: Callable[[str], Path], adapter: Path, tmp_path: Path) -> None:
    from .conftest import make_base

    sharded = make_base(tmp_path / "base", "llama", shard="60KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    one = export(bases("llama"), adapter, tmp_path / "one")
    many = export(sharded, adapter, tmp_path / "many", shard_bytes=50_000)

    index = json.loads((many.out / "model.safetensors.index.json").read_text())
    files = sorted(many.out.glob("model-*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [path.name for path in files]
    whole = load_file(one.out / "model.safetensors")
    parts: dict[str, torch.Tensor] = {}
    for path in files:
        parts |= load_file(path)
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    transformers.AutoModelForCausalLM.from_pretrained(many.out)
