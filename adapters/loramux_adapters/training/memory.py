"""What training needs beside a resident base, in bytes by kind, from plain numbers alone. No torch at import.

    training_memory(DecoderShape.of(config), shapes_of_the_trained_linears, r=16, tokens=2048, dtype_bytes=2)

Follows what `trainer.py` keeps alive: fp32 factors with their gradients and optimizer state; each layer's input; the
activations of one layer, or the logits of one chunk. Promises figures for decoders of attention and a (gated) MLP;
counts no base, no KV cache and no CUDA context. `check_memory` refuses a run that cannot fit, with the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from loramux_adapters.errors import TrainingError

LOGITS_PER_CHUNK = 2**25  # elements: 128 MiB in fp32
MIB = 2**20

_CGROUP = Path("/sys/fs/cgroup")
_FP32 = 4
# Bytes a parameter of optimizer state on the device. The 8-bit ones keep two bytes and two scales per 256 of them;
# the paged one's are managed memory, which CUDA moves to the host when the device is short of it.
_STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256, "paged_adamw_8bit": 0.0}


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Widths of a decoder layer, and how many there are."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    query_width: int  # attention heads times their size
    kv_width: int  # the same of keys

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """From transformers' text config, whatever the architecture calls its fields."""
        hidden = int(config.hidden_size)
        heads = int(config.num_attention_heads)
        size = int(getattr(config, "head_dim", None) or hidden // heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        return cls(
            hidden=hidden,
            intermediate=max(inner) if isinstance(inner, list | tuple) else int(inner),
            layers=int(config.num_hidden_layers),
            vocabulary=int(config.vocab_size),
            query_width=heads * size,
            kv_width=kv_heads * size,
        )


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes by kind. `total` is less than their sum: a layer's activations and the logits are never alive together."""

    adapter: int  # fp32 factors
    gradients: int
    optimizer: int
    layer_inputs: int
    layer_activations: int  # of one layer, its backward pass included
    logits: int  # of one chunk, the loss and its gradient included

    @property
    def state(self) -> int:
        """What stays from one step to the next."""
        return self.adapter + self.optimizer

    @property
    def total(self) -> int:
        """The peak within a step."""
        return self.state + self.gradients + self.layer_inputs + max(self.layer_activations, self.logits)

    def __str__(self) -> str:
        parts = ", ".join(
            f"{field.name.replace('_', ' ')} {getattr(self, field.name) / MIB:,.0f}" for field in fields(self)
        )
        return f"{self.total / MIB:,.0f} MiB ({parts})"


def adapter_parameters(targets: Iterable[tuple[int, int]], r: int) -> int:
    """Of rank `r` over linears of (out_features, in_features)."""
    return sum(r * (out_features + in_features) for out_features, in_features in targets)


def training_memory(
    shape: DecoderShape,
    targets: Iterable[tuple[int, int]],
    *,
    r: int,
    tokens: int,
    dtype_bytes: int,
    optimizer: str = "adamw",
    dropout: bool = False,
    predicted: int | None = None,
) -> TrainingMemory:
    """`targets` are the (out_features, in_features) of every trained linear of every layer; `tokens` is how many a
    batch holds at most (batch_size times max_seq_length), `predicted` how many of these are trained on (all).
    """
    linears = list(targets)
    parameters = adapter_parameters(linears, r)
    chunk = min(tokens if predicted is None else predicted, max(16, LOGITS_PER_CHUNK // shape.vocabulary))
    return TrainingMemory(
        adapter=parameters * _FP32,
        gradients=parameters * _FP32,
        optimizer=int(parameters * _STATE_BYTES[optimizer]),
        # One more is the last layer's output, and one the gradient that travels back.
        layer_inputs=(shape.layers + 2) * tokens * shape.hidden * dtype_bytes,
        layer_activations=_layer_bytes(shape, linears, r, tokens, dtype_bytes, dropout=dropout),
        # log-softmax, and the gradients before and behind it
        logits=3 * _FP32 * chunk * shape.vocabulary,
    )


def _layer_bytes(
    shape: DecoderShape,
    linears: list[tuple[int, int]],
    r: int,
    tokens: int,
    dtype_bytes: int,
    *,
    dropout: bool,
) -> int:
    """Of one layer that is run with gradients: what autograd keeps, and the widest moment of going back."""
    hidden, inner = shape.hidden, shape.intermediate
    per_token = 3 * shape.query_width + 2 * shape.kv_width  # queries, keys, values, and the answers, twice
    per_token += 5 * hidden  # both norms, the sum between the halves, and what the halves add
    per_token += 4 * inner  # gate, up, the activation and their product
    per_layer = len(linears) / shape.layers
    per_token += round(per_layer * r)
    per_token += 3 * inner  # on the way back: the gradients of the MLP's parts
    if dropout:  # a mask and a masked input for every adapted linear
        per_token += round(2 * sum(in_features for _, in_features in linears) / shape.layers)
    kept = tokens * per_token * dtype_bytes
    if dtype_bytes < _FP32:  # norms compute in fp32
        kept += 2 * tokens * hidden * _FP32
    # The weight that a gradient passes through is dequantized for it.
    weight = max((out * into for out, into in linears), default=0) * dtype_bytes
    return kept + weight


def check_memory(needed: TrainingMemory, free: float, where: str) -> None:
    """Raises TrainingError with the figures if it cannot fit; `where` names the memory."""
    if needed.total <= free:
        return
    raise TrainingError(
        f"training needs about {needed} and {free / MIB:,.0f} MiB of {where} are free: try a smaller batch_size with "
        "more gradient_accumulation_steps, a smaller max_seq_length or a smaller r",
        param="batch_size",
        code="not_enough_memory",
    )


def free_memory(device: Any) -> float:
    """Bytes that a torch device can still give this process."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return min(int(psutil.virtual_memory().available), _container_free())


def _container_free() -> float:
    """What a control group with a limit, such as a container, has left; infinite without one."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return math.inf
    return math.inf if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))
