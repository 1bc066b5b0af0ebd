"""A linear of the base as it was served and as the checkpoint holds it. Shared by the merge and by its proof."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from loramux_adapters.export.loaded import LoadedAdapter
from loramux_adapters.export.options import Onto
from loramux_adapters.export.plan import ExportPlan, TensorPlan
from loramux_adapters.export.quantized import is_packed, quantize, read_packed
from loramux_adapters.nf4 import NF4Weight, tensor_bytes


@dataclass(frozen=True, eq=False)
class BaseLinear:
    """`original` is what transformers would load without quantization, None where only codes exist (or are
    asked).
    """

    original: torch.Tensor | None
    codes: NF4Weight | None
    source_sha256: str

    def served(self, dtype: torch.dtype) -> torch.Tensor:
        """`[out, in]` as the server multiplies with it: dequantized in fp32, then rounded to its compute
        dtype.
        """
        if self.codes is not None:
            return self.codes.dequantize(dtype)
        assert self.original is not None
        return self.original.to(dtype)

    def base(self, onto: Onto, served_dtype: torch.dtype) -> torch.Tensor:
        """What a delta is added to."""
        if onto is Onto.ORIGINAL and self.original is not None:
            return self.original
        return self.served(served_dtype)


def read_linear(
    plan: ExportPlan, tensor: TensorPlan, *, codes: bool = True, original: bool = False
) -> BaseLinear:
    """Read a linear of the base; quantize it if `codes` and it is served as NF4. Drops the 16-bit values
    unless asked.
    """
    checkpoint = plan.checkpoint
    stored = checkpoint.read(tensor.source.name) if not is_packed(checkpoint, tensor.source.name) else None
    if stored is None:
        packed = read_packed(checkpoint, tensor.source.name)
        return BaseLinear(None, packed, packed.digest().hex())
    digest = hashlib.sha256(tensor_bytes(stored)).hexdigest()
    values = stored.to(plan.skeleton.dtype)
    del stored
    quantized = quantize(values, plan.options.device.value) if codes and tensor.nf4 else None
    keep = original or quantized is None
    return BaseLinear(values if keep else None, quantized, digest)


class Delta:
    """The sum of several adapters' deltas for one module, as one product `b @ a` in fp32.

    a `[sum of ranks, in]`, b `[out, sum of ranks]` with weight and scaling folded in.
    """

    def __init__(self, module: str, adapters: tuple[LoadedAdapter, ...]) -> None:
        using = [adapter for adapter in adapters if module in adapter.weights.tensors]
        self.a = torch.cat([adapter.weights.tensors[module][0].float() for adapter in using])
        self.b = torch.cat([_scaled_b(adapter, module) for adapter in using], dim=1)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of the delta, `[stop - start, in]` in fp32."""
        return self.b[start:stop] @ self.a


def _scaled_b(adapter: LoadedAdapter, module: str) -> torch.Tensor:
    factor = adapter.weight * adapter.weights.spec.scaling(module)
    return adapter.weights.tensors[module][1].float() * factor


def row_pieces(shape: tuple[int, ...], weights: int = 2**20) -> list[tuple[int, int]]:
    """Row ranges of at most `weights` values each, at least one row."""
    step = max(1, weights // shape[1])
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
