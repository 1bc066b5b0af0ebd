"""What is read from a config alone is what a loaded base, its engine and its trainer turn out to hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loramux_adapters.errors import BaseModelError
from loramux_adapters.kernels import DenseKernel
from loramux_adapters.nf4 import NF4Linear, NF4Weight
from loramux_adapters.planning.model import read_model
from loramux_adapters.planning.serving import ServingOptions, kv_bytes_per_token, serving_memory, slot_rows
from loramux_adapters.planning.training import trainable_parameters
from loramux_adapters.planning.weights import copied_bytes, nf4_bytes, resident_bytes
from loramux_adapters.training.targets import ATTENTION_QV
from loramux_server.base.loading import ResidentBase
from loramux_server.engine.options import WorkerOptions
from loramux_server.engine.runner import kv_bytes_per_token as engine_kv_bytes_per_token
from loramux_server.engine.sizing import plan_sizes
from tests.adapters.training.support import load_tiny, make_trainer, random_samples
from tests.conftest import TINY_CONFIGS

MODELS = Path(__file__).parent / "models"


def config_only(source: Path, target: Path) -> Path:
    """A directory that holds a model's config and nothing else."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


@pytest.mark.parametrize("architecture", TINY_CONFIGS)
def test_the_plan_of_a_config_is_the_loaded_base(
    architecture: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    planned = read_model(str(config_only(tiny_model(architecture), tmp_path / "config")), "tiny")
    base = load_tiny(tiny_model(architecture))
    assert planned.linears == base.geometry.linear_shapes
    assert planned.context_length == base.max_position
    assert resident_bytes(planned, 4, "nf4") == base.weight_bytes
    assert kv_bytes_per_token(planned, 4) == engine_kv_bytes_per_token(base)
    kernels = [m.kernel for m in base.model.modules() if isinstance(m, NF4Linear)]
    assert copied_bytes(planned, 4, "cpu", "nf4") == sum(
        kernel.num_bytes for kernel in kernels if isinstance(kernel, DenseKernel)
    )
    assert copied_bytes(planned, 4, "cuda", "nf4") == 0


@pytest.mark.parametrize(("dtype", "item"), [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_weights_in_each_type(
    dtype: str, item: int, quantization: Any, tiny_model: Callable[[str], Path]
) -> None:
    base = load_tiny(tiny_model("qwen2"), dtype, quantization)  # has biases
    planned = read_model(str(tiny_model("qwen2")), "tiny")
    assert resident_bytes(planned, item, quantization) == base.weight_bytes
    assert kv_bytes_per_token(planned, item) == engine_kv_bytes_per_token(base)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (129, 127), (256, 300)])
def test_nf4_bytes_of_a_matrix(shape: tuple[int, int]) -> None:
    assert nf4_bytes(shape) == NF4Weight.quantize(torch.randn(shape)).num_bytes


@pytest.fixture(scope="module")
def trained_bases(tiny_model: Callable[[str], Path]) -> Callable[[str], ResidentBase]:
    made: dict[str, ResidentBase] = {}

    def get(architecture: str) -> ResidentBase:
        return made.setdefault(architecture, load_tiny(tiny_model(architecture)))

    return get


@pytest.mark.parametrize("targets", ["all-linear", "attention", "attention-qv", ["down_proj"]])
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_trainable_parameters_are_the_trainers(
    architecture: str,
    targets: Any,
    tiny_model: Callable[[str], Path],
    trained_bases: Callable[[str], ResidentBase],
) -> None:
    planned = read_model(str(tiny_model(architecture)), "tiny")
    trainer = make_trainer(
        trained_bases(architecture), random_samples(8), r=6, lora_alpha=6, target_modules=targets
    )
    held = sum(parameter.numel() for parameter in trainer.parameters.values())
    assert trainable_parameters(planned, targets, 6) == held


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("loras", "rank"), [(8, 64), (2, 64), (3, 8)])
def test_adapter_slots_are_the_engines(device: Any, loras: int, rank: int) -> None:
    model = read_model(str(MODELS / "mistral-7b"), "mistral")
    base: Any = SimpleNamespace(
        device=torch.device(device), dtype=torch.bfloat16, max_position=4096, geometry=model.geometry()
    )
    options = WorkerOptions(
        address="", parent_pid=0, model="m", name="m", max_loras=loras, max_lora_rank=rank, kv_cache_bytes=10**9
    )  # fmt: skip
    rows = plan_sizes(options, base, kv_bytes_per_token(model, 2)).lora_rows
    serving = ServingOptions(max_loras=loras, max_lora_rank=rank)
    assert slot_rows(serving, device) == rows
    row_bytes = 2 * sum(out + into for out, into in model.linears.values())
    assert serving_memory(model, serving, device, 2).adapter_slots == rows * row_bytes


@pytest.mark.parametrize(
    ("name", "parameters", "nf4", "kv", "query_value_r8"),
    [  # parameters and KV bytes as their model cards and papers give them; PEFT prints 4,194,304 for r 8 on q and v
        ("llama-2-7b", 6_738_415_616, 3.87e9, 512 * 1024, 4_194_304),
        ("mistral-7b", 7_241_732_096, 4.12e9, 128 * 1024, 3_407_872),
    ],
)
def test_models_whose_numbers_are_known(
    name: str, parameters: int, nf4: float, kv: int, query_value_r8: int
) -> None:
    model = read_model(str(MODELS / name), name)
    assert model.parameters == parameters
    assert resident_bytes(model, 2, "nf4") == pytest.approx(nf4, rel=0.002)
    assert kv_bytes_per_token(model, 2) == kv
    assert trainable_parameters(model, ATTENTION_QV, 8) == query_value_r8


def write_config(directory: Path, **fields: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


LLAMA = json.loads((MODELS / "llama-2-7b" / "config.json").read_text())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "not a decoder"),
        ({"model_type": "llama"}, "none named"),
        ({"model_type": "newer-than-us", "architectures": ["NewForCausalLM"]}, "cannot use the config"),
        ({}, "cannot use the config"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized with gptq"),
        (LLAMA | {"num_attention_heads": 0}, "cannot use the config"),
        (LLAMA | {"hidden_size": "wide"}, "cannot use the config"),
        (LLAMA | {"hidden_size": -4096}, "negative dimension"),
        (LLAMA | {"vocab_size": None}, "cannot use the config"),
    ],
)
def test_what_cannot_be_served_is_refused(fields: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=words) as refused:
        read_model(str(write_config(tmp_path / "model", **fields)), "model")
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("source", ["/nowhere", "./nowhere", "a/b/c"])
def test_a_directory_that_is_not_there(source: str) -> None:
    with pytest.raises(BaseModelError, match="does not exist"):
        read_model(source, "model")


def test_a_file_is_not_a_directory() -> None:
    with pytest.raises(BaseModelError, match="is a file"):
        read_model(str(MODELS / "mistral-7b" / "config.json"), "model")


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"holds no config\.json"):
        read_model(str(tmp_path), "model")


def test_a_checkpoint_that_is_nf4_already_plans_as_one_that_will_be(tmp_path: Path) -> None:
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    packed = read_model(str(write_config(tmp_path / "nf4", **LLAMA, quantization_config=quantized)), "model")
    assert packed.linears == read_model(str(MODELS / "llama-2-7b"), "model").linears
