"""The header parser against the safetensors library: what we write it reads, what we accept it accepts."""

from __future__ import annotations

import io
import json

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from loramux_adapters.safetensors_header import (
    ALIGNMENT,
    ITEM_BYTES,
    MalformedHeader,
    encode_header,
    parse_header,
    read_header,
    strict_json,
)

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.arange(4, dtype=torch.int16), "c": torch.tensor(1.5)}


def parse(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    entries = read_header(
        io.BytesIO(data), label="file", file_size=len(data), max_header_bytes=4096, max_tensors=64
    )
    return {entry.name: (entry.dtype, entry.shape, data[entry.start : entry.stop]) for entry in entries}


def test_reads_what_the_library_writes() -> None:
    found = parse(save(TENSORS, {"format": "pt"}))
    assert {name: (dtype, shape) for name, (dtype, shape, _) in found.items()} == {
        "a": ("I16", (4,)),
        "b": ("F32", (2, 3)),
        "c": ("F32", ()),
    }
    assert all(found[name][2] == tensor.numpy().tobytes() for name, tensor in TENSORS.items())


def test_the_library_reads_what_we_write() -> None:
    header = encode_header([("b", "F32", (2, 3)), ("c", "F32", ()), ("a", "I16", (4,))], {"format": "pt"})
    assert len(header) % ALIGNMENT == 0
    loaded = load(header + b"".join(TENSORS[name].numpy().tobytes() for name in "bca"))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"x": {"a": 1, "a": 2}}', "[NaN]", "[-Infinity]", "[" * 9999]
)
def test_strict_json_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"duplicate name|is not JSON|nested too deeply"):
        strict_json(text.encode())


def test_a_file_that_ends_inside_its_header() -> None:
    data = save(TENSORS)
    with pytest.raises(MalformedHeader, match="became shorter while it was read"):
        read_header(
            io.BytesIO(data[:20]), label="file", file_size=len(data), max_header_bytes=4096, max_tensors=64
        )


small = st.integers(0, 70)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_BYTES, "X"]),
        "shape": st.lists(st.integers(-1, 9), max_size=3),
        "data_offsets": st.lists(small, min_size=2, max_size=2),
    }
)


@settings(max_examples=500)
@given(st.dictionaries(st.text(max_size=3), entries, max_size=3), small)
def test_never_accepts_what_the_library_refuses(header: dict[str, object], data_bytes: int) -> None:
    raw = json.dumps(header).encode()
    data = len(raw).to_bytes(8, "little") + raw + bytes(data_bytes)
    try:
        found = parse_header(raw, label="file", file_size=len(data), max_tensors=64)
    except MalformedHeader as error:
        assert error.faults
        return
    library = safetensors.deserialize(data)
    assert {entry.name: (entry.dtype, list(entry.shape)) for entry in found} == {
        name: (fields["dtype"], fields["shape"]) for name, fields in library
    }


@settings(max_examples=300)
@given(st.data())
def test_accepts_every_layout_that_is_whole(data: st.DataObject) -> None:
    shapes = data.draw(
        st.lists(
            st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 4), max_size=3)),
            max_size=5,
        )
    )
    tensors = [(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(shapes)]
    header = encode_header(tensors, {})
    size = sum(torch.Size(shape).numel() * ITEM_BYTES[dtype] for _, dtype, shape in tensors)
    found = parse(header + bytes(size))
    assert {name: (dtype, shape) for name, (dtype, shape, _) in found.items()} == {
        name: (dtype, shape) for name, dtype, shape in tensors
    }
