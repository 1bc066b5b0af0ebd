"""A base checkpoint on disk: safetensors headers first, tensor bytes when asked.

Promises: opening reads headers only, and finds every fault of the files (missing or truncated shards, tensors
the index promises and no shard holds) before any weight is read; data is read, not mapped, so that memory use
is what is held and a file that shrinks is an error, not a crash. Does not know what the tensors mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loramux_adapters.errors import BaseModelError
from loramux_adapters.files import open_regular, read_into
from loramux_adapters.nf4 import tensor_bytes
from loramux_adapters.safetensors_header import (
    ITEM_BYTES,
    MalformedHeader,
    TensorEntry,
    read_header,
    strict_json,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHUNK_BYTES = 16 * 2**20

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
FLOATS = frozenset({"F16", "BF16", "F32"})

_MAX_HEADER_BYTES = 100 * 2**20
_MAX_TENSORS = 10**6


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies. Offsets are from the beginning of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model directory, in the order in which they lie on disk."""

    directory: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Raises BaseModelError with one sentence naming every file at fault."""
        files, promised = _files(directory)
        missing = [name for name in files if not (directory / name).is_file()]
        if missing:
            raise BaseModelError(
                f"the base lacks {len(missing)} of its {len(files)} weight files: {_listed(missing)}; "
                "download it "
                "again",
                param="model",
            )
        faults: list[str] = []
        tensors: dict[str, StoredTensor] = {}
        for name in files:
            try:
                entries = _read_entries(directory / name)
            except (MalformedHeader, OSError) as error:
                faults.append(str(error) if isinstance(error, MalformedHeader) else f"{name}: {error}")
                continue
            for entry in entries:
                if entry.name in tensors:
                    faults.append(f"{entry.name} is in {tensors[entry.name].file.name} and in {name}")
                tensors[entry.name] = StoredTensor(
                    entry.name, entry.dtype, entry.shape, directory / name, entry.start, entry.stop
                )
        faults += [f"{name}: promised by {INDEX_FILE}" for name in promised if name not in tensors][:5]
        if faults:
            raise BaseModelError(f"the base cannot be read: {'; '.join(faults)}", param="model")
        return cls(directory, tensors)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in its stored dtype. Raises BaseModelError if the file changed underneath."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
        if stored.num_bytes:
            self._fill(stored, 0, tensor_bytes(tensor))
        return tensor

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor as flat pieces of at most CHUNK_BYTES, in its stored dtype; each is the caller's to
        keep.
        """
        stored = self.tensors[name]
        dtype = TORCH_DTYPES[stored.dtype]
        step = CHUNK_BYTES // ITEM_BYTES[stored.dtype]
        for first in range(0, stored.numel, step):
            piece = torch.empty(min(step, stored.numel - first), dtype=dtype)
            self._fill(stored, first * ITEM_BYTES[stored.dtype], tensor_bytes(piece))
            yield piece

    def _fill(self, stored: StoredTensor, offset: int, buffer: memoryview) -> None:
        try:
            with open_regular(stored.file) as file:
                file.seek(stored.start + offset)
                count = read_into(file, buffer)
        except OSError as error:
            raise BaseModelError(f"{stored.file.name} cannot be read: {error}", param="model") from error
        if count < len(buffer):
            raise BaseModelError(f"{stored.file.name} became shorter while it was read", param="model")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises BaseModelError if the file is missing or anything else."""
    try:
        value = strict_json(path.read_bytes())
    except OSError as error:
        raise BaseModelError(
            f"{path.parent.name} holds no readable {path.name}: {error.strerror}", param="model"
        ) from error
    except ValueError as error:
        raise BaseModelError(f"{path.name} is not valid JSON: {error}", param="model") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{path.name} is not a JSON object", param="model")
    return value


def write_json(value: object) -> bytes:
    """The one way this package formats JSON files: two spaces, the order given, a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _files(directory: Path) -> tuple[list[str], list[str]]:
    """The weight files, and the tensor names the index promises."""
    if (directory / INDEX_FILE).is_file():
        weight_map = read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BaseModelError(f"{INDEX_FILE} has no weight_map", param="model")
        names = sorted(set(map(str, weight_map.values())))
        strangers = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if strangers:
            raise BaseModelError(
                f"{INDEX_FILE} names {_listed(strangers)}, which is no weight file", param="model"
            )
        return names, list(weight_map)
    if (directory / SINGLE_FILE).is_file():
        return [SINGLE_FILE], []
    if not directory.is_dir():
        raise BaseModelError(f"there is no model directory {directory}", param="model")
    pickles = any(directory.glob("pytorch_model*.bin"))
    advice = ": pickles are never read, save the model as safetensors" if pickles else ""
    raise BaseModelError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}{advice}", param="model")


def _read_entries(path: Path) -> tuple[TensorEntry, ...]:
    with open_regular(path) as file:
        return read_header(
            file,
            label=path.name,
            file_size=path.stat().st_size,
            max_header_bytes=_MAX_HEADER_BYTES,
            max_tensors=_MAX_TENSORS,
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
