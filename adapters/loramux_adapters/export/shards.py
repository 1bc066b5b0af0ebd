"""Writing one shard: header first, tensors streamed behind it, visible under its name only when complete.

Promises: a file under a shard's final name is whole and durable; its sha256 is that of the bytes written.
OSError is the caller's to explain.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch

from loramux_adapters.errors import ExportError
from loramux_adapters.export.checkpoint import INDEX_FILE, write_json
from loramux_adapters.export.journal import FinishedShard
from loramux_adapters.export.memory import Trimmer
from loramux_adapters.export.merge import TensorMerger, TensorOutcome
from loramux_adapters.export.plan import ExportPlan, ShardPlan
from loramux_adapters.files import fsync_directory, replace_file
from loramux_adapters.nf4 import tensor_bytes
from loramux_adapters.safetensors_header import encode_header

TEMPORARY = ".tmp"

Written = Callable[[int], None]


def write_shard(directory: Path, shard: ShardPlan, merger: TensorMerger, written: Written) -> FinishedShard:
    """Merge the shard's tensors into `directory`; `written` hears of every piece's size."""
    path = directory / shard.name
    temporary = directory / (shard.name + TEMPORARY)
    digest = hashlib.sha256()
    outcomes: list[TensorOutcome] = []
    trimmer = Trimmer()
    header = encode_header(
        ((output.name, output.dtype, output.shape) for tensor in shard.tensors for output in tensor.outputs),
        {"format": "pt"},
    )
    with open(temporary, "wb") as file:

        def sink(piece: torch.Tensor) -> None:
            data = tensor_bytes(piece)
            digest.update(data)
            file.write(data)
            written(len(data))

        digest.update(header)
        file.write(header)
        for tensor in shard.tensors:
            outcome = merger.apply(tensor, sink)
            _check(outcome)
            outcomes.append(outcome)
            trimmer.freed(tensor.num_bytes)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    temporary.replace(path)
    fsync_directory(directory)
    return FinishedShard(shard.name, size, digest.hexdigest(), tuple(outcomes))


def write_index(directory: Path, plan: ExportPlan) -> None:
    """The weight map, for a checkpoint of more than one shard."""
    if len(plan.shards) == 1:
        return
    weight_map = {
        output.name: shard.name
        for shard in plan.shards
        for tensor in shard.tensors
        for output in tensor.outputs
    }
    index = {
        "metadata": {"total_size": plan.total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    replace_file(directory / INDEX_FILE, [write_json(index)])


def _check(outcome: TensorOutcome) -> None:
    if not outcome.finite:
        raise ExportError(
            f"{outcome.name} would hold values that are NaN or infinite; with --format fp16 choose bf16, "
            "otherwise the "
            "base or the adapter is damaged",
            param="format",
            code="export_not_proven",
        )
    if outcome.changed == 0 and outcome.relative_delta:
        raise ExportError(
            f"the adapter's change to {outcome.name} is lost in rounding; export with --format fp32",
            param="format",
            code="export_not_proven",
        )
