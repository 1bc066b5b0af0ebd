"""What the base is, learned from its config alone: its linears, its parameters, which of them are tied.

The model is built on the meta device, so this costs no weight memory. Which linears are NF4 when served
follows from it as it does in transformers' bitsandbytes integration: every `nn.Linear` but the output head.
Remote code is never executed. Does not read tensors, except to say which of the checkpoint's names it found
no use for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loramux_adapters.errors import BaseModelError
from loramux_adapters.export.checkpoint import FLOATS, TORCH_DTYPES, Checkpoint
from loramux_adapters.export.quantized import is_packed, packed_shape_fits
from loramux_adapters.model_config import faults_said
from loramux_adapters.spec import BaseGeometry

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class BaseSkeleton:
    """The architecture of a base directory."""

    config: Any  # transformers.PreTrainedConfig
    linears: Mapping[str, tuple[int, int]]  # full module name -> (out, in), without the output head
    parameters: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]  # parameter -> the parameter it shares its values with
    dtype: torch.dtype  # in which transformers would load it: what quantization starts from
    prequantized: bool

    def geometry(self, name: str) -> BaseGeometry:
        return BaseGeometry(name=name, identity="", linear_shapes=self.linears)


def read_skeleton(directory: Path, checkpoint: Checkpoint) -> BaseSkeleton:
    """Raises BaseModelError for a config this package cannot build or a quantization it cannot read."""
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        raise BaseModelError(f"{directory} holds no config.json: it is not a model directory", param="model")
    with faults_said("config.json cannot be used"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    prequantized = _is_prequantized(config)
    model = empty_model(config)
    head = model.get_output_embeddings()
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return BaseSkeleton(
        config=config,
        linears=linears,
        parameters={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        tied=dict(getattr(model, "all_tied_weights_keys", None) or {}),
        dtype=_load_dtype(config, checkpoint),
        prequantized=prequantized,
    )


def empty_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The causal LM of `config` with parameters on meta and buffers (rotary frequencies) real; eager
    attention.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = getattr(config, "model_type", "unknown")
    with (
        faults_said(f"'{kind}' is not a decoder this version of transformers can build"),
        init_empty_weights(include_buffers=False),
    ):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=dtype, trust_remote_code=False
        )
    return model.eval()


def unmatched(skeleton: BaseSkeleton, checkpoint: Checkpoint) -> list[str]:
    """Every way in which the checkpoint's tensors are not the ones the architecture calls for."""
    faults: list[str] = []
    for name, shape in skeleton.parameters.items():
        stored = checkpoint.tensors.get(name)
        module = name.removesuffix(".weight")
        if stored is None:
            if skeleton.tied.get(name) not in checkpoint.tensors:
                faults.append(f"{name} is missing")
        elif module in skeleton.linears and is_packed(checkpoint, name):
            if not packed_shape_fits(stored, shape):
                faults.append(f"{name} holds {stored.numel} packed bytes, which do not fit {list(shape)}")
        elif stored.shape != shape:
            faults.append(f"{name} has shape {list(stored.shape)}, the config asks for {list(shape)}")
        elif stored.dtype not in FLOATS:
            faults.append(
                f"{name} has type {stored.dtype}; F16, BF16, F32 and bitsandbytes NF4 can be exported"
            )
    faults += [
        f"{stored.name} has type {stored.dtype}, which cannot be read"
        for stored in checkpoint.tensors.values()
        if stored.name not in skeleton.parameters and stored.dtype not in TORCH_DTYPES
    ]
    return faults


def _is_prequantized(config: Any) -> bool:
    fields = getattr(config, "quantization_config", None)
    if fields is None:
        return False
    fields = fields if isinstance(fields, dict) else fields.to_dict()
    method = str(fields.get("quant_method", "an unknown method")).rsplit(".", 1)[-1].lower()
    kind = fields.get("bnb_4bit_quant_type")
    four_bit = fields.get("load_in_4bit", fields.get("_load_in_4bit"))
    if "bitsandbytes" in method and four_bit and kind == "nf4":
        return True
    described = f"{method} {kind}" if four_bit else method
    raise BaseModelError(
        f"the base is quantized with {described}; export needs the 16-bit checkpoint or bitsandbytes NF4",
        param="model",
    )


def _load_dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """As transformers' dtype="auto": the config's dtype, else that of the first floating tensor."""
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype) and named.is_floating_point:
        return named
    if isinstance(named, str) and named in _DTYPES:
        return _DTYPES[named]
    first = next((t.dtype for t in checkpoint.tensors.values() if t.dtype in FLOATS), "BF16")
    return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[first]
