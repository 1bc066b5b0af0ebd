"""The plan of an export: what happens to every tensor, decided from headers before a weight is read.

Promises: every LoRA module is resolved to exactly one tensor of the base; whatever does not match is refused,
all faults in one error; sizes on disk are exact, the memory figure is an upper estimate. Reads the adapters
(they are small), no base weight. Does not check the quantization identity: that needs the weights, and
happens while merging.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import torch

from loramux_adapters.errors import BaseModelError, ExportError
from loramux_adapters.export.checkpoint import FLOATS, NAMES, Checkpoint, StoredTensor
from loramux_adapters.export.loaded import LoadedAdapter, load_adapters
from loramux_adapters.export.options import Device, ExportOptions, Format, Onto, Quantization, ServedDtype
from loramux_adapters.export.quantized import OutputTensor, is_packed, output_tensors, packed_parts
from loramux_adapters.export.skeleton import BaseSkeleton, read_skeleton, unmatched
from loramux_adapters.safetensors_header import ITEM_BYTES

FORMAT_DTYPES = {Format.BF16: torch.bfloat16, Format.FP16: torch.float16, Format.FP32: torch.float32}
_SERVED = {
    ServedDtype.BF16: torch.bfloat16,
    ServedDtype.FP16: torch.float16,
    ServedDtype.FP32: torch.float32,
}
_PROCESS_BYTES = 700 * 10**6  # the interpreter with torch and transformers, and the pieces in flight
_MAX_LISTED = 20


class Action(StrEnum):
    """What becomes of a tensor of the base."""

    COPY = "copied"  # byte for byte
    CAST = "cast"  # another float dtype, nothing else
    DEQUANTIZE = "dequantized"  # a linear no adapter targets, with the values it was served with
    QUANTIZE = "quantized"  # the same, stored as the codes it was served with
    MERGE = "merged"


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the base and what is stored for it. `module` is the linear's name, if it is one."""

    source: StoredTensor
    action: Action
    outputs: tuple[OutputTensor, ...]
    shape: tuple[int, ...]  # of the values; a packed source has another
    module: str | None = None
    nf4: bool = False  # served as NF4

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(o.shape) * ITEM_BYTES[o.dtype] for o in self.outputs)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    name: str
    tensors: tuple[TensorPlan, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class ExportPlan:
    """Everything `run_export` will do."""

    options: ExportOptions
    checkpoint: Checkpoint
    skeleton: BaseSkeleton
    adapters: tuple[LoadedAdapter, ...]
    shards: tuple[ShardPlan, ...]
    served_dtype: torch.dtype
    output_dtype: torch.dtype  # of everything that is not stored as NF4 codes
    warnings: tuple[str, ...]

    @property
    def tensors(self) -> Iterable[TensorPlan]:
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def total_bytes(self) -> int:
        """Tensor bytes of the export: what the index calls total_size."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def read_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.checkpoint.tensors.values())

    @property
    def stamp(self) -> str | None:
        """The quantization identity the adapters were trained on, if any says so."""
        stamps = {a.weights.spec.base_identity for a in self.adapters} - {None}
        return next(iter(stamps), None)

    @property
    def needs_identity(self) -> bool:
        asked = self.options.base_identity is not None
        return asked or self.stamp is not None or self.options.verify.prompts > 0

    @cached_property
    def peak_memory(self) -> int:
        """Estimated peak resident bytes: twelve a weight of the largest tensor held whole, and the process."""
        whole = self.skeleton.parameters if self.options.verify.prompts else self.skeleton.linears
        return _PROCESS_BYTES + 12 * max((math.prod(shape) for shape in whole.values()), default=0)

    @property
    def free_bytes(self) -> int:
        """What is free where the export will lie."""
        return free_bytes(self.options.partial)

    def count(self, action: Action) -> int:
        return sum(tensor.action is action for tensor in self.tensors)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all that decides the bytes: a resumed export must have the same one."""
        from importlib.metadata import version

        files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self.checkpoint.files]
        decided = {
            "files": files,
            "adapters": [(a.weights.generation, a.weight) for a in self.adapters],
            "format": self.options.format,
            "onto": self.options.onto,
            "served_dtype": str(self.served_dtype),
            "quantization": [self.options.quantization, self.options.device],
            "shards": [(s.name, [t.source.name for t in s.tensors], s.num_bytes) for s in self.shards],
            "versions": [version(name) for name in ("loramux", "torch", "bitsandbytes")],
        }
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def plan_export(options: ExportOptions) -> ExportPlan:
    """Raises BaseModelError, InvalidAdapter or ExportError; what it returns can be written if the disk
    allows.
    """
    checkpoint = Checkpoint.open(options.model)
    skeleton = read_skeleton(options.model, checkpoint)
    faults = unmatched(skeleton, checkpoint)
    if faults:
        raise BaseModelError(
            "the checkpoint does not hold the tensors its config.json calls for: " + _listed(faults),
            param="model",
        )
    _check_options(options, skeleton)
    geometry = skeleton.geometry(options.base_name)
    adapters = load_adapters(options.adapters, geometry)
    output_dtype = FORMAT_DTYPES.get(options.format, skeleton.dtype)
    targets = frozenset(name for adapter in adapters for name in adapter.weights.tensors)
    tensors = _TensorPlanner(options, checkpoint, skeleton, targets, NAMES[output_dtype]).plan()
    return ExportPlan(
        options=options,
        checkpoint=checkpoint,
        skeleton=skeleton,
        adapters=adapters,
        shards=_plan_shards(tensors, options.shard_bytes),
        served_dtype=_served_dtype(options.served_dtype, skeleton.dtype),
        output_dtype=output_dtype,
        warnings=tuple(dict.fromkeys(w for a in adapters for w in a.weights.spec.warnings(geometry))),
    )


def _check_options(options: ExportOptions, skeleton: BaseSkeleton) -> None:
    if skeleton.prequantized and options.onto is Onto.ORIGINAL:
        raise ExportError(
            "--onto original: this base is stored as NF4 and has no 16-bit weights; use --onto dequantized",
            param="onto",
        )
    if skeleton.prequantized and options.quantization is Quantization.NONE:
        raise ExportError(
            "--quantization none: this base is stored as NF4; leave the option out", param="quantization"
        )
    if options.device is Device.CUDA and not torch.cuda.is_available():
        raise ExportError("--device cuda: torch finds no GPU here; use --device cpu", param="device")


def _served_dtype(asked: ServedDtype, base: torch.dtype) -> torch.dtype:
    """A server computes a 16-bit checkpoint in bf16; one in fp32 is taken to be served in fp32."""
    return _SERVED.get(asked, torch.float32 if base == torch.float32 else torch.bfloat16)


@dataclass(frozen=True)
class _TensorPlanner:
    """Decides what becomes of each tensor of the base."""

    options: ExportOptions
    checkpoint: Checkpoint
    skeleton: BaseSkeleton
    targets: frozenset[str]
    dtype: str  # of the export's floats, as safetensors names it

    def plan(self) -> list[TensorPlan]:
        beside_codes = {
            part.name
            for module in self.skeleton.linears
            if is_packed(self.checkpoint, f"{module}.weight")
            for part in packed_parts(self.checkpoint, f"{module}.weight")
        }
        linears = {f"{module}.weight": module for module in self.skeleton.linears}
        return [
            self._linear(stored, linears[name]) if name in linears else self._other(stored)
            for name, stored in self.checkpoint.tensors.items()
            if name not in beside_codes
        ]

    def _other(self, stored: StoredTensor) -> TensorPlan:
        cast = stored.dtype in FLOATS and stored.dtype != self.dtype
        output = OutputTensor(stored.name, self.dtype if cast else stored.dtype, stored.shape)
        return TensorPlan(stored, Action.CAST if cast else Action.COPY, (output,), stored.shape)

    def _linear(self, stored: StoredTensor, module: str) -> TensorPlan:
        shape = self.skeleton.linears[module]
        packed = is_packed(self.checkpoint, stored.name)
        nf4 = packed or (self.options.quantization is Quantization.NF4 and not self.skeleton.prequantized)
        to_codes = nf4 and self.options.format is Format.NF4
        outputs: tuple[OutputTensor, ...] = (OutputTensor(stored.name, self.dtype, shape),)
        if to_codes:
            outputs = output_tensors(stored.name, shape)
        if module in self.targets:
            action = Action.MERGE
        elif to_codes and packed:
            kept = (stored, *packed_parts(self.checkpoint, stored.name))
            action, outputs = Action.COPY, tuple(OutputTensor(t.name, t.dtype, t.shape) for t in kept)
        elif to_codes:
            action = Action.QUANTIZE
        elif nf4 and self.options.onto is Onto.DEQUANTIZED:
            action = Action.DEQUANTIZE
        else:
            action = Action.COPY if stored.dtype == self.dtype else Action.CAST
        return TensorPlan(stored, action, outputs, shape, module, nf4)


def _plan_shards(tensors: list[TensorPlan], limit: int) -> tuple[ShardPlan, ...]:
    """Fill shards in the base's order, so that it is read once from front to back."""
    groups: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1:
        return (ShardPlan("model.safetensors", tuple(groups[0])),)
    count = len(groups)
    return tuple(
        ShardPlan(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    )


def _listed(faults: list[str]) -> str:
    shown = "; ".join(faults[:_MAX_LISTED])
    return shown if len(faults) <= _MAX_LISTED else f"{shown}; and {len(faults) - _MAX_LISTED} more"


def free_bytes(path: Path) -> int:
    """Free disk space where `path` lies or will lie."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
