"""Checkpoints of every kind to one resident base, and one sentence for each that cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from loramux_adapters.errors import BaseModelError
from loramux_adapters.kernels import ResidentLinear
from loramux_adapters.nf4 import NF4Linear, NF4Weight
from loramux_server.base.device import pick_device, pick_dtype
from loramux_server.base.loading import LoadOptions, ResidentBase, load_base
from loramux_server.base.location import check_location

LINEARS = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{n}_proj" for n in "koqv")]

ModelFactory = Callable[[str], Path]


def load(directory: Path | str, **options: Any) -> ResidentBase:
    chosen = {"device": "cpu", "dtype": "float32", **options}
    return load_base(LoadOptions(model=str(directory), name="tiny", **chosen))


def refusal(directory: Path | str, **options: Any) -> BaseModelError:
    """The error, which must be one line."""
    with pytest.raises(BaseModelError) as caught:
        load(directory, **options)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture(scope="module")
def sixteen_bit(tiny_model: ModelFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama as it would be published, in bf16."""
    directory = tmp_path_factory.mktemp("bf16")
    AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture
def altered(sixteen_bit: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sixteen_bit, tmp_path / "model"))


def quantized_by_transformers(source: Path, directory: Path, **config: Any) -> Path:
    settings = BitsAndBytesConfig(**config)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, device_map={"": "cpu"}, dtype="auto"
    )
    model.save_pretrained(directory)
    return directory


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# --- what is resident --------------------------------------------------------------------------------------------------


def test_every_linear_but_the_head_is_nf4(sixteen_bit: Path) -> None:
    base = load(sixteen_bit, dtype="bfloat16")
    assert (base.quantization, base.dtype, base.device.type) == ("nf4", torch.bfloat16, "cpu")
    assert sorted(base.geometry.linear_shapes) == [
        f"model.layers.{i}.{name}" for i in range(3) for name in LINEARS
    ]
    assert base.geometry.linear_shapes["model.layers.0.mlp.down_proj"] == (64, 128)
    original = load_file(sixteen_bit / "model.safetensors")
    for name in base.geometry.linear_shapes:
        layer = base.model.get_submodule(name)
        assert isinstance(layer, NF4Linear)
        assert layer.quantized.digest() == NF4Weight.quantize(original[f"{name}.weight"]).digest()
    assert isinstance(base.model.get_output_embeddings(), ResidentLinear)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16, torch.uint8}
    assert (base.max_position, base.eos_token_ids) == (512, (2,))


def test_it_computes_what_transformers_computes_on_the_dequantized_weights(sixteen_bit: Path) -> None:
    base = load(sixteen_bit)
    reference = AutoModelForCausalLM.from_pretrained(sixteen_bit, dtype=torch.float32)
    with torch.no_grad():
        for name in base.geometry.linear_shapes:
            weight = reference.get_submodule(name).weight
            weight.copy_(NF4Weight.quantize(weight).dequantize(torch.float32))
        ids = torch.arange(5, 40)[None]
        ours = base.model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(
            ours, reference(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4
        )


def test_the_identity_is_the_weights_and_not_how_they_are_computed_or_stored(
    tiny_model: ModelFactory, sixteen_bit: Path, tmp_path: Path
) -> None:
    """bf16 and fp32 files of the same values, bf16 and fp32 arithmetic, quantized here or by transformers: one base."""
    AutoModelForCausalLM.from_pretrained(sixteen_bit, dtype=torch.float32).save_pretrained(tmp_path / "fp32")
    ready = quantized_by_transformers(
        sixteen_bit,
        tmp_path / "nf4",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )
    bases = [
        load(sixteen_bit),
        load(sixteen_bit, dtype="bfloat16"),
        load(tmp_path / "fp32"),
        load(ready),
        load(ready, dtype="bfloat16"),
    ]
    assert len({base.geometry.identity for base in bases}) == 1
    assert all(base.quantization == "nf4" for base in bases)
    assert (
        load(tiny_model("llama")).geometry.identity != bases[0].geometry.identity
    )  # not rounded to bf16 first
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(bases[0].model(input_ids=ids).logits, bases[3].model(input_ids=ids).logits)


def test_without_quantization_the_linears_stay_as_they_are(sixteen_bit: Path) -> None:
    base = load(sixteen_bit, quantization="none")
    assert base.quantization == "none"
    layer = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, ResidentLinear)
    original = load_file(sixteen_bit / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(layer.weight, original.float())
    assert base.geometry.identity != load(sixteen_bit).geometry.identity
    assert base.weight_bytes > 2 * load(sixteen_bit).weight_bytes


def test_tied_embeddings_stay_one_tensor(tiny_model: ModelFactory) -> None:
    base = load(tiny_model("gemma3"), dtype="bfloat16")
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight


def test_biases_are_kept(tiny_model: ModelFactory) -> None:
    base = load(tiny_model("qwen2"))
    q = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(q, nn.Linear)
    original = load_file(tiny_model("qwen2") / "model.safetensors")["model.layers.0.self_attn.q_proj.bias"]
    assert torch.equal(q.bias, original)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, 512),
        (
            {
                "rope_type": "dynamic",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            128,
        ),
        ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, 512),
    ],
)
def test_positions_that_would_depend_on_the_batch_are_not_offered(
    altered: Path, rope: dict[str, Any], positions: int
) -> None:
    change_config(altered, rope_parameters=rope)
    assert load(altered).max_position == positions


def test_several_end_tokens(altered: Path) -> None:
    path = altered / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 7]}))
    assert load(altered).eos_token_ids == (2, 7)


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["/no/such/model", "./model", "../up/model", "models/llama/"])
def test_a_missing_directory_is_said_to_be_missing(model: str) -> None:
    assert str(refusal(model)) == f"{model} does not exist"


@pytest.mark.parametrize("model", ["gpt2", "meta-llama/Llama-3.2-1B"])
def test_what_may_be_a_hub_id_is_left_to_the_hub(model: str) -> None:
    check_location(model)


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    assert str(refusal(tmp_path)).endswith("holds no config.json: it is not a model directory")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert str(refusal(tmp_path / "model.gguf")).endswith("is a file; name the model's directory")


def test_a_directory_without_weights(altered: Path) -> None:
    (altered / "model.safetensors").unlink()
    error = refusal(altered)
    assert str(error).startswith(f"cannot load the weights of '{altered}': ")
    assert "model.safetensors" in str(error)


def test_pickles_are_not_read(altered: Path) -> None:
    torch.save(load_file(altered / "model.safetensors"), altered / "pytorch_model.bin")
    (altered / "model.safetensors").unlink()
    assert "model.safetensors" in str(refusal(altered))


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_other_models_than_decoders_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    model: Any = (
        BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        )
        if kind == "bert"
        else T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    )
    model.save_pretrained(tmp_path)
    error = refusal(tmp_path)
    assert f"is not a decoder language model (architecture: {type(model).__name__})" in str(error)
    assert error.param == "model"


def test_a_config_nobody_knows(altered: Path) -> None:
    change_config(altered, model_type="zzz")
    assert "`zzz`" in str(refusal(altered))
    (altered / "config.json").write_text("{")
    assert "not a valid JSON file" in str(refusal(altered))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_attention_heads": 0}, "does not fit together (integer modulo by zero)"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"num_key_value_heads": 0}, "does not fit together"),
        ({"head_dim": 0}, "does not fit together"),
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
        ({"vocab_size": None}, "Field 'vocab_size' expected int, got NoneType"),
        ({"dtype": 3}, "does not fit together"),
        ({"layer_types": 1}, "does not fit together ('int' object is not iterable)"),
        ({"architectures": 3}, "does not fit together"),
        ({"architectures": [3]}, "is not a decoder language model (architecture: 3)"),
        ({"quantization_config": "nf4"}, "does not fit together"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_values_that_no_model_can_have(fields: dict[str, Any], said: str, altered: Path) -> None:
    change_config(altered, **fields)
    error = refusal(altered)
    assert said in str(error)
    assert error.param == "model"


def test_code_in_the_checkpoint_is_never_run(altered: Path) -> None:
    (altered / "modeling.py").write_text(f"open({str(altered / 'run')!r}, 'w')\n")
    change_config(
        altered, model_type="zzz", auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}
    )
    assert "custom code" in str(refusal(altered))
    assert not (altered / "run").exists()


def test_half_a_download(altered: Path) -> None:
    path = altered / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(refusal(altered)).startswith(f"cannot load the weights of '{altered}': ")


def test_missing_weights_are_not_invented(altered: Path) -> None:
    change_tensors(altered, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lacks 1 weights its config asks for, first model.layers.1.mlp.up_proj.weight" in str(
        refusal(altered)
    )


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_weights_of_another_shape_than_the_config_says(altered: Path, quantization: str) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    change_tensors(altered, lambda tensors: tensors.update({name: tensors[name][:32].contiguous()}))
    error = refusal(altered, quantization=quantization)
    if quantization == "nf4":
        assert "q_proj is [32, 64] in the checkpoint, but [64, 64] by its config" in str(error)


def test_fp4_is_refused_by_name(sixteen_bit: Path, tmp_path: Path) -> None:
    quantized_by_transformers(sixteen_bit, tmp_path, load_in_4bit=True, bnb_4bit_quant_type="fp4")
    error = refusal(tmp_path)
    assert "is quantized as fp4; only nf4 is supported" in str(error)
    assert error.param == "quantization_config.bnb_4bit_quant_type"


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes int8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({}, "an unknown method"),
    ],
)
def test_other_quantizations_are_refused_by_name(altered: Path, config: dict[str, Any], method: str) -> None:
    change_config(altered, quantization_config={"somehow": True} | config)
    error = refusal(altered)
    assert f"is quantized with {method}; use the 16-bit checkpoint" in str(error)
    assert error.param == "quantization_config"


def test_a_quantized_checkpoint_is_not_served_unquantized(altered: Path) -> None:
    change_config(
        altered,
        quantization_config={
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
        },
    )
    assert "--quantization none needs the 16-bit checkpoint" in str(refusal(altered, quantization="none"))


def test_a_model_with_nothing_to_adapt(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=0, vocab_size=64))
    model.save_pretrained(tmp_path)
    assert "no linear layers an adapter could target" in str(refusal(tmp_path))


# --- where and in which type -------------------------------------------------------------------------------------------


def test_types() -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu) in (torch.bfloat16, torch.float32)
    assert pick_dtype("fp32", cpu) is pick_dtype("float", cpu) is pick_dtype("float32", cpu) is torch.float32
    assert pick_dtype("bf16", cpu) is torch.bfloat16
    assert pick_dtype("half", torch.device("cuda")) is torch.float16
    for name, sentence in (
        ("int8", "--dtype int8: choose auto"),
        ("float16", "--dtype float16: not supported on the CPU"),
    ):
        with pytest.raises(BaseModelError, match=sentence) as caught:
            pick_dtype(name, cpu)
        assert caught.value.param == "dtype"


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_what_the_cpu_computes_in(
    supported: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert pick_dtype("auto", torch.device("cpu")) is dtype
    assert pick_dtype("auto", torch.device("cpu"), "vectors") is torch.bfloat16
    assert pick_dtype("fp32", torch.device("cpu"), "vectors") is torch.float32


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(BaseModelError, match="torch sees no CUDA device"):
        pick_device("cuda")
    with pytest.raises(BaseModelError, match="--device tpu: choose auto, cpu or cuda"):
        pick_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda", 1)
