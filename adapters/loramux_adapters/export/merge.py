"""One tensor at a time: base bytes in, exported bytes out, and what was measured on the way.

    served  D = round_to_served_dtype(dequantize(NF4(W)))            what the server multiplied with
    merged  round_once(D + sum_i weight_i * scaling_i * B_i @ A_i)   the sum in fp32

Scaling is LoRA's alpha/r (arXiv 2106.09685, section 4.1) or rsLoRA's alpha/sqrt(r) (arXiv 2312.03732).
Promises: beside one tensor the working memory is a few pieces of 4 MiB; equal input gives equal bytes on the
same machine with the same libraries. Does not write files: it hands contiguous tensors to a sink.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from loramux_adapters.export.checkpoint import TORCH_DTYPES
from loramux_adapters.export.identity import linear_digest
from loramux_adapters.export.linears import BaseLinear, Delta, read_linear, row_pieces
from loramux_adapters.export.options import Onto
from loramux_adapters.export.plan import Action, ExportPlan, TensorPlan
from loramux_adapters.export.quantized import encode, quantize
from loramux_adapters.nf4 import tensor_bytes

Sink = Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class TensorOutcome:
    """What happened to a tensor. The last four are None where no adapter targets it.

    `survival` is <stored - D, delta> / <delta, delta>: 1 when rounding kept the delta, 0 when it erased it.
    `error` is the norm of what was stored beyond or short of D + delta, relative to the delta's norm.
    """

    name: str
    action: str
    finite: bool
    source_sha256: str
    linear_sha256: str | None = None  # what a linear contributes to the base's quantization identity
    changed: int | None = None  # stored values that are not the base's, rounded the same way
    relative_delta: float | None = None  # norm of the delta / norm of D
    survival: float | None = None
    error: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


class TensorMerger:
    """Applies the entries of a plan; see the module's formula."""

    def __init__(self, plan: ExportPlan) -> None:
        self._plan = plan

    def apply(self, tensor: TensorPlan, sink: Sink) -> TensorOutcome:
        """Give the sink every output tensor of `tensor`, in order and possibly in pieces of rows."""
        if tensor.action in (Action.COPY, Action.CAST):
            return self._copy(tensor, sink)
        linear = self._read(tensor)
        facts: dict[str, Any] = {
            "source_sha256": linear.source_sha256,
            "linear_sha256": self._digest(linear),
        }
        if tensor.action is Action.QUANTIZE:
            assert linear.codes is not None
            for part in encode(linear.codes, self._plan.skeleton.dtype):
                sink(part)
            facts["finite"] = is_finite(linear.codes.state.state2.absmax)
        elif tensor.action is Action.DEQUANTIZE:
            facts["finite"] = self._store(linear, tensor, sink)
        else:
            facts |= self._merge(linear, tensor, sink)
        return TensorOutcome(name=tensor.source.name, action=tensor.action.value, **facts)

    def _read(self, tensor: TensorPlan) -> BaseLinear:
        plan = self._plan
        onto_original = plan.options.onto is Onto.ORIGINAL
        merging_onto_original = onto_original and tensor.action is Action.MERGE
        codes = plan.needs_identity or not merging_onto_original
        return read_linear(plan, tensor, codes=codes, original=merging_onto_original)

    def _copy(self, tensor: TensorPlan, sink: Sink) -> TensorOutcome:
        digest = hashlib.sha256()
        finite = True
        for output in tensor.outputs:
            for piece in self._plan.checkpoint.chunks(output.name):
                digest.update(tensor_bytes(piece))
                stored = piece.to(TORCH_DTYPES[output.dtype])
                finite = finite and is_finite(stored)
                sink(stored)
        wanted = tensor.module is not None and self._plan.needs_identity
        return TensorOutcome(
            name=tensor.source.name,
            action=tensor.action.value,
            finite=finite,
            source_sha256=digest.hexdigest(),
            linear_sha256=self._digest(read_linear(self._plan, tensor)) if wanted else None,
        )

    def _digest(self, linear: BaseLinear) -> str | None:
        return linear_digest(linear, self._plan.served_dtype) if self._plan.needs_identity else None

    def _store(self, linear: BaseLinear, tensor: TensorPlan, sink: Sink) -> bool:
        served = linear.served(self._plan.served_dtype)
        finite = True
        for start, stop in row_pieces(tensor.shape):
            stored = served[start:stop].to(self._plan.output_dtype)
            finite = finite and is_finite(stored)
            sink(stored)
        return finite

    def _merge(self, linear: BaseLinear, tensor: TensorPlan, sink: Sink) -> dict[str, Any]:
        assert tensor.module is not None
        base = linear.base(self._plan.options.onto, self._plan.served_dtype)
        delta = Delta(tensor.module, self._plan.adapters)
        if len(tensor.outputs) > 1:
            return self._merge_to_codes(base, delta, sink)
        meter = _DeltaMeter()
        for start, stop in row_pieces(tensor.shape):
            onto, change = base[start:stop].float(), delta.rows(start, stop)
            stored = (onto + change).to(self._plan.output_dtype)
            meter.add(onto, change, stored)
            sink(stored)
        return meter.figures()

    def _merge_to_codes(self, base: torch.Tensor, delta: Delta, sink: Sink) -> dict[str, Any]:
        """Quantize the merged matrix again, and measure what that cost the delta."""
        pieces = row_pieces(tuple(base.shape))
        merged = base.to(torch.float32, copy=True)
        for start, stop in pieces:
            merged[start:stop] += delta.rows(start, stop)
        codes = quantize(merged)
        del merged
        for part in encode(codes, self._plan.skeleton.dtype):
            sink(part)
        stored = codes.dequantize(self._plan.served_dtype)
        meter = _DeltaMeter()
        for start, stop in pieces:
            meter.add(base[start:stop].float(), delta.rows(start, stop), stored[start:stop])
        return meter.figures()


class _DeltaMeter:
    """Sums over pieces: what the delta was, and what of it is in the stored values."""

    def __init__(self) -> None:
        self._kept = self._delta = self._base = self._lost = 0.0
        self._changed = 0
        self._finite = True

    def add(self, base: torch.Tensor, delta: torch.Tensor, stored: torch.Tensor) -> None:
        """`base` and `delta` `[rows, in]` in fp32, `stored` in the dtype it is stored in."""
        self._changed += int(torch.count_nonzero(stored != base.to(stored.dtype)))
        self._finite &= is_finite(stored)
        kept = stored.float() - base  # a new tensor: fp32 values are still to be written
        self._kept += _dot(kept, delta)
        self._delta += _dot(delta, delta)
        self._base += _dot(base, base)
        lost = kept.sub_(delta)
        self._lost += _dot(lost, lost)

    def figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = {"finite": self._finite, "changed": self._changed}
        if self._base:
            figures["relative_delta"] = (self._delta / self._base) ** 0.5
        if self._delta and self._finite:
            figures["survival"] = self._kept / self._delta
            figures["error"] = (self._lost / self._delta) ** 0.5
        return figures


def is_finite(values: torch.Tensor) -> bool:
    """True for integers; aminmax lets NaN and infinities through to its ends and is far faster than isfinite."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))
