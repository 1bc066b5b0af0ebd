"""Mutations of the two files' bytes: the safetensors header, its length, the config's text, damage anywhere."""

from __future__ import annotations

import json
import pickle
from random import Random
from typing import Any

from loramux_adapters.adapter_files import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE
from tests.fuzz.content import SIZES, TEXTS, any_value
from tests.fuzz.uploads import TRAP, Draft

DTYPES = ("F32", "F16", "BF16", "F64", "I8", "U8", "BOOL", "I64", "F8_E4M3", "F4", "", "f32")
BIG = 400_000  # more than the fuzzer's limits let any file have


def edit_header(draft: Draft) -> None:
    """One field of the safetensors header; the data stays."""
    parsed, data = _header(draft)
    if parsed is None:
        return
    random = draft.random
    name = random.choice(sorted(parsed)) if parsed else ""
    entry = parsed.get(name)
    if (
        not isinstance(entry, dict)
        or not _is_list(entry.get("shape"))
        or not _is_list(entry.get("data_offsets"))
    ):
        parsed["__metadata__"] = any_value(random)
    else:
        _edit_entry(random, parsed, name, entry)
    text = json.dumps(parsed)
    draft.files[WEIGHTS_FILE] = _with_header(text.encode("utf-8", "surrogatepass"), data)


def _is_list(value: object) -> bool:
    """Of whole numbers, as it is until an earlier mutation made it something else."""
    return isinstance(value, list) and all(type(item) is int for item in value)


def _edit_entry(random: Random, parsed: dict[str, Any], name: str, entry: dict[str, Any]) -> None:
    other = parsed[random.choice(sorted(parsed))]
    match random.randrange(9):
        case 0:
            entry["dtype"] = random.choice((*DTYPES, None, ["F32"]))
        case 1:
            entry["shape"] = random.choice(
                (entry["shape"][::-1], [*entry["shape"], 1], [1] * 9, any_value(random))
            )
        case 2 if entry["shape"]:
            entry["shape"][random.randrange(len(entry["shape"]))] = random.choice(SIZES)
        case 3:
            entry["data_offsets"] = [random.choice(SIZES), random.choice(SIZES)]
        case 4:
            by = random.choice(SIZES)
            entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]
        case 5 if isinstance(other, dict) and "data_offsets" in other:
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        case 6:
            parsed[name] = any_value(random)
        case 7:
            entry[random.choice(("url", "extra", ""))] = any_value(random)
        case _:
            parsed[random.choice(TEXTS)] = parsed.pop(name)


def retype_header(draft: Draft) -> None:
    """The header's text: names that are there twice, spaces, other encodings, endless nesting."""
    parsed, data = _header(draft)
    if parsed is None:
        return
    raw = json.dumps(parsed).encode()
    raw = draft.random.choice(
        (
            raw + b" " * 9,
            b" " + raw,
            raw + b"{}",
            raw[:-1],
            b'{"x":1,"x":2,' + raw[1:],
            raw.replace(b'"dtype"', b'"dtype":1,"dtype"'),
            b"[" * 30_000,
            b"{" + b" " * 70_000 + raw[1:],
            raw.replace(b":", b": ", 3),
            raw.decode().encode("utf-16"),
            b"\xef\xbb\xbf" + raw,
            raw.replace(b"[", b"[1e0,", 1),
            raw.replace(b"0", b"00", 1),
            raw.replace(b"0", b"-0", 1),
            raw.replace(b"}", b',"a":NaN}', 1),
        )
    )
    draft.files[WEIGHTS_FILE] = _with_header(raw, data)


def set_length(draft: Draft) -> None:
    """The eight bytes that say how long the header is."""
    size = draft.random.choice(SIZES) % 2**64
    draft.files[WEIGHTS_FILE] = size.to_bytes(8, "little") + draft.files.get(WEIGHTS_FILE, b"")[8:]


def retype_config(draft: Draft) -> None:
    raw = draft.files.get(CONFIG_FILE, b"")
    draft.files[CONFIG_FILE] = draft.random.choice(
        (
            b"",
            b"null",
            b"[]",
            raw + raw,
            raw[:-1],
            b'{"r":4,' + raw[1:],
            b"\xef\xbb\xbf" + raw,
            raw.decode("utf-8", "replace").encode("utf-16"),
            b"[" * 40_000,
            b'{"a":' * 9_000,
            raw.replace(b": ", b":NaN,", 1),
            raw.replace(b'"r"', b'"\\u0072"', 1),
            b" " * 70_000 + raw,
            raw.replace(b"8", b"[" * 900 + b"]" * 900, 1),
            raw.replace(b"null", b"[" * 980 + b"]" * 980, 1),
            raw.replace(b"8", b"9" * 5000, 1),
            raw.replace(b"8", b"1e999", 1),
            raw.replace(b"8", b"8.0", 1),
            raw.replace(b"{", b"{ \n", 1),
        )
    )


def drop_file(draft: Draft) -> None:
    draft.files.pop(draft.random.choice(ADAPTER_FILES), None)


def other_format(draft: Draft) -> None:
    """Weights in a format that is not safetensors, or files in each other's place."""
    weights = draft.files.get(WEIGHTS_FILE, b"")
    draft.files[WEIGHTS_FILE] = draft.random.choice(
        (
            pickle.dumps({"a": Trap()}),
            b"PK\x03\x04" + weights,
            b"GGUF" + weights,
            draft.files.get(CONFIG_FILE, b""),
            bytes(BIG),
        )
    )


class Trap:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (f"{TRAP}/unpickled", "w")


def damage_file(draft: Draft) -> None:
    name = draft.random.choice(ADAPTER_FILES)
    draft.files[name] = damaged(draft.random, draft.files.get(name, b""))


def _header(draft: Draft) -> tuple[dict[str, Any] | None, bytes]:
    """The parsed header and the data behind it; None if an earlier mutation left nothing to parse."""
    raw = draft.files.get(WEIGHTS_FILE, b"")
    length = int.from_bytes(raw[:8], "little")
    try:
        parsed = json.loads(raw[8 : 8 + length]) if length < len(raw) else None
    except (ValueError, RecursionError):
        parsed = None
    return (parsed if isinstance(parsed, dict) else None), raw[8 + length :]


def _with_header(raw: bytes, data: bytes) -> bytes:
    return len(raw).to_bytes(8, "little") + raw + data


def damaged(random: Random, data: bytes) -> bytes:
    """Flipped bytes, a cut, a hole, noise, a piece twice, or more at the end."""
    if not data:
        return random.randbytes(random.randrange(64))
    at, size = random.randrange(len(data)), random.randrange(1, 64)
    match random.randrange(7):
        case 0 | 1:
            flipped = bytearray(data)
            for _ in range(random.randrange(1, 6)):
                flipped[random.randrange(len(data))] ^= random.randrange(1, 256)
            return bytes(flipped)
        case 2:
            return data[:at]
        case 3:
            return data[:at] + data[at + size :]
        case 4:
            return data[:at] + random.randbytes(size) + data[at:]
        case 5:
            return data[:at] + data[max(0, at - size) :]
        case _:
            return data + random.choice((b"\0", bytes(512), random.randbytes(size), data, bytes(BIG)))
