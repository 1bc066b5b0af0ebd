"""fp16, fp32 and NF4 exports, NF4 bases, and the quantization identity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from loramux_adapters.errors import ExportError
from loramux_adapters.export import (
    Device,
    ExportOptions,
    Format,
    Onto,
    Quantization,
    VerifyOptions,
    WeightedAdapter,
    plan_export,
    quantized,
    run_export,
)
from loramux_adapters.export.identity import combined_identity
from loramux_adapters.nf4 import NF4Weight, base_identity

from .conftest import Recipe, make_adapter, make_base


def run(base: Path, adapter: Path, out: Path, **options: Any) -> Any:
    return run_export(plan_export(ExportOptions(base, (WeightedAdapter(adapter),), out, **options)))


def linears(base: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(base / "model.safetensors")
    return {
        name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if "_proj.weight" in name
    }


def identity_of(base: Path) -> str:
    return base_identity((name, NF4Weight.quantize(weight)) for name, weight in linears(base).items())


def test_fp32_is_closer_than_fp16_is_closer_than_bf16(
    bases: Callable[[str], Path], adapter: Path, tmp_path: Path
) -> None:
    kls = []
    for format in (Format.BF16, Format.FP16, Format.FP32):
        result = run(bases("llama"), adapter, tmp_path / format, format=format)
        kls.append(result.proof.export.kl)
        config = json.loads((result.out / "config.json").read_text())
        assert config["torch_dtype"] == config["dtype"] == str(plan_dtype(format)).removeprefix("torch.")
        tensors = load_file(result.out / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {plan_dtype(format)}
    assert kls[2] < 1e-10 < kls[1] < kls[0] / 10


def plan_dtype(format: Format) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[format]


def test_an_fp32_base_is_taken_to_be_served_in_fp32(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", dtype=torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base, Recipe())
    result = run(base, adapter, tmp_path / "fp32", format=Format.FP32)
    assert result.report["export"]["served_dtype"] == "float32"
    assert result.proof.export.kl < 1e-10
    rounded = run(base, adapter, tmp_path / "bf16")
    assert rounded.report["delta"]["tensors"] == {"cast": 6, "merged": 14}
    assert rounded.proof.failures == ()


def test_values_beyond_fp16_are_refused(base_copy: Path, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(base_copy / "model.safetensors")
    tensors["model.norm.weight"][0] = 70000.0
    save_file(tensors, base_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="model.norm.weight would hold values that are NaN or infinite"):
        run(base_copy, adapter, tmp_path / "merged", format=Format.FP16)


def test_onto_original_adds_to_the_checkpoint(
    bases: Callable[[str], Path], adapter: Path, tmp_path: Path
) -> None:
    base = bases("llama")
    result = run(base, adapter, tmp_path / "merged", onto=Onto.ORIGINAL)
    lora = load_file(adapter / "adapter_model.safetensors")
    before, after = (load_file(d / "model.safetensors") for d in (base, result.out))
    for module, weight in linears(base).items():
        a, b = (lora[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        expected = (weight.float() + 2 * b @ a).bfloat16()
        assert (after[f"{module}.weight"] != expected).double().mean() < 1e-3  # another order of products
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert not result.proof.required
    assert result.proof.failures == ()
    assert result.proof.export.kl > 1e-5


def test_nf4_loads_and_keeps_untargeted_codes(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("qwen2")
    adapter = make_adapter(tmp_path / "adapter", base, Recipe({"target_modules": ["q_proj"]}, size=0.1))
    result = run(base, adapter, tmp_path / "merged", format=Format.NF4)
    model = transformers.AutoModelForCausalLM.from_pretrained(result.out)

    assert result.report["delta"]["survival_min"] < 0.999  # what re-quantizing cost is said
    assert not result.proof.required
    for module, weight in linears(base).items():
        loaded = model.get_submodule(module)
        expected = NF4Weight.quantize(weight)
        if module.endswith("q_proj"):
            assert not torch.equal(loaded.weight.data, expected.packed)
        else:
            assert torch.equal(loaded.weight.data, expected.packed)
            assert torch.equal(loaded.weight.quant_state.absmax, expected.state.absmax)
            assert loaded.weight.quant_state.offset == expected.state.offset
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def nf4_base(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mistral as transformers and bitsandbytes save it."""
    directory = tmp_path_factory.mktemp("nf4")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        bases("mistral"), quantization_config=quantization
    )
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(bases("mistral")).save_pretrained(directory)
    return directory


def test_a_prequantized_base_gives_the_same_bytes(
    bases: Callable[[str], Path], nf4_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases("mistral"), Recipe({"target_modules": ["k_proj"]}))
    plain = run(bases("mistral"), adapter, tmp_path / "plain")
    packed = run(nf4_base, adapter, tmp_path / "packed")
    one, other = (load_file(result.out / "model.safetensors") for result in (plain, packed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "quantization_config" not in json.loads((packed.out / "config.json").read_text())
    identities = {result.report["base"]["quantization_identity"] for result in (plain, packed)}
    assert identities == {identity_of(bases("mistral"))}


def test_a_prequantized_base_exported_as_nf4_again(nf4_base: Path, bases: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases("mistral"), Recipe({"target_modules": ["k_proj"]}))
    result = run(nf4_base, adapter, tmp_path / "merged", format=Format.NF4)
    before, after = (load_file(d / "model.safetensors") for d in (nf4_base, result.out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "k_proj" not in name:
            assert torch.equal(after[name], tensor), name
    transformers.AutoModelForCausalLM.from_pretrained(result.out)


def test_the_codes_are_those_transformers_loads(bases: Callable[[str], Path], nf4_base: Path) -> None:
    stored = load_file(nf4_base / "model.safetensors")
    for module, weight in linears(bases("mistral")).items():
        assert torch.equal(stored[f"{module}.weight"], quantized.quantize(weight).packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantizing_in_pieces_gives_the_same_codes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(quantized, "PIECE", 4096)
    weight = (torch.randn(193, 192, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    assert quantized.quantize(weight).digest() == NF4Weight.quantize(weight).digest()


def test_identity_is_that_of_the_server(bases: Callable[[str], Path], stamp: Any, tmp_path: Path) -> None:
    expected = identity_of(bases("llama"))
    digests = [(name, NF4Weight.quantize(w).digest().hex()) for name, w in linears(bases("llama")).items()]
    assert combined_identity(digests) == expected
    verify = VerifyOptions(prompts=0)
    result = run(bases("llama"), stamp(expected), tmp_path / "merged", verify=verify)
    assert result.report["base"]["quantization_identity"] == expected


def test_an_adapter_of_another_base_is_refused(
    bases: Callable[[str], Path], stamp: Any, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="trained on another base") as caught:
        run(bases("llama"), stamp("0" * 64), tmp_path / "merged", verify=VerifyOptions(prompts=0))
    assert caught.value.code == "base_mismatch"
    assert list(tmp_path.glob("merged*")) == []


def test_a_base_that_was_served_without_quantization(
    bases: Callable[[str], Path], adapter: Path, tmp_path: Path
) -> None:
    """Untargeted linears are the checkpoint's own, and the sum is compared with the unquantized function."""
    base = bases("llama")
    some = make_adapter(tmp_path / "some", base, Recipe({"target_modules": ["q_proj"]}, size=0.1))
    held = base_identity((name, weight) for name, weight in linears(base).items())
    result = run(base, some, tmp_path / "merged", quantization=Quantization.NONE, base_identity=held)
    before, after = (load_file(d / "model.safetensors") for d in (base, result.out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in linears(base) if name.endswith("q_proj")}
    assert result.proof.required
    assert result.proof.export.kl <= 1e-5
    assert result.report["export"]["quantization"] == "none"
    quantized = run(base, some, tmp_path / "other", onto=Onto.DEQUANTIZED)
    assert quantized.report["base"]["quantization_identity"] != held


def test_a_prequantized_base_was_not_served_without_quantization(
    nf4_base: Path, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases("mistral"), Recipe({"target_modules": ["k_proj"]}))
    with pytest.raises(ExportError, match="--quantization none: this base is stored as NF4"):
        run(nf4_base, adapter, tmp_path / "merged", quantization=Quantization.NONE)


def test_what_was_compared_on_is_in_the_report(
    bases: Callable[[str], Path], adapter: Path, tmp_path: Path
) -> None:
    hashes = set()
    for number, text in enumerate(("The gulls knew first.", "They left at noon.", "The gulls knew first.")):
        verify = VerifyOptions(prompts=1, texts=(text,))
        result = run(bases("llama"), adapter, tmp_path / str(number), verify=verify)
        hashes.add(result.report["verification"]["tokens_sha256"])
    assert len(hashes) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_base_that_was_served_on_a_gpu(bases: Callable[[str], Path], adapter: Path, tmp_path: Path) -> None:
    base = bases("llama")
    held = base_identity((name, NF4Weight.quantize(weight.cuda())) for name, weight in linears(base).items())
    result = run(base, adapter, tmp_path / "merged", device=Device.CUDA, base_identity=held)
    assert result.report["base"]["quantization_identity"] == held
    assert result.proof.failures == ()
