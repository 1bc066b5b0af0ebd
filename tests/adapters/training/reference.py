"""The same training by Hugging Face and PEFT: a plain model of the dequantized weights, a plain backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from loramux_adapters.nf4 import NF4Linear
from loramux_adapters.training.lora import TrainedAdapter
from loramux_adapters.training.samples import Sample
from loramux_server.base.loading import ResidentBase


class SameDropout(nn.Module):
    """PEFT's dropout layer, drawing the masks that our trainer draws at this moment."""

    def __init__(self, adapter: TrainedAdapter, name: str) -> None:
        super().__init__()
        self._adapter, self._name = adapter, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._adapter.dropout(x, self._name)


def dense_model(directory: Path, base: ResidentBase) -> Any:
    """transformers' model with the values that the base computes with."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=base.dtype, attn_implementation="eager")
    for name, module in base.model.named_modules():
        if isinstance(module, NF4Linear):
            model.get_submodule(name).weight.data = module.dequantize()
    return model.requires_grad_(False)


def peft_model(directory: Path, base: ResidentBase, adapter: TrainedAdapter) -> Any:
    """PEFT over it, from the adapter's present values; gradients of its fp32 factors."""
    spec = adapter.spec
    config = LoraConfig(
        r=spec.r,
        lora_alpha=int(spec.lora_alpha),
        target_modules=list(spec.target_modules),
        use_rslora=spec.use_rslora,
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(dense_model(directory, base), config, autocast_adapter_dtype=True)
    for name, layer in adapter.layers.items():
        theirs = model.base_model.model.get_submodule(name)
        theirs.lora_A["default"].weight.data = layer.lora_a.detach().clone()
        theirs.lora_B["default"].weight.data = layer.lora_b.detach().clone()
        theirs.lora_dropout["default"] = SameDropout(adapter, name)
    return model.eval()


def factors(model: Any, adapter: TrainedAdapter) -> dict[str, nn.Parameter]:
    """PEFT's parameters under our names."""
    found = {}
    for name in sorted(adapter.layers):
        theirs = model.base_model.model.get_submodule(name)
        found[f"{name}.lora_a"] = theirs.lora_A["default"].weight
        found[f"{name}.lora_b"] = theirs.lora_B["default"].weight
    return found


def row_loss(model: Any, sample: Sample) -> torch.Tensor:
    """Summed cross-entropy of one sample alone, in fp32."""
    ids = torch.tensor(sample.ids).long()
    mask = torch.tensor(list(sample.mask), dtype=torch.bool)[1:]
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits[mask].float(), ids[1:][mask], reduction="sum")


def packed_loss(model: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """The same over samples in one row, told apart by their positions, as transformers does it."""
    ids = torch.cat([torch.tensor(sample.ids) for sample in samples]).long()
    positions = torch.cat([torch.arange(len(sample)) for sample in samples])
    mask = torch.tensor(list(b"".join(sample.mask for sample in samples)), dtype=torch.bool)[1:]
    logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits[mask].float(), ids[1:][mask], reduction="sum")
