"""The same adapter as PEFT computes it: which modules, which rank and which scaling are PEFT's decision here.

PEFT's `inject_adapter_in_model` puts its own layers over the resident NF4 linears of a twin; LoRA weights are fp32, as
PEFT itself loads them. The config is the rebuilt one: nothing an uploader wrote besides it reaches PEFT.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from loramux_adapters.bank import HostCopy
from loramux_adapters.verify.served import run
from loramux_adapters.weights import LoraWeights

_NAME = "default"
_INPUTS = 16  # rows of the fixed input on which a module's update is compared
_SMALLEST = 1e-30  # instead of an update of zero


class PeftDiffers(Exception):
    """PEFT reads the config differently. Never leaves this package: it becomes a verdict."""


class PeftAdapter:
    """A twin with PEFT's layers in it."""

    def __init__(self, twin: PreTrainedModel, weights: LoraWeights) -> None:
        """Rebuilds `twin`. Raises PeftDiffers if PEFT targets other modules or gives them other shapes."""
        # Importing PEFT takes seconds, which a server without uploads need not spend.
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        spec = replace(weights.spec, base_identity=None, base_model_name_or_path=None)
        fields: dict[str, Any] = spec.to_config()
        del fields["peft_type"]  # which the class says itself
        config = LoraConfig(**fields)
        try:
            # On the meta device nothing is initialized, so the process's random numbers stay as they are.
            inject_adapter_in_model(config, twin, _NAME, low_cpu_mem_usage=True)
        except ValueError as error:
            raise PeftDiffers(f"PEFT does not take this config: {error}") from error
        self.model = twin.eval()
        self.layers: dict[str, Any] = {
            name: module for name, module in twin.named_modules() if isinstance(module, LoraLayer)
        }
        for name in sorted(self.layers.keys() ^ weights.tensors.keys()):
            who, other = ("PEFT", "loramux") if name in self.layers else ("loramux", "PEFT")
            raise PeftDiffers(f"{who} targets {name} and {other} does not")
        for name, pair in weights.tensors.items():
            self._fill(name, *pair)

    def _fill(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        for linears, tensor in ((self.layers[name].lora_A, a), (self.layers[name].lora_B, b)):
            expected = tuple(linears[_NAME].weight.shape)
            if expected != tuple(tensor.shape):
                raise PeftDiffers(f"PEFT gives {name} the shape {expected}, loramux {tuple(tensor.shape)}")
            values = tensor.to(self.model.device, torch.float32)
            linears[_NAME].weight = nn.Parameter(values, requires_grad=False)

    def logits(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """`[len(tokens), vocabulary]` in fp32."""
        return run(self.model, tokens)

    @torch.inference_mode()
    def update_error(self, host: HostCopy) -> tuple[float, str]:
        """Relative error of the served factors' product on fixed inputs, in the worst module, and that module.

        `scaling * B A x` by PEFT's layer in fp32 against the host copy's factors (scaling folded in, compute dtype).
        """
        generator = torch.Generator().manual_seed(0)
        worst, where = -1.0, ""
        for name, (a, b) in host.factors.items():
            layer = self.layers[name]
            x = torch.randn(_INPUTS, a.shape[1], generator=generator).to(self.model.device)
            theirs = (layer.lora_B[_NAME](layer.lora_A[_NAME](x)) * layer.scaling[_NAME]).double()
            ours = (x @ a.to(x).T @ b.to(x)).double()
            error = float((ours - theirs).norm() / theirs.norm().clamp_min(_SMALLEST))
            if not math.isfinite(error):  # one of them overflows
                error = sys.float_info.max
            if error > worst:
                worst, where = error, name
        return worst, where
