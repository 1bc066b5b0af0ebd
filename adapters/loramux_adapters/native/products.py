"""Linears multiplied from NF4 codes, a quarter of the bytes a dense 16-bit copy has: by matrix tiles, else by vectors.

`CodesKernel` is called like a `DenseKernel`. Weights are multiplied as the dense matrix has them: scale times code in fp32,
rounded to bf16. On processors that have neither there is none, and a dense copy is multiplied by torch (`kernels.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch

from loramux_adapters.native.library import Native
from loramux_adapters.nf4 import BLOCKSIZE, NF4Weight, bnb

logger = logging.getLogger(__name__)

_OUTPUTS, _INPUTS = 16, 32  # of a tile, as in tiles.c
_BOUND = 5e-3  # relative error that is rounding to bf16


class CodesKernel:
    """One weight, or several that read the same input one below the other, ready for `x @ W.T + bias` in bf16."""

    def __init__(
        self,
        native: Native,
        weights: Sequence[NF4Weight | torch.Tensor],
        biases: Sequence[torch.Tensor | None],
    ) -> None:
        self._codes = torch.zeros(_OUTPUTS)
        self._scales: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        sizes = [_shape(weight)[0] for weight in weights]
        self.out_features = sum(sizes)
        if isinstance(weights[0], NF4Weight):
            self._codes = weights[0].state.code.float().contiguous()
        packed = [_LAYOUTS[native.products or "vectors"](weight) for weight in weights]
        self._weight = _joined([codes for codes, _ in packed])
        if packed[0][1] is not None:
            self._scales = _joined([scales for _, scales in packed if scales is not None])
        if any(bias is not None for bias in biases):
            self._bias = torch.cat(
                [
                    torch.zeros(size, dtype=torch.bfloat16) if bias is None else bias.detach().bfloat16()
                    for bias, size in zip(biases, sizes, strict=True)
                ]
            )
        self._in_features = _shape(weights[0])[1]
        held = [self._weight, *([] if self._scales is None else [self._scales])]
        self.num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
        self._product = native.product
        self._held = tuple(
            None if tensor is None else tensor.data_ptr()
            for tensor in (self._weight, self._scales, self._codes, self._bias)
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in_features]` -> `[..., out_features]` in bf16, which x is rounded to."""
        if x.shape[-1] != self._in_features:
            raise RuntimeError(f"{x.shape[-1]} inputs for a weight of {self._in_features}")
        if x.dtype != torch.bfloat16 or not x.is_contiguous():
            x = x.to(torch.bfloat16).contiguous()
        y = torch.empty((*x.shape[:-1], self.out_features), dtype=torch.bfloat16)
        rows = x.numel() // self._in_features
        sizes = (rows, self._in_features, self.out_features)
        if self._product(*self._held, x.data_ptr(), y.data_ptr(), *sizes):
            raise MemoryError("no memory for a product")
        return y


def multiplies(native: Native | None, weights: Sequence[NF4Weight | torch.Tensor]) -> bool:
    """Whether a `CodesKernel` of these weights exists here."""
    if native is None or native.products is None:
        return False
    outputs = 2 * _OUTPUTS if native.products == "tiles" else 1
    return (
        len({isinstance(weight, NF4Weight) for weight in weights}) == 1
        and all(_fits(weight, outputs) for weight in weights)
        and _right(native)
    )


@cache
def _right(native: Native) -> bool:
    """Whether products agree with torch's, on a probe; if not, the log says so."""
    distance = probe(native)
    if not distance <= _BOUND:
        logger.warning(
            "products by torch: those by %s are wrong here (relative error %.3g)", native.products, distance
        )
    return distance <= _BOUND


def _shape(weight: NF4Weight | torch.Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns


def _fits(weight: NF4Weight | torch.Tensor, outputs: int) -> bool:
    if isinstance(weight, NF4Weight):
        if weight.packed.device.type != "cpu" or weight.state.blocksize != BLOCKSIZE:
            return False
    elif weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    out, inputs = _shape(weight)
    return out % outputs == 0 and inputs % BLOCKSIZE == 0


_Packed = tuple[torch.Tensor, torch.Tensor | None]  # codes or bf16 numbers, and of NF4 the scales


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One below the other; of one part no copy."""
    return torch.cat(parts) if parts[1:] else parts[0]


def _by_rows(weight: NF4Weight | torch.Tensor) -> _Packed:
    """As they are resident: codes `[N, K / 2]` and the scales `[N, K / 64]` in fp32, or bf16 `[N, K]`."""
    if not isinstance(weight, NF4Weight):
        return weight.detach().contiguous(), None
    out, inputs = _shape(weight)
    return weight.packed.view(out, inputs // 2), scales_of(weight).view(out, -1)


def _by_tiles(weight: NF4Weight | torch.Tensor) -> _Packed:
    """Tiles `[N / 16, K / 32, ...]` of codes or bf16 numbers, and of NF4 the scales `[N / 16, K / 64, 16]` in fp32."""
    out, inputs = _shape(weight)
    tiles = (out // _OUTPUTS, inputs // _INPUTS)
    if not isinstance(weight, NF4Weight):
        pairs = weight.detach().view(tiles[0], _OUTPUTS, tiles[1], _INPUTS // 2, 2)
        return pairs.permute(0, 2, 3, 1, 4).contiguous(), None
    bytes_ = weight.packed.view(-1)
    codes = torch.stack((bytes_ >> 4, bytes_ & 15), dim=1)  # the first of two weights is in the high nibble
    halves = codes.view(tiles[0], 2, _OUTPUTS // 2, tiles[1], _INPUTS // 2, 2).permute(1, 0, 3, 4, 2, 5)
    packed = halves[0] | halves[1] << 4
    scales = scales_of(weight).view(tiles[0], _OUTPUTS, -1).transpose(1, 2)
    return packed.contiguous(), scales.contiguous()


_LAYOUTS: dict[str, Callable[[NF4Weight | torch.Tensor], _Packed]] = {"tiles": _by_tiles, "vectors": _by_rows}


def scales_of(weight: NF4Weight) -> torch.Tensor:
    """The scale of every block of 64, in fp32."""
    state = weight.state
    if not state.nested:
        plain: torch.Tensor = state.absmax.float()
        return plain
    scales: torch.Tensor = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.float()


@torch.no_grad()
def probe(native: Native) -> float:
    """The largest relative error of a product: NF4 and bf16 weights, with bias, for rows that fill tiles and that do not."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(96, 192, generator=generator)
    bias = torch.randn(96, generator=generator).bfloat16()
    worst = 0.0
    for weight in (NF4Weight.quantize(dense), dense.bfloat16()):
        exact = weight.dequantize(torch.bfloat16) if isinstance(weight, NF4Weight) else weight
        kernel = CodesKernel(native, [weight], [bias])
        for rows in (1, 2, 3, 4, 5, 16, 17, 32, 33, 50, 81):
            x = torch.randn(1, rows, 192, generator=generator).bfloat16()
            expected = x.float() @ exact.float().T + bias.float()
            error = (kernel(x).float() - expected).norm() / expected.norm()
            worst = max(worst, float(error)) if error == error else float("nan")
    return worst
