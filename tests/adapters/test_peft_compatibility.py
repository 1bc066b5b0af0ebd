"""Against PEFT itself: what it saves passes the gate, what we write it loads, and both compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.spec import ALL_LINEAR, BaseGeometry
from loramux_adapters.weights import LoraWeights

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TOKENS = torch.tensor([[1, 5, 9, 2, 40]])


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


def geometry_of(model: Any) -> BaseGeometry:
    linears = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    return BaseGeometry("org/tiny-llama", "", linears)


CONFIGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": ALL_LINEAR, "task_type": None},
    "rslora": {"target_modules": ["o_proj", "up_proj"], "use_rslora": True, "lora_dropout": 0.1},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "layers.0.mlp.down_proj"],
        "rank_pattern": {"k_proj": 2, "layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 3, "down_proj": 5},
    },
    "gaussian": {"target_modules": ["gate_proj"], "init_lora_weights": "gaussian"},
}


def save_with_peft(fields: dict[str, Any], directory: Path) -> tuple[Any, torch.Tensor]:
    """A trained-looking adapter saved by PEFT, and the logits it gives there."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | fields)
    model = get_peft_model(tiny_llama(), config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(directory)
    with torch.no_grad():
        return model, model(TOKENS).logits


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_peft_to_us_and_back(fields: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    trained, logits = save_with_peft(fields, tmp_path / "theirs")
    base = tiny_llama()
    geometry = geometry_of(base)
    weights = LoraWeights.read(tmp_path / "theirs", geometry)
    for module, (a, b) in weights.tensors.items():
        layer = trained.get_submodule(f"base_model.model.{module}")
        assert torch.equal(a, layer.lora_A["default"].weight)
        assert torch.equal(b, layer.lora_B["default"].weight)
        assert weights.spec.scaling(module) == layer.scaling["default"]
    weights.write(tmp_path / "ours")
    assert LoraWeights.read(tmp_path / "ours", geometry).generation == weights.generation
    reloaded = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(TOKENS).logits, logits)
        with reloaded.disable_adapter():
            assert not torch.allclose(reloaded(TOKENS).logits, logits)


def test_peft_ignores_the_stamp_with_a_warning(tmp_path: Path) -> None:
    from dataclasses import replace

    from peft import PeftModel

    _, logits = save_with_peft(CONFIGS["attention"], tmp_path / "theirs")
    base = tiny_llama()
    weights = LoraWeights.read(tmp_path / "theirs", geometry_of(base))
    stamped = LoraWeights(replace(weights.spec, base_identity="nf4:1"), weights.tensors)
    stamped.write(tmp_path / "ours")
    with pytest.warns(UserWarning, match="loramux_base_identity"):
        reloaded = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(TOKENS).logits, logits)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"target_modules": r".*\.q_proj"}, "target_modules"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_peft_saves_beyond_plain_lora_is_refused_by_name(
    fields: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    from loramux_adapters.errors import InvalidAdapter

    save_with_peft({"target_modules": ["q_proj"]} | fields, tmp_path)
    with pytest.raises(InvalidAdapter) as caught:
        LoraWeights.read(tmp_path, geometry_of(tiny_llama()))
    assert fault in {error.where for error in caught.value.faults}
