"""What a resident weight is worth: NF4 with double quantization, and the one linear layer that uses it.

Format: 4-bit NormalFloat in blocks of 64 with 8-bit block scales in groups of 256 ("double quantization"),
Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, in bitsandbytes' packing.

Promises: the packed bytes and scales of a layer never change after load, whatever is run through it; what is
computed from them (a dense copy in the compute dtype) is a cache that can be dropped. The stock
`bitsandbytes.nn.Linear4bit` does not promise this: on CPUs with AVX512-BF16 its first evaluation forward repacks the
weight in place, after which dequantization returns garbage and training gets no gradient.
Does not load models (see the server's base/loading.py) and does not know what an adapter is.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from loramux_adapters.errors import BaseModelError
from loramux_adapters.kernels import FusedPart, Product, input_gradient

logger = logging.getLogger(__name__)

# bitsandbytes warns, when it is imported, that it could not download a CPU kernel; ours multiplies a dense copy.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _import_bitsandbytes() -> Any:
    """It wraps functions that nobody here calls in torch.compile, which loads the compiler: a second of every start."""
    compiler = torch.compile
    torch.compile = _uncompiled
    try:
        import bitsandbytes.functional as functional
    finally:
        torch.compile = compiler
    return functional


def _uncompiled(model: Any = None, **_: Any) -> Any:
    """torch.compile's two forms, call and decorator with options, that leave the function as it is."""
    return model if model is not None else lambda function: function


bnb = _import_bitsandbytes()

BLOCKSIZE = 64
# Relative errors up to which two products of the same values differ by rounding alone.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """One quantized matrix: `packed` uint8 `[ceil(N * K / 2), 1]`, two weights a byte, and its scales."""

    packed: torch.Tensor
    state: Any  # bitsandbytes.functional.QuantState
    shape: tuple[int, int]  # (out_features, in_features)

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> NF4Weight:
        """Quantize a float matrix `[N, K]`. Deterministic: equal values give equal bytes in any float dtype."""
        packed, state = bnb.quantize_4bit(
            weight.detach().contiguous(), blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=True
        )
        return cls(packed, state, (weight.shape[0], weight.shape[1]))

    @classmethod
    def from_bitsandbytes(cls, packed: torch.Tensor, state: Any, name: str) -> NF4Weight:
        """Adopt a weight that a bitsandbytes checkpoint brought. Raises BaseModelError for other 4-bit types."""
        if state.quant_type != "nf4":
            raise BaseModelError(
                f"{name} is quantized as '{state.quant_type}'; only 'nf4' is supported: quantize the 16-bit "
                "checkpoint instead, or save it with bnb_4bit_quant_type='nf4'",
                param="bnb_4bit_quant_type",
            )
        return cls(packed, state, (int(state.shape[0]), int(state.shape[1])))

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix `[N, K]` in `dtype`: scale times code in fp32, rounded once."""
        state = self.state
        if state.dtype != dtype:
            state = copy.copy(state)
            state.dtype = dtype
        dense: torch.Tensor = bnb.dequantize_4bit(self.packed, state)
        return dense

    def canonical_parts(self) -> list[torch.Tensor]:
        """The tensors that define this weight, in a fixed order: packed codes, scales, nested scales, offset."""
        parts = [self.packed, self.state.absmax]
        if self.state.nested:
            parts += [self.state.state2.absmax, self.state.offset.reshape(1)]
        return parts

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.canonical_parts())

    def digest(self) -> bytes:
        """sha256 of shape, block sizes and canonical bytes."""
        state = self.state
        nested = state.state2.blocksize if state.nested else 0
        digest = hashlib.sha256(f"nf4 {self.shape} {state.blocksize} {nested}".encode())
        for part in self.canonical_parts():
            digest.update(tensor_bytes(part))
        return digest.digest()


MatMul = Callable[[torch.Tensor, NF4Weight, torch.Tensor | None], torch.Tensor]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a contiguous tensor, without a copy when it is on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data


def base_identity(weights: Iterable[tuple[str, NF4Weight | torch.Tensor]]) -> str:
    """The quantization identity of a base: one sha256 (hex) over the name and content of every linear.

    Two bases with the same identity compute the same function under every adapter that targets those linears.
    """

    def one(item: tuple[str, NF4Weight | torch.Tensor]) -> tuple[str, bytes]:
        name, weight = item
        if isinstance(weight, NF4Weight):
            return name, weight.digest()
        digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(tensor_bytes(weight))
        return name, digest.digest()

    total = hashlib.sha256()
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the GIL on large buffers
        for name, digest_bytes in sorted(pool.map(one, weights)):
            total.update(name.encode() + b"\0" + digest_bytes)
    return total.hexdigest()


class NF4Linear(torch.nn.Linear):
    """A linear whose weight is NF4 for good; inputs are rounded to the compute dtype, which outputs have.

    `weight` is the packed uint8 parameter (no gradient), so that module walkers and PEFT see a linear of the right
    features. `kernel`, if set, multiplies instead (`grouping.derive_kernels`): on CPUs from the codes or a dense copy, where
    dequantizing per call costs 2-6 times more. Without it every call goes through bitsandbytes' fused 4-bit
    matmul on CUDA once that has proven itself (`cuda_matmul`), but for `few_rows`, where another was faster
    (`nf4_rows.py`), or dequantizes. The backward pass gives the input's gradient only.
    """

    def __init__(self, quantized: NF4Weight, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = quantized.shape
        self.quantized = quantized
        self.compute_dtype = dtype
        self.weight = torch.nn.Parameter(quantized.packed, requires_grad=False)
        fixed_bias = (
            None if bias is None else torch.nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        )
        self.register_parameter("bias", fixed_bias)
        self.kernel: Product | None = None
        self.few_rows: frozenset[int] = frozenset()  # numbers of rows that `few_rows_matmul` is for
        self.few_rows_matmul: MatMul = dequantized_matmul
        self.held: torch.Tensor | None = None  # see `holding_dense`
        self._holding = False

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight `[out_features, in_features]` from the canonical bytes."""
        return self.quantized.dequantize(dtype or self.compute_dtype)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ W.T + b` without autograd, by the fastest exact path this device has."""
        if self.kernel is not None:
            return self.kernel(x)
        x = x.to(self.compute_dtype)
        if self.few_rows and x.numel() // self.in_features in self.few_rows:
            return self.few_rows_matmul(x, self.quantized, self.bias)
        if x.device.type == "cuda":
            return cuda_matmul(x.device, x.dtype)(x, self.quantized, self.bias)
        return dequantized_matmul(x, self.quantized, self.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self.matmul(input)
        if input.requires_grad:
            out: torch.Tensor = _NF4MatMul.apply(input, self)  # type: ignore[no-untyped-call]
            return out
        with torch.no_grad():
            return self.matmul(input)

    def hold(self, holding: bool) -> None:
        self._holding, self.held = holding, None

    def backward_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """What a gradient is multiplied by; kept for the next one while it is to be held."""
        if self.held is not None:
            return self.held
        dense = self.dequantize(dtype)
        if self._holding:
            self.held = dense
        return dense

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, nf4"


def bnb_matmul(x: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """bitsandbytes' 4-bit matmul on CUDA: fused kernels for few rows, dequantize + cuBLAS above."""
    from bitsandbytes.autograd._functions import matmul_4bit

    y: torch.Tensor = matmul_4bit(x, weight.packed.t(), quant_state=weight.state, bias=bias)
    return y


def dequantized_matmul(x: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight.dequantize(x.dtype), bias)


@cache
def cuda_matmul(device: torch.device, dtype: torch.dtype) -> MatMul:
    """bitsandbytes' product if it agrees with the dequantized one on this device, else that one; the log says which.

    Asked at the first product of a base, which is a part of loading it.
    """
    try:
        distance = distance_of(bnb_matmul, device, dtype)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        logger.warning(
            "NF4: bitsandbytes' fused product does not run on %s (%s); every product dequantizes its weight, which is "
            "slower",
            device,
            reason,
        )
        return dequantized_matmul
    bound = ROUNDING[dtype]
    if distance <= bound:
        logger.info("NF4: bitsandbytes' fused product (relative error %.1g on a probe)", distance)
        return bnb_matmul
    logger.warning(
        "NF4: bitsandbytes' fused product is wrong on %s (relative error %.3g, at most %g is rounding); every "
        "product dequantizes its weight, which is slower",
        device,
        distance,
        bound,
    )
    return dequantized_matmul


@torch.no_grad()
def distance_of(
    product: MatMul, device: torch.device, dtype: torch.dtype, counts: Iterable[int] = (1, 5, 16, 33, 200)
) -> float:
    """The largest relative error of `product` for these numbers of rows, which choose different kernels."""
    generator = torch.Generator().manual_seed(0)
    weight = NF4Weight.quantize(torch.randn(192, 256, generator=generator).to(device))
    bias = torch.randn(192, generator=generator).to(device, dtype)
    distances = []
    for rows in counts:
        x = torch.randn(1, rows, 256, generator=generator).to(device, dtype)
        expected = dequantized_matmul(x, weight, bias).float()
        distances.append(float((product(x, weight, bias).float() - expected).norm() / expected.norm()))
    return float("nan") if any(d != d for d in distances) else max(distances)


class _NF4MatMul(torch.autograd.Function):
    """`x @ W.T + b`, re-deriving W in the backward pass instead of keeping it alive in the graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: NF4Linear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        y = layer.matmul(x)
        # autograd must own what a caller may change in place
        return y.clone() if isinstance(layer.kernel, FusedPart) else y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return input_gradient(grad, ctx.layer.backward_weight(grad.dtype)).to(ctx.dtype), None


@contextmanager
def holding_dense(module: torch.nn.Module | None) -> Iterator[None]:
    """Within, every NF4 linear of `module` is dequantized once for all backward passes, and stays so until the end."""
    linears = [] if module is None else [one for one in module.modules() if isinstance(one, NF4Linear)]
    for linear in linears:
        linear.hold(True)
    try:
        yield
    finally:
        for linear in linears:
            linear.hold(False)
