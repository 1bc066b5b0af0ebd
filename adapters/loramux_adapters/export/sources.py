"""The three sets of weights an export is proven with: those that were served, those that were written, and those the
other choice of base would have given. Each loads one parameter at a time for a `StreamedModel`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from loramux_adapters.export.checkpoint import Checkpoint
from loramux_adapters.export.linears import Delta, read_linear, row_pieces
from loramux_adapters.export.options import Onto
from loramux_adapters.export.plan import ExportPlan, TensorPlan
from loramux_adapters.export.quantized import is_packed, read_packed
from loramux_adapters.export.skeleton import BaseSkeleton

Progress = Callable[[int], None]


class ServedSource:
    """The base as the server holds it: linears dequantized, all in its compute dtype, adapters beside them."""

    def __init__(self, plan: ExportPlan, progress: Progress) -> None:
        self._plan = plan
        self._progress = progress
        self._linears = {tensor.source.name: tensor for tensor in plan.tensors if tensor.module}
        modules = dict.fromkeys(name for adapter in plan.adapters for name in adapter.weights.tensors)
        self._deltas = {module: Delta(module, plan.adapters) for module in modules}

    def load(self, name: str) -> torch.Tensor:
        plan = self._plan
        stored = _stored_name(name, plan.checkpoint, plan.skeleton)
        self._progress(plan.checkpoint.tensors[stored].num_bytes)
        if stored in self._linears:
            return self._linear(self._linears[stored])
        return plan.checkpoint.read(stored).to(plan.served_dtype)

    def adapt(self, module: str, x: torch.Tensor) -> torch.Tensor | None:
        delta = self._deltas.get(module)
        return None if delta is None else (x @ delta.a.T.to(x.dtype)) @ delta.b.T.to(x.dtype)

    def _linear(self, tensor: TensorPlan) -> torch.Tensor:
        return read_linear(self._plan, tensor).served(self._plan.served_dtype)


class OtherBaseSource(ServedSource):
    """What merging onto the base that was not chosen would have given, in the export's dtype."""

    def adapt(self, module: str, x: torch.Tensor) -> torch.Tensor | None:
        return None

    def _linear(self, tensor: TensorPlan) -> torch.Tensor:
        plan = self._plan
        onto = Onto.ORIGINAL if plan.options.onto is Onto.DEQUANTIZED else Onto.DEQUANTIZED
        linear = read_linear(plan, tensor, codes=onto is Onto.DEQUANTIZED, original=onto is Onto.ORIGINAL)
        merged = linear.base(onto, plan.served_dtype).float()
        delta = self._deltas.get(tensor.module or "")
        if delta is not None:
            for start, stop in row_pieces(tensor.shape):
                merged[start:stop] += delta.rows(start, stop)
        return merged.to(plan.output_dtype)


class ExportedSource:
    """The files as they were written."""

    def __init__(self, checkpoint: Checkpoint, skeleton: BaseSkeleton, progress: Progress) -> None:
        self._checkpoint = checkpoint
        self._skeleton = skeleton
        self._progress = progress

    def load(self, name: str) -> torch.Tensor:
        stored = _stored_name(name, self._checkpoint, self._skeleton)
        self._progress(self._checkpoint.tensors[stored].num_bytes)
        if is_packed(self._checkpoint, stored):
            return read_packed(self._checkpoint, stored).dequantize(self._skeleton.dtype)
        return self._checkpoint.read(stored)

    def adapt(self, module: str, x: torch.Tensor) -> torch.Tensor | None:
        return None


def _stored_name(name: str, checkpoint: Checkpoint, skeleton: BaseSkeleton) -> str:
    return name if name in checkpoint.tensors else skeleton.tied[name]
