"""What training needs beside a resident base, in bytes by kind, from plain numbers alone. No torch at import.

    training_memory(DecoderShape.of(config), shapes_of_the_trained_linears, r=16, tokens=2048, dtype_bytes=2)

Follows what `trainer.py` keeps alive: fp32 factors with their gradients and optimizer state; each layer's input; the
activations of a piece in one layer, or the logits of one chunk. Says how long pieces and chunks are. Promises figures
for decoders of attention and a (gated) MLP; counts no base, no KV cache and no CUDA context. `check_memory` refuses a run
that cannot fit, with the figures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Protocol

from loramux_adapters.errors import TrainingError
from loramux_adapters.host_memory import available_bytes

MIB = 2**20

# What is computed at once, by device: a slice beside serving should take a few milliseconds, and its products be wide
# enough for the device. Tokens times weights of a layer, and elements of a chunk of logits.
_PIECE_WORK = {"cpu": 2**29, "cuda": 2**37}
_PIECE_WORK_ALONE = 2**37  # where nobody waits for the end of a slice
_PIECE_TOKENS = {"cpu": (64, 2048), "cuda": (256, 8192)}  # at least, at most
_LOGITS_PER_CHUNK = {"cpu": 2**21, "cuda": 2**25}
_LOGITS_ROWS = 32  # at least: each chunk reads the whole head

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

    @property
    def layer_parameters(self) -> int:
        """Of the linears of one layer with a gated MLP."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        return attention + 3 * self.hidden * self.intermediate


def piece_tokens(shape: DecoderShape, device: str, *, alone: bool = False) -> int:
    """How many tokens go through a layer at once on a torch device type; `alone` if nothing is served meanwhile."""
    least, most = _PIECE_TOKENS[device]
    work = _PIECE_WORK_ALONE if alone else _PIECE_WORK[device]
    return max(least, min(most, work // shape.layer_parameters // 32 * 32))


def loss_rows(vocabulary: int, device: str) -> int:
    """Of how many tokens the logits are computed at once."""
    return max(_LOGITS_ROWS, _LOGITS_PER_CHUNK[device] // vocabulary)


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes by kind. `total` is less than their sum: see `alive_at_once`."""

    adapter: int  # fp32 factors
    gradients: int
    optimizer: int
    layer_inputs: int  # and keys and values of samples that are longer than a piece
    layer_activations: int  # of a piece in one layer, its backward pass included
    logits: int  # of one chunk, the loss and its gradient included
    accumulates: bool = False  # gradients over several micro-batches

    @property
    def state(self) -> int:
        """What stays from one step to the next."""
        return self.adapter + self.optimizer

    @property
    def total(self) -> int:
        """The peak within a step."""
        return self.state + alive_at_once(self, accumulates=self.accumulates)

    def __str__(self) -> str:
        parts = ", ".join(
            f"{field.name.replace('_', ' ')} {getattr(self, field.name) / MIB:,.0f}"
            for field in fields(self)
            if field.name != "accumulates"
        )
        return f"{self.total / MIB:,.0f} MiB ({parts})"


class Passing(Protocol):
    """What comes and goes within a step, in bytes."""

    @property
    def gradients(self) -> int: ...
    @property
    def layer_inputs(self) -> int: ...
    @property
    def layer_activations(self) -> int: ...
    @property
    def logits(self) -> int: ...


def alive_at_once(memory: Passing, *, accumulates: bool = False) -> int:
    """Bytes. A layer's activations and the logits never are; nor, but for accumulation, all gradients and all inputs: a
    layer's gradients come when its input goes."""
    gradients, inputs = memory.gradients, memory.layer_inputs
    passing = gradients + inputs if accumulates else max(gradients, inputs)
    return passing + max(memory.layer_activations, memory.logits)


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
    longest: int | None = None,
    device: str = "cuda",
    alone: bool = False,
    accumulates: bool = False,
) -> TrainingMemory:
    """`targets` are the (out_features, in_features) of every trained linear of every layer; `tokens` is how many a
    batch holds at most (batch_size times max_seq_length), `predicted` how many of these are trained on (all), `longest`
    the tokens of the longest sample (all). `device` is a torch device type; `alone` as `piece_tokens` has it.
    `accumulates` if a step has several micro-batches.
    """
    linears = list(targets)
    parameters = adapter_parameters(linears, r)
    chunk = min(tokens if predicted is None else predicted, loss_rows(shape.vocabulary, device))
    longest = tokens if longest is None else longest
    limit = piece_tokens(shape, device, alone=alone)
    piece = min(tokens, _piece(longest, limit))
    # In fp32. One more is the last layer's output, and one the gradient that travels back.
    kept = (shape.layers + 2) * tokens * shape.hidden * _FP32
    if longest > limit:
        kept += shape.layers * tokens * 2 * shape.kv_width * dtype_bytes
    activations = piece * _token_bytes(shape, linears, r, dtype_bytes, dropout=dropout)
    return TrainingMemory(
        adapter=parameters * _FP32,
        gradients=parameters * _FP32,
        optimizer=int(parameters * _STATE_BYTES[optimizer]),
        layer_inputs=kept,
        layer_activations=activations
        + _dense_bytes(shape, linears, dtype_bytes, held=piece < tokens and device == "cpu"),
        # themselves, the fp32 copy that becomes the gradient, and the gradient
        logits=chunk * shape.vocabulary * (_FP32 + dtype_bytes + (dtype_bytes if dtype_bytes < _FP32 else 0)),
        accumulates=accumulates,
    )


def _piece(longest: int, limit: int) -> int:
    """Tokens of a piece where all samples are as long as the longest: some of them, or an even part of one."""
    return limit // longest * longest if longest <= limit else -(-longest // -(-longest // limit))


def _token_bytes(
    shape: DecoderShape, linears: list[tuple[int, int]], r: int, dtype_bytes: int, *, dropout: bool
) -> int:
    """Of one token in a layer that is run with gradients: what autograd keeps, and the widest moment of going back."""
    hidden, inner, query = shape.hidden, shape.intermediate, shape.query_width
    rank = round(len(linears) / shape.layers * r)
    inputs = round(sum(in_features for _, in_features in linears) / shape.layers)
    if dtype_bytes < _FP32:
        # What a linear's factors read is rounded for each, what they give is fp32: sums, norms, the activation.
        narrow = 2 * query + 2 * shape.kv_width + inputs + rank
        wide = 2 * hidden + 3 * inner + 2 * inner  # the last are gradients on the way back
        kept = narrow * dtype_bytes + wide * _FP32
    else:
        # Queries, keys, values, and the answers, twice; both norms, the sum between the halves, and the output; gate, up,
        # the activation, their product, and on the way back the gradients of its two sides.
        kept = (3 * query + 2 * shape.kv_width + 4 * hidden + 6 * inner + rank) * dtype_bytes
    if dropout:  # a mask and a masked input for every adapted linear
        kept += 2 * inputs * dtype_bytes
    return kept


def _dense_bytes(shape: DecoderShape, linears: list[tuple[int, int]], dtype_bytes: int, *, held: bool) -> int:
    """Of the weights that gradients pass through, dequantized: one at a time, or all of a layer for all its pieces."""
    sizes = [out * into for out, into in linears]
    return (sum(sizes) // shape.layers if held else max(sizes, default=0)) * dtype_bytes


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
    return available_bytes()
