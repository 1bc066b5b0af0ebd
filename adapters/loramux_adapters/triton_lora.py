"""Rows times the factors of their own adapters, read where they lie in the pool: two Triton kernels for CUDA devices.

The idea is S-LoRA's and Punica's (Sheng et al. 2023, https://arxiv.org/abs/2311.03285; Chen et al. 2023,
https://arxiv.org/abs/2310.18547): rows are sorted into tiles of one adapter each. `_shrink` computes a tile's x A^T; its
inputs are divided among programs, because a decoding step has few tiles and a device many processors. `_expand` adds up
what those found, rounds it once to the factors' dtype, as products in memory are, and adds its product with B to y.

Promises: sums are fp32; a row's result is the same whichever rows are beside it; a tile of no rows costs no more than its
launch; no host synchronization, so that a CUDA graph can hold it. Does not decide when it is used (`row_choice.py`).
Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loramux_adapters.row_adapters import Tiles
from loramux_adapters.spec import MAX_RANK

TILE = 16  # rows, the fewest that tensor cores multiply
_RANKS = 32  # at a time
_SHARE = 512  # inputs a program
_STEP = 128  # of these at a time
_COLUMNS = 64  # outputs a program


@triton.jit
def _tile(tiles, rows, tile_rows: tl.constexpr):
    """A program's tile: how many rows it has, their places in `rows`, which of `tile_rows` it has, which rows of x and y
    they are, and the pool's rank rows of their adapter: the first, and how many."""
    tile = tiles + 4 * tl.program_id(0)
    count = tl.load(tile + 1)
    places = tl.load(tile) + tl.arange(0, tile_rows)
    held = (tl.arange(0, tile_rows) < count)[:, None]
    own = tl.load(rows + places[:, None], mask=held, other=0)
    return count, places, held, own, tl.load(tile + 2).to(tl.int64), tl.load(tile + 3)


# A number of rows that is a multiple of 16 must not compile the kernels again while requests wait.
@triton.jit(do_not_specialize=["tokens", "width"])
def _shrink(
    x,  # [tokens, inputs], contiguous
    a,  # [R, inputs], contiguous
    tiles,  # [n, 4]: first of `rows`, how many, rank row it begins at, rank
    rows,  # which rows of x, tile after tile
    partial,  # [shares, tokens, width] fp32: of each place in `rows` the product with each share of the inputs
    tokens,
    width,
    inputs: tl.constexpr,
    share: tl.constexpr,
    tile_rows: tl.constexpr,
    ranks: tl.constexpr,
    step: tl.constexpr,
):
    count, places, held, own, offset, rank = _tile(tiles, rows, tile_rows)
    if count == 0:
        return
    begin = tl.program_id(1) * share
    for first in range(0, rank, ranks):
        numbers = first + tl.arange(0, ranks)
        inside = (numbers < rank)[:, None]
        total = tl.zeros([tile_rows, ranks], dtype=tl.float32)
        for start in range(begin, begin + share, step):
            columns = start + tl.arange(0, step)[None, :]
            given = tl.load(x + own * inputs + columns, mask=held & (columns < inputs), other=0.0)
            factor = tl.load(
                a + (offset + numbers)[:, None] * inputs + columns,
                mask=inside & (columns < inputs),
                other=0.0,
            )
            total += tl.dot(given, tl.trans(factor), input_precision="ieee")
        to = partial + (tl.program_id(1) * tokens + places).to(tl.int64)[:, None] * width + numbers[None, :]
        tl.store(to, total, mask=held & (numbers < rank)[None, :])


@triton.jit(do_not_specialize=["tokens", "width", "shares"])
def _expand(
    partial,  # as above
    b,  # [R, outputs], contiguous
    tiles,
    rows,
    y,  # [tokens, outputs], contiguous
    tokens,
    width,
    shares,
    outputs: tl.constexpr,
    tile_rows: tl.constexpr,
    ranks: tl.constexpr,
    columns: tl.constexpr,
):
    count, places, held, own, offset, rank = _tile(tiles, rows, tile_rows)
    if count == 0:
        return
    numbers = tl.program_id(1) * columns + tl.arange(0, columns)[None, :]
    total = tl.zeros([tile_rows, columns], dtype=tl.float32)
    for first in range(0, rank, ranks):
        across = first + tl.arange(0, ranks)
        product = tl.zeros([tile_rows, ranks], dtype=tl.float32)
        for share in range(0, shares):
            found = partial + (share * tokens + places).to(tl.int64)[:, None] * width + across[None, :]
            product += tl.load(found, mask=held & (across < rank)[None, :], other=0.0)
        factor = tl.load(
            b + (offset + across)[:, None] * outputs + numbers,
            mask=(across < rank)[:, None] & (numbers < outputs),
            other=0.0,
        )
        total += tl.dot(product.to(factor.dtype), factor, input_precision="ieee")
    at = y + own.to(tl.int64) * outputs + numbers
    inside = held & (numbers < outputs)
    total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total.to(y.dtype.element_ty), mask=inside)


def lora(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, y: torch.Tensor, tiles: Tiles) -> None:
    """y `[rows, out]` += x `[rows, in]` A^T B in place, A `[R, in]`, B `[R, out]`; a `RowProduct` of `TILE` rows at once.

    Of adapters of at most `MAX_RANK` rank rows, which is the gate's bound."""
    if not tiles.count:
        return
    if not (a.is_contiguous() and b.is_contiguous() and y.is_contiguous()):
        raise RuntimeError("factors and sums of adapters' products must be contiguous")
    inputs, outputs, tokens = a.shape[1], b.shape[1], len(tiles.rows)
    shares = triton.cdiv(inputs, _SHARE)
    width = min(len(a), MAX_RANK)
    partial = torch.empty(shares, tokens, width, dtype=torch.float32, device=x.device)
    same = {"tile_rows": TILE, "ranks": _RANKS}
    with torch.cuda.device_of(x):
        _shrink[(tiles.count, shares)](
            x.contiguous(), a, tiles.tiles, tiles.rows, partial, tokens, width,
            inputs=inputs, share=_SHARE, step=_STEP, **same,
        )  # fmt: skip
        _expand[(tiles.count, triton.cdiv(outputs, _COLUMNS))](
            partial, b, tiles.tiles, tiles.rows, y, tokens, width, shares,
            outputs=outputs, columns=_COLUMNS, **same,
        )  # fmt: skip
