"""The adapter as the server computes it: the same host copy, device rows and layers, on a twin of the base."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from loramux_adapters.bank import HostCopy
from loramux_adapters.grouping import shared_inputs
from loramux_adapters.layers import install
from loramux_adapters.pool import DevicePool
from loramux_adapters.residency import Slot
from loramux_adapters.weights import LoraWeights


class ServedAdapter:
    """`logits(tokens, adapted)` of the base and of the base with the one adapter."""

    def __init__(self, twin: PreTrainedModel, weights: LoraWeights) -> None:
        """Rebuilds `twin`. Raises AdapterUnavailable if the weights overflow the compute dtype."""
        self.model = twin
        self.host = HostCopy.build(weights, twin.dtype, pin=False)
        names = list(weights.tensors)
        groups = shared_inputs(twin, names)
        layers, batch = install(twin, names)
        self._pool = DevicePool(layers, groups, batch, self.host.rows, twin.dtype, twin.device)
        self._slot = Slot("verified", 0, self.host.rows)
        self._targets = frozenset(names)
        self._pool.fill(self._slot, self.host.factors)

    def logits(self, tokens: tuple[int, ...], *, adapted: bool) -> torch.Tensor:
        """`[len(tokens), vocabulary]` in fp32."""
        slots = [self._slot] if adapted else []
        self._pool.select([self._slot.generation], slots, self._targets)
        return run(self.model, tokens)


@torch.inference_mode()
def run(model: PreTrainedModel, tokens: tuple[int, ...]) -> torch.Tensor:
    """One prompt through transformers' own forward: logits `[len(tokens), vocabulary]` in fp32."""
    output = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    logits: torch.Tensor = output.logits[0]
    return logits.float()
