"""The header of a safetensors file, parsed under limits and to the letter, and written.

Stricter than the safetensors library where a difference between two readers could hide something: duplicate
names and unknown fields are refused, and the header's size is bounded BEFORE it is read or parsed. Promises
that the tensors of an accepted header cover the file exactly, without hole or overlap, and that the size of
each is its shape times its dtype. Does not look at what names mean, nor at values. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from loramux_adapters.config_fields import shown
from loramux_adapters.errors import Fault
from loramux_adapters.files import read_into

PREFIX_BYTES = 8  # little-endian length of the JSON that follows
ALIGNMENT = 8
MAX_DIMENSIONS = 8
MAX_DIMENSION = 2**48
ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    stop: int


class MalformedHeader(ValueError):
    """The file is not a safetensors file we read; `faults` says everything that is wrong with it."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(str(fault) for fault in self.faults))


def read_header(
    file: BinaryIO, *, label: str, file_size: int, max_header_bytes: int, max_tensors: int
) -> tuple[TensorEntry, ...]:
    """The tensors in file order. `label` is what messages call the file. Raises MalformedHeader."""
    prefix = bytearray(PREFIX_BYTES)
    if read_into(file, memoryview(prefix)) < PREFIX_BYTES:
        _refuse(label, f"{file_size} bytes are too short for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > max_header_bytes:
        _refuse(label, f"the header claims {length} bytes, at most {max_header_bytes} are read")
    if PREFIX_BYTES + length > file_size:
        _refuse(label, f"the header claims {length} bytes, but the file has {file_size} in all")
    raw = bytearray(length)
    if read_into(file, memoryview(raw)) < length:
        _refuse(label, "the file became shorter while it was read")
    return parse_header(bytes(raw), label=label, file_size=file_size, max_tensors=max_tensors)


def parse_header(raw: bytes, *, label: str, file_size: int, max_tensors: int) -> tuple[TensorEntry, ...]:
    try:
        header = strict_json(raw) if raw.startswith(b"{") else None
    except ValueError as error:
        _refuse(label, f"the header is not valid JSON: {error}")
    if not isinstance(header, dict):
        _refuse(label, "the header is not a JSON object")
    faults: list[Fault] = []
    _check_metadata(header.pop("__metadata__", {}), label, faults)
    if len(header) > max_tensors:
        _refuse(label, f"{len(header)} tensors are more than the {max_tensors} allowed")
    data_start = PREFIX_BYTES + len(raw)
    entries = []
    for name, fields in header.items():
        problem, entry = _entry(name, fields, data_start)
        if entry is not None:
            entries.append(entry)
        else:
            faults.append(Fault(shown(name), problem))
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    if not faults:
        faults.extend(_layout_faults(entries, data_start, file_size, label))
    if faults:
        raise MalformedHeader(faults)
    return tuple(entries)


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and header for tensors (name, dtype, shape) stored back to back in the order given."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        stop = offset + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    raw = json.dumps(header, separators=(",", ":")).encode("ascii")
    raw += b" " * (-len(raw) % ALIGNMENT)
    return len(raw).to_bytes(PREFIX_BYTES, "little") + raw


def strict_json(raw: bytes) -> object:
    """JSON to the letter: UTF-8, no NaN, no duplicate names, no absurd nesting, no -0. Raises ValueError."""
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_object,
            parse_constant=_refuse_constant,
            parse_int=_whole_number,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate name {shown(next(name for name in names if names.count(name) > 1))}")
    return value


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _whole_number(text: str) -> int:
    if text == "-0":  # zero here, a float to other readers
        raise ValueError("-0 is not a whole number")
    return int(text)


def _refuse(label: str, problem: str) -> NoReturn:
    raise MalformedHeader([Fault(label, problem)])


def _check_metadata(metadata: object, label: str, faults: list[Fault]) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        faults.append(Fault(label, "__metadata__ must map text to text"))


def _entry(name: str, fields: object, data_start: int) -> tuple[str, TensorEntry | None]:
    """The tensor, or a sentence about why there is none."""
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        return f"must have exactly dtype, shape and data_offsets, not {shown(fields)}", None
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"unknown dtype {shown(dtype)}", None
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        return f"shape must be at most {MAX_DIMENSIONS} sizes, not {shown(shape)}", None
    if not _are_sizes(offsets) or len(offsets) != 2:
        return f"data_offsets must be two sizes, not {shown(offsets)}", None
    start, stop = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if stop - start != expected:
        return (
            f"{dtype} {list(shape)} takes {expected} bytes, data_offsets {offsets} give {stop - start}",
            None,
        )
    return "", TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + stop)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_DIMENSION for item in value)


def _layout_faults(
    entries: list[TensorEntry], data_start: int, file_size: int, label: str
) -> Iterable[Fault]:
    offset = data_start
    for entry in entries:
        if entry.start != offset:
            kind = "overlaps the tensor before it" if entry.start < offset else "leaves a hole before it"
            yield Fault(shown(entry.name), f"{kind} in the file")
        offset = entry.stop
    if offset != file_size:
        yield Fault(label, f"the tensors end at byte {offset}, but the file has {file_size} bytes")
