"""NF4 products for a few dozen rows, the weight dequantized in registers: a Triton kernel for CUDA devices.

bitsandbytes' fused kernels serve the fewest rows; above, and on some cards already from eight rows on, it writes the dense
weight to memory and reads it back, eight times the bytes of the packed one. Here a program takes some output columns
and all rows, walks over the inputs, and turns each byte it reads into two weights: the code's value times its block's scale,
which is itself the value of an 8-bit code times its group's scale plus an offset.

Promises: a weight is computed in fp32 and rounded once to the input's dtype, as `NF4Weight.dequantize` does; sums are fp32.
Takes double-quantized weights whose inputs are a multiple of 128 (`takes`). Does not decide when it is used
(`nf4_rows.py`). Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loramux_adapters.nf4 import BLOCKSIZE, NF4Weight

_STEP = 128  # inputs at a time: two blocks of a scale each
_COLUMNS = 32  # outputs a program; few, so that a narrow weight still fills the device


# A number of rows that is a multiple of 16 must not compile the kernel again while requests wait.
@triton.jit(do_not_specialize=["rows"])
def _product(
    x,  # [rows, inputs], contiguous
    packed,  # [outputs, inputs / 2] bytes, the even input in the high half
    codes,  # [16] fp32
    scales,  # [outputs, inputs / block] 8-bit codes
    scale_codes,  # [256] fp32
    groups,  # [outputs * inputs / (block * group)] fp32
    offset,  # [1] fp32
    bias,  # [outputs], or anything where has_bias is false
    out,  # [rows, outputs]
    rows,
    outputs: tl.constexpr,
    inputs: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
    has_bias: tl.constexpr,
    padded_rows: tl.constexpr,
    columns: tl.constexpr,
    step: tl.constexpr,
):
    own_rows = tl.arange(0, padded_rows)
    own_columns = tl.program_id(0) * columns + tl.arange(0, columns)
    pairs = tl.arange(0, step // 2)
    row_inside = (own_rows < rows)[:, None]
    column_inside = own_columns < outputs
    wide_columns = own_columns.to(tl.int64)[:, None]
    shift = tl.load(offset)
    total = tl.zeros([padded_rows, columns], dtype=tl.float32)
    for start in range(0, inputs, step):
        even = start + 2 * pairs
        bytes_at = packed + wide_columns * (inputs // 2) + (start // 2 + pairs)[None, :]
        two = tl.load(bytes_at, mask=column_inside[:, None], other=0).to(tl.int32)
        scale_place = wide_columns * (inputs // block) + (even // block)[None, :]
        scale_code = tl.load(scales + scale_place, mask=column_inside[:, None], other=0).to(tl.int32)
        group_scale = tl.load(groups + scale_place // group, mask=column_inside[:, None], other=0.0)
        scale = tl.load(scale_codes + scale_code) * group_scale + shift
        high = (tl.load(codes + (two >> 4)) * scale).to(x.dtype.element_ty)
        low = (tl.load(codes + (two & 15)) * scale).to(x.dtype.element_ty)
        given = x + own_rows[:, None] * inputs + even[None, :]
        total += tl.dot(tl.load(given, mask=row_inside, other=0.0), tl.trans(high), input_precision="ieee")
        total += tl.dot(tl.load(given + 1, mask=row_inside, other=0.0), tl.trans(low), input_precision="ieee")
    if has_bias:
        total += tl.load(bias + own_columns, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + own_rows[:, None] * outputs + own_columns[None, :],
        total.to(out.dtype.element_ty),
        mask=row_inside & column_inside[None, :],
    )


def takes(weight: NF4Weight) -> bool:
    """Whether the kernel multiplies with weights of this shape and quantization."""
    state = weight.state
    codes = weight.packed.dtype == torch.uint8  # a checkpoint may hold the same bytes as another type
    return codes and bool(state.nested) and state.blocksize == BLOCKSIZE and weight.shape[1] % _STEP == 0


def few_rows_matmul(x: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ W.T + b` for x `[..., inputs]` in 16 or 32 bits; meant for at most 64 rows, which one program holds."""
    outputs, inputs = weight.shape
    given = x.reshape(-1, inputs).contiguous()
    rows = given.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    state = weight.state
    with torch.cuda.device_of(x):
        _product[(triton.cdiv(outputs, _COLUMNS),)](
            given,
            weight.packed,
            state.code,
            state.absmax,
            state.state2.code,
            state.state2.absmax,
            state.offset,
            given if bias is None else bias,
            out,
            rows,
            outputs=outputs,
            inputs=inputs,
            block=state.blocksize,
            group=state.state2.blocksize,
            has_bias=bias is not None,
            padded_rows=max(16, triton.next_power_of_2(rows)),
            columns=_COLUMNS,
            step=_STEP,
        )
    return out.view(*x.shape[:-1], outputs)
