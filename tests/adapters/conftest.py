"""A base small enough to write down, and adapters for it. Nothing here needs a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.spec import AdapterSpec, BaseGeometry
from loramux_adapters.weights import LoraWeights

LINEARS = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (8, 16), "mlp.down_proj": (16, 24)}


@dataclass
class AdapterFiles:
    """An adapter as PEFT writes it, to be altered by a test before it goes to disk."""

    config: dict[str, object]
    tensors: dict[str, torch.Tensor]
    raw: dict[str, bytes | None] = field(default_factory=dict)  # file name -> bytes instead, None: no file

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        files = {CONFIG_FILE: json.dumps(self.config).encode(), WEIGHTS_FILE: save(self.tensors)} | self.raw
        for name, data in files.items():
            if data is not None:
                (directory / name).write_bytes(data)
        return directory


@pytest.fixture(scope="session")
def tiny_geometry() -> BaseGeometry:
    """Two layers of three linears."""
    shapes = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LINEARS.items()}
    return BaseGeometry(name="org/tiny", identity="nf4:1234", linear_shapes=shapes)


@pytest.fixture(scope="session")
def make_lora_weights(tiny_geometry: BaseGeometry) -> Callable[..., LoraWeights]:
    """Random weights for the tiny base; another seed is another generation."""

    def make(seed: int = 0, *, dtype: torch.dtype = torch.float32, **fields: object) -> LoraWeights:
        spec = AdapterSpec(**{"r": 4, "lora_alpha": 8.0, "target_modules": ("q_proj", "v_proj")} | fields)
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for module in spec.targets(tiny_geometry):
            (out_features, in_features), rank = tiny_geometry.linear_shapes[module], spec.rank(module)
            a = torch.randn(rank, in_features, generator=generator).to(dtype)
            b = torch.randn(out_features, rank, generator=generator).to(dtype)
            tensors[module] = (a, b)
        return LoraWeights(spec, tensors)

    return make


@pytest.fixture
def adapter_files(make_lora_weights: Callable[..., LoraWeights]) -> AdapterFiles:
    """A valid adapter for the tiny base, as an uploader would hold it."""
    weights = make_lora_weights()
    tensors = {
        f"base_model.model.{module}.{kind}.weight": tensor
        for module, pair in weights.tensors.items()
        for kind, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    config = weights.spec.to_config() | {"base_model_name_or_path": "org/tiny"}
    return AdapterFiles(config, tensors)
