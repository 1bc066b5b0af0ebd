"""How a resident matrix is multiplied: one dense weight, prepared once for the device it lives on.

Promises: `DenseKernel(weight, bias)(x)` equals `F.linear(x, weight, bias)` up to the rounding of the compute
dtype, without autograd. On CPUs with native bf16 arithmetic the weight is reordered once into oneDNN's blocked
layout, which reads memory at full bandwidth; a plain `F.linear` repacks the weight on every call. The two oneDNN
operators are private to torch, so they are probed once, on real numbers, and `F.linear` is used when the probe
fails. Does not know what NF4 or LoRA is.
"""

from __future__ import annotations

import math
import mmap
import platform
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F


@cache
def prepacking_available() -> bool:
    """True if oneDNN's reordered bf16 matmul exists here and agrees with the plain one on a probe."""
    ops = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(ops, "_reorder_linear_weight")):
        return False
    try:
        if not ops._is_mkldnn_bf16_supported():
            return False
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(64, 96, generator=generator).bfloat16()
        x = torch.randn(3, 96, generator=generator).bfloat16()
        packed = ops._reorder_linear_weight(weight, None)
        y = ops._linear_pointwise(x, packed, None, "none", [], "")
        return bool(torch.allclose(y.float(), F.linear(x, weight).float(), rtol=2e-2, atol=2e-1))
    except (RuntimeError, AttributeError, TypeError):
        return False


@cache
def bf16_is_slow() -> bool:
    """Whether torch multiplies bf16 on this CPU without instructions for it, at a tenth of its rate in fp32."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


_WIDENED_ROWS, _WIDENED = 256, 2**17  # of gradients, and weights, at a time


def input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`grad @ weight` of grad `[..., N]` and weight `[N, K]`; where that is faster products of bf16 are made in fp32.

    A part of both at a time is widened, so that it takes no more memory than plans count with.
    """
    if grad.device.type != "cpu" or weight.dtype != torch.bfloat16 or not bf16_is_slow():
        return grad @ weight
    flat = grad.reshape(-1, grad.shape[-1])
    out = weight.new_empty(len(flat), weight.shape[1])
    count = max(_WIDENED_ROWS, _WIDENED // weight.shape[1])
    for first in range(0, len(flat), _WIDENED_ROWS):
        rows = flat[first : first + _WIDENED_ROWS]
        sums = torch.zeros(len(rows), weight.shape[1])
        for begin in range(0, len(weight), count):
            part = slice(begin, begin + count)
            sums.addmm_(rows[:, part].float(), weight[part].float())
        out[first : first + _WIDENED_ROWS] = sums
    return out.view(*grad.shape[:-1], -1)


def zeros_on_demand(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose memory, on the CPU, the operating system commits page by page as it is first written.

    `torch.zeros` writes every page at once, so a pool sized for the worst case would cost its full size from the start.
    """
    count = math.prod(shape)
    if device.type != "cpu" or count == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype, count=count).view(*shape)


def prepacks(weight: torch.Tensor) -> bool:
    """True if a `DenseKernel` of this weight holds the reordered copy instead of the plain one."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and prepacking_available()


class DenseKernel:
    """One weight `[out_features, in_features]` and its bias, ready for `x @ weight.T + bias`.

    Holds the plain weight, or, where that is faster, only the reordered copy of it (the same number of bytes).
    """

    __slots__ = ("_bias", "_dtype", "_packed", "_weight", "num_bytes")

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, prepack: bool = True
    ) -> None:
        self.num_bytes = weight.numel() * weight.element_size()
        self._bias = bias
        self._dtype = weight.dtype
        self._packed = self._weight = None
        if prepack and prepacks(weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        else:
            self._weight = weight

    @property
    def prepacked(self) -> bool:
        return self._packed is not None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in_features]` -> `[..., out_features]` in the weight's dtype, which x is rounded to."""
        x = x.to(self._dtype)
        if self._packed is not None:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
                x, self._packed, self._bias, "none", [], ""
            )
            return y
        assert self._weight is not None
        return F.linear(x, self._weight, self._bias)


class Product(Protocol):
    """What multiplies x `[..., in_features]` with a prepared weight."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class FusedKernel:
    """Linears that read the same input, multiplied as one: a call costs some 25 microseconds however small it is.

    `parts` stand for the linears. The first part called with an input computes the product for all; each takes its
    columns, a view, once. A part called again, or with another tensor, computes anew: what a caller adds in place to
    the columns it took is never handed out twice.
    """

    def __init__(self, kernel: Product, sizes: Sequence[int]) -> None:
        """`kernel` gives the linears' outputs side by side, of these sizes."""
        self._kernel = kernel
        self._input: torch.Tensor | None = None
        self._product: torch.Tensor | None = None
        self._left: set[FusedPart] = set()
        self.parts: list[FusedPart] = []
        begin = 0
        for size in sizes:
            self.parts.append(FusedPart(self, slice(begin, begin + size)))
            begin += size

    @classmethod
    def of_dense(cls, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> FusedKernel:
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat(
                [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
            )
        return cls(DenseKernel(torch.cat(list(weights)), bias), [weight.shape[0] for weight in weights])

    def take(self, part: FusedPart, x: torch.Tensor) -> torch.Tensor:
        product = self._product
        if product is None or self._input is not x or part not in self._left:
            self._input, self._product = x, self._kernel(x)
            self._left = set(self.parts)
            product = self._product
        self._left.discard(part)
        if not self._left:
            self._input = self._product = None
        return product[..., part.columns]


class FusedPart:
    """One linear of a `FusedKernel`, called like a `DenseKernel`."""

    __slots__ = ("_whole", "columns")

    def __init__(self, whole: FusedKernel, columns: slice) -> None:
        self._whole = whole
        self.columns = columns

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._whole.take(self, x)


class ResidentLinear(torch.nn.Linear):
    """A linear that stays in 16 or 32 bit (the output head, or every linear with quantization off).

    Shares the weight parameter of the layer it replaces, tied or not. It multiplies with the `kernel` derived from that
    weight; the backward pass gives the input's gradient only, unless the weight is to be trained: then it is an ordinary
    linear.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.kernel: Product = DenseKernel(linear.weight.detach(), self.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            if self.weight.requires_grad:
                return F.linear(input.to(self.weight.dtype), self.weight, self.bias)
            if input.requires_grad:
                out: torch.Tensor = _FrozenMatMul.apply(input, self)  # type: ignore[no-untyped-call]
                return out
        with torch.no_grad():
            return self.kernel(input)


class _FrozenMatMul(torch.autograd.Function):
    """`x @ W.T + b` by the kernel; W gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: ResidentLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        y = layer.kernel(x)
        # autograd must own what a caller may change in place
        return y.clone() if isinstance(layer.kernel, FusedPart) else y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return input_gradient(grad, ctx.layer.weight).to(ctx.dtype), None
