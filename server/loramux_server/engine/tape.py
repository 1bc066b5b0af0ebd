"""A decoding step on the CPU as a tape: what ran on tensors, without the Python that led there.

The forward pass of a small model calls some 600 modules a step, which with few streams takes longer than its arithmetic. A
tape keeps the calls of compiled kernels, with the addresses they were given, and torch's operators, with their tensors,
and replays them in order on the same memory. What CUDA graphs are for a GPU.

Memory: whatever is computed while a tape is recorded lies in an arena, and where a tensor has ended the next one may lie, as
when the step ran; replays repeat the order, so they repeat the reuse. All tapes share an arena: one runs at a time.
Promises: a value that the host asks for (`.item()`), or a shape that depends on values, raises RuntimeError. Not seen are
operators' results that modeling code keeps from one step to the next; `decode_graphs.py` therefore runs each step once
before it is recorded, and proves each tape on other inputs.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from loramux_adapters.native.recording import Call, recorded
from loramux_adapters.residency import RowPool
from loramux_server.engine.decode_graphs import Recording

_UNIT = 64  # bytes; what vectors like to begin at
_RESERVED = 1 << 30  # of address space: the system gives memory where something is written
MOST_ROWS = 64  # with more, arithmetic takes so long that the Python beside it does not matter
PARTS = (16, 32)  # rows of a long prompt beside those that decode, as `pace.py` gives them

# Operators that give memory and leave in it what was there.
_EMPTY = frozenset(
    ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")
)

# Operators made of others that have shapes by value, and the tag that says so.
_aten = torch.ops.aten
_UNTAGGED = frozenset((_aten.where.default, _aten.nonzero_numpy.default, _aten.argwhere.default))


class Arena:
    """Memory whose pieces are used again when the tensors that lay in them have ended."""

    def __init__(self, reserved: int = _RESERVED) -> None:
        self._reserved = reserved
        self._memory = memoryview(mmap.mmap(-1, reserved))
        self._pool = RowPool(reserved // _UNIT)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory for a tensor of this shape, layout and dtype. Raises RuntimeError if there is no more."""
        bytes_ = tensor.untyped_storage().nbytes()
        units = max(-(-bytes_ // _UNIT), 1)
        first = self._pool.allocate(units)
        if first is None:
            raise RuntimeError(f"a step's results take more than {self._reserved >> 20} MiB")
        piece = self._memory[first * _UNIT : (first + units) * _UNIT]
        weakref.finalize(piece, self._pool.release, first, units).atexit = False
        flat = torch.frombuffer(
            piece, dtype=tensor.dtype
        )  # holds the piece for as long as there are views of it
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Tape(TorchDispatchMode):
    """What ran in `record`, to be replayed."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._arena = arena
        self._calls: list[Call] = []

    def record(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self, recorded(self._calls):
            return work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if _depends_on_values(func, args, result):
            raise RuntimeError(f"what follows depends on values ({func})")
        if func._schema.is_mutable:
            self._calls.append(_quietly(func, args, kwargs))
            return result
        given = {
            _storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)
        }
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        if all(_storage(tensor) in given for tensor in made):  # views
            return result
        if any(_storage(tensor) in given for tensor in made):
            raise RuntimeError(f"{func} gives a view and something new")
        placed = tree_map_only(torch.Tensor, self._placed, result)
        if func._schema.name not in _EMPTY:
            self._calls.append(_into(placed, func, args, kwargs))
        return placed

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._arena.like(tensor).copy_(tensor)

    def replay(self) -> None:
        """Raises MemoryError if a kernel had no memory."""
        for call in self._calls:
            if call():
                raise MemoryError("no memory for a step's results")


class TapeRecorder:
    """Records for `DecodeGraphs`."""

    def __init__(self) -> None:
        self._arena = Arena()

    def __call__(self, work: Callable[[], torch.Tensor]) -> Recording:
        tape = Tape(self._arena)
        return Recording(tape.replay, tape.record(work))


def _depends_on_values(func: Any, args: Any, result: Any) -> bool:
    """Whether the result is the host's, or its shape is not the same for all tensors of these shapes."""
    if not all(isinstance(value, torch.Tensor | None) for value in tree_leaves(result)):
        return True
    if func is _aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return func in _UNTAGGED or torch.Tag.dynamic_output_shape in func.tags


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _quietly(func: Any, args: Any, kwargs: Any) -> Callable[[], None]:
    def call() -> None:
        func(*args, **kwargs)

    return call


def _into(placed: Any, func: Any, args: Any, kwargs: Any) -> Callable[[], None]:
    """A call that leaves its results where those of the recorded one lie."""
    out = _out_variant(func)
    if out is not None and isinstance(placed, torch.Tensor):
        return _quietly(out, args, {**kwargs, "out": placed})
    targets = tree_leaves(placed)

    def call() -> None:
        for target, value in zip(targets, tree_leaves(func(*args, **kwargs)), strict=True):
            if isinstance(target, torch.Tensor):
                target.copy_(value)

    return call


def _out_variant(func: Any) -> Any:
    """The overload that writes the same result to `out`, if there is one."""
    wanted = [(argument.name, str(argument.type)) for argument in func._schema.arguments]
    for name in func.overloadpacket.overloads():
        found = getattr(func.overloadpacket, name)
        given = [
            (argument.name, str(argument.type)) for argument in found._schema.arguments if not argument.is_out
        ]
        if [one.name for one in found._schema.arguments if one.is_out] == ["out"] and given == wanted:
            return found
    return None
