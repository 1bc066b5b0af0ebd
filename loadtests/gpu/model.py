"""Bases of 7B and 8B geometry with random weights, made on the device: speed needs the shapes, not the knowledge.

The engine gets what `load_base` would give it, NF4 with double quantization included. `dense_twin` is the same function as
a plain transformers model in fp32, with at most one adapter merged: what answers are held against.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel

from loramux_adapters.grouping import derive_kernels, shared_inputs
from loramux_adapters.kernels import ResidentLinear
from loramux_adapters.nf4 import NF4Linear, NF4Weight
from loramux_adapters.nf4_rows import choose_few_rows
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.weights import LoraWeights
from loramux_server.base.loading import ResidentBase

_HEAD_SPREAD = 3.0  # of the logits: near-ties by rounding stay small beside it

GEOMETRIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-3-8b": lambda: LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
    "llama-2-7b": lambda: LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
    "mistral-7b": lambda: MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=32768,
        sliding_window=None,
    ),
}


def geometry(name: str, *, tiny: bool = False, layers: int | None = None) -> PretrainedConfig:
    """The named shape; `tiny` keeps its kind and shrinks every dimension, `layers` keeps all but the depth."""
    config = GEOMETRIES[name]()
    if tiny:
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        for key, value in (small | heads | {"max_position_embeddings": 512}).items():
            setattr(config, key, value)
    if layers is not None:
        config.num_hidden_layers = layers
    return config


def _empty(config: PretrainedConfig) -> PreTrainedModel:
    """The module tree, its parameters on the meta device, its buffers (rotary frequencies) real."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.eval()
    return model


def _put(model: nn.Module, name: str, part: nn.Module | nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, part)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@torch.no_grad()
def random_base(
    name: str, config: PretrainedConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> ResidentBase:
    """Every linear as large in its output as in its input, so that no layer drowns another."""
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype) * scale

    model = _empty(config)
    head = model.get_output_embeddings()
    shapes: dict[str, tuple[int, int]] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            shapes[path] = (module.out_features, module.in_features)
            dense = drawn(*shapes[path], scale=module.in_features**-0.5)
            _put(model, path, NF4Linear(NF4Weight.quantize(dense), None, dtype))
    for path, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        if parameter.ndim == 1:
            values = torch.ones(parameter.shape, device=device, dtype=dtype)
        else:
            spread = _HEAD_SPREAD if parameter is head.weight else 1.0
            values = drawn(*parameter.shape, scale=spread * parameter.shape[-1] ** -0.5)
        _put(model, path, _frozen(values))
    nn.Module.to(model, device)  # buffers
    model.set_output_embeddings(ResidentLinear(model.get_output_embeddings()))
    groups = shared_inputs(model, list(shapes))
    if device.type == "cpu":
        derive_kernels(model, groups)
    else:
        choose_few_rows(model, dtype)
    return ResidentBase(
        model=model,
        geometry=BaseGeometry(name=name, identity="0" * 64, linear_shapes=shapes),
        device=device,
        dtype=dtype,
        quantization="nf4",
        max_position=config.max_position_embeddings,
        eos_token_ids=(),
        weight_bytes=linear_bytes(model) + rest_bytes(model),
        input_groups=groups,
    )


def linear_bytes(model: nn.Module) -> int:
    """Of the NF4 weights, codes and scales."""
    return sum(one.quantized.num_bytes for one in model.modules() if isinstance(one, NF4Linear))


def rest_bytes(model: nn.Module) -> int:
    """Of embedding, head and norms."""
    packed = {id(one.weight) for one in model.modules() if isinstance(one, NF4Linear)}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in packed)


@torch.no_grad()
def dense_twin(base: ResidentBase, adapter: LoraWeights | None) -> PreTrainedModel:
    """fp32, on the base's device, transformers' own attention, the adapter merged."""
    model = _empty(base.config)
    linears = {
        name.removesuffix(".base_layer"): module
        for name, module in base.model.named_modules()
        if isinstance(module, NF4Linear)
    }
    for path, _ in list(model.named_parameters()):
        module_name = path.rpartition(".")[0]
        if module_name in linears:
            weight = linears[module_name].dequantize(torch.float32)
            if adapter is not None and module_name in adapter.tensors:
                a, b = (factor.to(base.device, torch.float32) for factor in adapter.tensors[module_name])
                weight += adapter.spec.scaling(module_name) * (b @ a)
        else:
            weight = base.model.get_parameter(path).float()
        _put(model, path, _frozen(weight))
    nn.Module.to(model, base.device)
    return model
