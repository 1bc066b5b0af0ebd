"""The compiled kernels as functions of tensors: bf16, on the CPU, last dimension contiguous; out of place but for `lora`.

Promises nothing about other tensors: who calls has looked (`takes`). They run on the OpenMP threads torch computes with, as
many as `torch.get_num_threads()` says; a second team would compete with those for the cores.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from loramux_adapters.native import build
from loramux_adapters.native.build import CannotBuild
from loramux_adapters.native.recording import recorder
from loramux_adapters.row_adapters import Tiles

logger = logging.getLogger(__name__)

_ADDRESS, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
_ATTENTION = [_ADDRESS, _LONG] + [_ADDRESS] * 4 + [_LONG] * 7 + [_FLOAT] * 2
_SIGNATURES = {
    "loramux_rms_norm": (None, [_ADDRESS] * 3 + [_LONG] * 2 + [_FLOAT, _INT]),
    "loramux_rotate": (None, [_ADDRESS] * 4 + [_LONG] * 5),
    "loramux_gate": (None, [_ADDRESS] * 3 + [_LONG] * 4),
    "loramux_lora": (
        _INT,
        [_ADDRESS] * 2 + [_LONG] * 2 + [_ADDRESS, _LONG] * 2 + [_ADDRESS, _LONG, _ADDRESS],
    ),
    "loramux_write": (None, [_ADDRESS, _LONG, _LONG] * 2 + [_ADDRESS] * 2 + [_LONG] * 3),
    "loramux_tiles": (_INT, []),
    "loramux_tile_product": (_INT, [_ADDRESS] * 6 + [_LONG] * 3),
    "loramux_vectors": (_INT, []),
    "loramux_vector_product": (_INT, [_ADDRESS] * 6 + [_LONG] * 3),
    "loramux_attend": (_INT, _ATTENTION),
    "loramux_attend_prompts": (_INT, [*_ATTENTION, _ADDRESS, _LONG]),
}


def load_native(directory: Path) -> Native | None:
    """The kernels, built into `directory` unless they are there; None where they cannot be, and the log says why."""
    try:
        return Native(build.load(directory), _openmp())
    except CannotBuild as error:
        logger.warning("CPU kernels are not used, which is slower: %s", error)
        return None


def _openmp() -> ctypes.CDLL:
    """The OpenMP runtime that torch computes with."""
    try:
        mapped = {
            line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line
        }
    except OSError as error:
        raise CannotBuild(f"torch's OpenMP runtime is not found: {error}") from error
    found = [path for path in map(Path, mapped) if path.name.startswith(("libgomp", "libiomp5", "libomp"))]
    found.sort(
        key=lambda path: {"torch", "torch.libs"}.isdisjoint(path.parts)
    )  # other packages bring their own
    for path in found:
        runtime = ctypes.CDLL(str(path))
        if hasattr(runtime, "GOMP_parallel"):
            return runtime
    raise CannotBuild("torch's OpenMP runtime is not found")


def takes(*tensors: torch.Tensor) -> bool:
    """Whether these are what the kernels are for, and nobody wants gradients of them."""
    if torch.is_grad_enabled():
        return False
    return all(
        tensor.dtype == torch.bfloat16 and tensor.is_cpu and tensor.stride(-1) == 1 for tensor in tensors
    )


class BlockRows(Protocol):
    """Neighbouring rows of a step, of `n` sequences whose tokens lie in blocks: `Ragged` in the server's paged_batch.py.

    Sequence i has the rows begins[i] up to begins[i + 1], `most` of them at most; its last one sees lengths[i] tokens.
    """

    @property
    def block_table(self) -> torch.Tensor: ...  # [n, width] int64
    @property
    def begins(self) -> torch.Tensor: ...  # [n + 1] int64
    @property
    def lengths(self) -> torch.Tensor: ...  # [n] int64
    @property
    def most(self) -> int: ...


class Native:
    def __init__(self, library: ctypes.CDLL, openmp: ctypes.CDLL, *, tiles: bool = True) -> None:
        """`tiles`: whether products use the processor's matrix tiles, if it has them."""
        self.library, self.openmp = library, openmp
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        runtime = [
            ctypes.cast(getattr(openmp, name), _ADDRESS)
            for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        ]
        library.loramux_setup(*runtime)
        self.products: Literal["tiles", "vectors"] | None = (
            "tiles" if tiles and library.loramux_tiles() else "vectors" if library.loramux_vectors() else None
        )
        self._product = (
            library.loramux_tile_product if self.products == "tiles" else library.loramux_vector_product
        )
        self._rms_norm = library.loramux_rms_norm
        self._rotate = library.loramux_rotate
        self._gate = library.loramux_gate
        self._lora = library.loramux_lora
        self._attend = library.loramux_attend
        self._attend_prompts = library.loramux_attend_prompts
        self._write = library.loramux_write

    def _call(self, function: Callable[..., int | None], *arguments: object) -> int | None:
        if recorder.calls is not None:
            recorder.calls.append(partial(function, *arguments))
        return function(*arguments)

    def product(self, *arguments: object) -> int | None:
        """y `[T, N]` = x `[T, K]` W^T + bias by addresses, of a weight that `products.py` packed. 1: no memory."""
        return self._call(self._product, *arguments)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, around_one: bool
    ) -> torch.Tensor:
        """`[..., size]`, size a multiple of 16. `around_one`: the weight is what it differs from one by."""
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._call(
            self._rms_norm,
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // size,
            size,
            epsilon,
            around_one,
        )
        return out

    def rotate(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """x `[1, heads, T, size]`, cosine and sine `[1, T, size]` contiguous, size a multiple of 32 -> as x."""
        _, heads, tokens, size = x.shape
        out = torch.empty((1, tokens, heads, size), dtype=x.dtype)
        self._call(
            self._rotate,
            x.data_ptr(),
            cosine.data_ptr(),
            sine.data_ptr(),
            out.data_ptr(),
            tokens,
            heads,
            size,
            x.stride(2),
            x.stride(1),
        )
        return out.transpose(1, 2)

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of `[1, T, size]`, size a multiple of 16."""
        out = torch.empty(gate.shape, dtype=gate.dtype)
        _, rows, size = gate.shape
        self._call(
            self._gate,
            gate.data_ptr(),
            up.data_ptr(),
            out.data_ptr(),
            rows,
            size,
            gate.stride(1),
            up.stride(1),
        )
        return out

    def lora(self, a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, y: torch.Tensor, tiles: Tiles) -> None:
        """y `[..., out]` += x `[..., in]` A^T B in place, A `[R, in]`, B `[R, out]`; in and out multiples of 32."""
        failed = self._call(
            self._lora,
            a.data_ptr(),
            b.data_ptr(),
            a.shape[1],
            b.shape[1],
            x.data_ptr(),
            x.stride(-2),
            y.data_ptr(),
            y.stride(-2),
            tiles.tiles.data_ptr(),
            tiles.count,
            tiles.rows.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for an adapter's product")

    def attend(
        self, query: torch.Tensor, cache: torch.Tensor, rows: BlockRows, out: torch.Tensor, **options: Any
    ) -> None:
        """Decoding rows, one of each sequence; sizes and options as in `_over_blocks`."""
        self._over_blocks(self._attend, (), query, cache, rows, out, **options)

    def attend_prompts(
        self, query: torch.Tensor, cache: torch.Tensor, rows: BlockRows, out: torch.Tensor, **options: Any
    ) -> None:
        """Rows of prompts, neighbours of each sequence; sizes and options as in `_over_blocks`."""
        own = rows.begins.data_ptr(), rows.most
        self._over_blocks(self._attend_prompts, own, query, cache, rows, out, **options)

    def _over_blocks(
        self,
        function: Callable[..., int],
        own: tuple[int, ...],
        query: torch.Tensor,
        cache: torch.Tensor,
        rows: BlockRows,
        out: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        """As `AttentionKernel` in the server's paged_batch.py; head sizes are multiples of 32.

        query `[T, heads, size]`, a row's heads contiguous; cache `[blocks, block_size, 2, kv_heads, size]`; out
        `[T, heads, size]` contiguous.
        """
        _, block_size, _, kv_heads, size = cache.shape
        failed = self._call(
            function,
            query.data_ptr(),
            query.stride(0),
            cache.data_ptr(),
            out.data_ptr(),
            rows.block_table.data_ptr(),
            rows.lengths.data_ptr(),
            *rows.block_table.shape,
            query.shape[1],
            kv_heads,
            size,
            block_size,
            window or 0,
            scale,
            softcap or 0.0,
            *own,
        )
        if failed:
            raise MemoryError("no memory for attention's scores")

    def write(self, cache: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """key and value `[T, kv_heads, size]` to flat positions `slots [T]` int64 of the cache that `attend` reads."""
        self._call(
            self._write,
            key.data_ptr(),
            key.stride(0),
            key.stride(1),
            value.data_ptr(),
            value.stride(0),
            value.stride(1),
            cache.data_ptr(),
            slots.data_ptr(),
            *key.shape,
        )
