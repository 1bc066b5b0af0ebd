"""Mutations of what an adapter comes in: the members of an archive, and the archive's bytes."""

from __future__ import annotations

import gzip
import struct
import tarfile

import zstandard

from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from tests.fuzz.content import SIZES
from tests.fuzz.files import BIG, damaged
from tests.fuzz.uploads import TRAP, Draft, Member, pack

NAMES = (
    "../evil",
    f"{TRAP}/evil",
    "a/../../evil",
    "..",
    ".",
    "",
    "/",
    "a//b",
    "C:/evil",
    "..\\evil",
    "a\\b",
    "x\0y",
    "new\nline",
    CONFIG_FILE,
    WEIGHTS_FILE,
    f"./{CONFIG_FILE}",
    f"other/{WEIGHTS_FILE}",
    f"a/b/{CONFIG_FILE}",
    f"{CONFIG_FILE}/",
    CONFIG_FILE.upper(),
    f"{CONFIG_FILE} ",
    f"{CONFIG_FILE}\0.txt",
    f"._{CONFIG_FILE}",
    "README.md",
    "readme.md",
    "adapter_model.bin",
    "training_args.bin",
    "tokenizer.json",
    "ad\u0430pter_config.json",
    "x" * 300,
    "y/" * 200,
)
KINDS = (
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
    tarfile.DIRTYPE,
    tarfile.CONTTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.GNUTYPE_SPARSE,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    b"?",
)


# --- the archive -----------------------------------------------------------------------------------------------------


def _member(draft: Draft) -> Member:
    return draft.random.choice(draft.members) if draft.members else Member("none", b"")


def rename_member(draft: Draft) -> None:
    _member(draft).name = draft.random.choice(NAMES)


def add_member(draft: Draft) -> None:
    name = draft.random.choice((*NAMES, "README.md"))
    data = draft.random.choice((b"", b"{}", bytes(BIG), draft.files.get(WEIGHTS_FILE, b"")))
    draft.members.insert(draft.random.randrange(len(draft.members) + 1), Member(name, data))


def relink_member(draft: Draft) -> None:
    member = _member(draft)
    member.kind = draft.random.choice(KINDS)
    member.target = draft.random.choice(("/etc/passwd", f"{TRAP}/x", WEIGHTS_FILE, "..", ""))


def extend_member(draft: Draft) -> None:
    key = draft.random.choice(
        ("path", "linkpath", "size", "mtime", "comment", "GNU.sparse.realsize", "uid", "x")
    )
    _member(draft).pax = {
        key: draft.random.choice(("1", "-1", "1.5", "x" * 70_000, "../evil", f"{TRAP}/evil"))
    }


def swap_contents(draft: Draft) -> None:
    a, b = _member(draft), _member(draft)
    a.data, b.data = b.data, a.data


def many_members(draft: Draft) -> None:
    draft.members += [Member(f"m{index}", b"") for index in range(draft.random.choice((5, 20, 300)))]


def shuffle_members(draft: Draft) -> None:
    draft.random.shuffle(draft.members)


# --- its bytes -------------------------------------------------------------------------------------------------------


def damage_archive(draft: Draft) -> None:
    draft.archive = damaged(draft.random, draft.archive)


def edit_number(draft: Draft) -> None:
    """A 16 or 32 bit number somewhere in the records of a zip, or a field of a tar header with its checksum made right."""
    data = bytearray(draft.archive)
    random = draft.random
    if data[257:262] == b"ustar":
        start, size = random.choice(
            ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155))
        )
        values = (
            b"\x80" + bytes(max(0, size - 2)) + b"\x01",
            b"\xff" * size,
            b"7" * size,
            bytes(size),
            random.randbytes(size),
        )
        data[start : start + size] = random.choice(values)[:size]
        data[148:156] = b"%06o\0 " % sum(data[:148] + b" " * 8 + data[156:512])
    elif data:
        marks = [at for mark in (b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04") if (at := data.find(mark)) >= 0]
        at = random.choice(marks or [0]) + random.randrange(4, 42)
        data[at : at + 4] = struct.pack("<I", random.choice(SIZES) % 2**32)[: random.choice((2, 4))]
    draft.archive = bytes(data)


def wrap_archive(draft: Draft) -> None:
    """Another compression, twice compressed, two streams, or two archives in a row."""
    data = draft.archive
    draft.archive = draft.random.choice(
        (
            gzip.compress(data, 1, mtime=0),
            zstandard.compress(data, 1),
            gzip.compress(bytes(BIG), 1, mtime=0) + data,
            zstandard.ZstdCompressor(level=1, write_content_size=False).compress(data),
            data + data,
            gzip.compress(pack("tar", draft.members)[:1024], 1, mtime=0)
            + gzip.compress(pack("tar", draft.members)[1024:], 1, mtime=0),
            data + pack("zip", draft.members),
            pack("tar", draft.members) + data,
            b"\x28\xb5\x2f\xfd" + bytes([0, 0xB8]) + data,
        )
    )
