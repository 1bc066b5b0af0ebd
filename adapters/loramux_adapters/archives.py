"""Reads an adapter's two files out of a .zip, .tar, .tar.gz or .tar.zst that a stranger made.

Nothing is "extracted": members are listed, every name that does not belong is a fault, and the two files are
copied by streaming into a directory the caller made, each up to its limit. A README and what the trainer wrote may lie
beside them, and are passed over. Links, devices, folders beside one
common top folder, paths that climb, repeated names, encryption and bombs are refused. What the files hold is
the gate's question. No torch.
"""

from __future__ import annotations

import gzip
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import zstandard

from loramux_adapters.adapter_files import ADAPTER_FILES, PICKLE_ADVICE, PICKLE_SUFFIXES, GateLimits
from loramux_adapters.config_fields import shown
from loramux_adapters.errors import Fault, InvalidAdapter
from loramux_adapters.files import CHUNK, Readable, copy_bounded, open_regular
from loramux_adapters.training.layout import MANIFEST_FILE

README = "README.md"
MAX_MEMBERS = 16
MAX_README_BYTES = 1024 * 1024
MAX_BESIDE = {README: MAX_README_BYTES, MANIFEST_FILE: 8 * MAX_README_BYTES}  # a loss curve may be long
MAX_BESIDE_BYTES = sum(MAX_BESIDE.values())
MAX_PAX_BYTES = 64 * 1024
BLOCK = 512  # of a tar
MAX_ZSTD_WINDOW = 2**27

_ZIP_END = b"PK\x05\x06"
_ZIP64_LOCATOR = b"PK\x06\x07"
_ZIP_END_BYTES = 22
# What the readers raise over damaged input, zipfile's undocumented ones included.
_BROKEN = (
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    zstandard.ZstdError,
    tarfile.TarError,
)


def unpack(archive: Path, directory: Path, limits: GateLimits) -> None:
    """Copy the adapter's files into `directory`. Raises InvalidAdapter with every fault of the listing."""
    unpacker = _Unpacker(directory, limits)
    try:
        with open_regular(archive) as file:
            _dispatch(file, unpacker)
    except InvalidAdapter:
        raise
    except _BROKEN as error:
        unpacker.fault("archive", f"cannot be read to its end: {shown(str(error) or type(error).__name__)}")
    unpacker.finish()


def _dispatch(file: BinaryIO, unpacker: _Unpacker) -> None:
    """By content, not by name: a wrong suffix is no fault, and decides nothing."""
    magic = file.read(BLOCK)
    file.seek(0)
    if magic.startswith((b"PK\x03\x04", _ZIP_END)):
        _unpack_zip(file, unpacker)
    elif magic.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=file) as stream:
            _unpack_tar(_Budget(stream, unpacker), unpacker)
    elif magic.startswith(b"\x28\xb5\x2f\xfd"):
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
        with decompressor.stream_reader(file, read_across_frames=True, closefd=False) as stream:
            _unpack_tar(_Budget(stream, unpacker), unpacker)
    elif magic[257:262] == b"ustar":
        _unpack_tar(_Budget(file, unpacker), unpacker)
    else:
        unpacker.refuse("archive", "is not a .zip, .tar, .tar.gz or .tar.zst file")


class _Unpacker:
    """Decides over each member by its name, writes the two that count, and collects the faults."""

    def __init__(self, directory: Path, limits: GateLimits) -> None:
        self.directory = directory
        self.limits = limits
        self.faults: list[Fault] = []
        self._members = 0
        self._top: str | None = None
        self._seen: set[str] = set()

    def fault(self, where: str, problem: str) -> None:
        self.faults.append(Fault(where, problem))

    def refuse(self, where: str, problem: str) -> NoReturn:
        """A fault after which there is nothing more to learn."""
        self.fault(where, problem)
        raise InvalidAdapter(self.faults)

    def wanted(self, name: str, mode: int) -> str | None:
        """Which adapter file this member is, if any; `mode` is its stat file type (0: not said, a file)."""
        self._members += 1
        if self._members > MAX_MEMBERS:
            self.refuse("archive", f"has more than {MAX_MEMBERS} members")
        problem = self._problem(name, mode)
        base = name.rpartition("/")[2]
        if problem:
            self.fault(shown(name), problem)
        return base if not problem and base in ADAPTER_FILES else None

    def _problem(self, name: str, mode: int) -> str:
        parts = name.removeprefix("./").split("/")
        if mode == stat.S_IFDIR:
            parts = [part for part in parts if part]  # a folder may end in a slash
        if "\\" in name or "\0" in name or ":" in name or ".." in parts or "" in parts:
            return "is not a path inside the archive"
        if mode == stat.S_IFLNK:
            return "is a link"
        if mode == stat.S_IFDIR:
            if parts and parts[-1] in ADAPTER_FILES:
                return "is a folder, not a file"
            return "" if len(parts) <= 1 else "is a folder inside a folder"
        if mode not in (0, stat.S_IFREG):
            return "is not a regular file"
        return self._file_problem(parts)

    def _file_problem(self, parts: list[str]) -> str:
        *folders, base = parts
        top = "/".join(folders)
        if base not in (*ADAPTER_FILES, *MAX_BESIDE):
            advice = (
                PICKLE_ADVICE
                if base.endswith(PICKLE_SUFFIXES)
                else f"remove all but {', '.join(ADAPTER_FILES)}"
            )
            return f"does not belong in an adapter archive, {advice}"
        if len(folders) > 1 or (self._top is not None and top != self._top):
            return "does not lie beside the other files, at the top or in one common folder"
        if base in self._seen:
            return "is there twice"
        self._top = top
        self._seen.add(base)
        return ""

    def write(self, name: str, source: Readable) -> None:
        """Copy until the source ends; longer than allowed is a refusal, whatever sizes were declared."""
        limit = self.limits.max_bytes(name)
        if not copy_bounded(source, self.directory / name, limit):
            self.refuse(name, f"is larger than the {limit} bytes allowed")

    def finish(self) -> None:
        for name in ADAPTER_FILES:
            if name not in self._seen:
                self.fault(name, "is not in the archive")
        if self.faults:
            raise InvalidAdapter(self.faults)


def _unpack_zip(file: BinaryIO, unpacker: _Unpacker) -> None:
    _check_zip_end(file, unpacker)
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            folder = stat.S_IFDIR if info.orig_filename.endswith("/") else 0  # is_dir() needs a name
            name = unpacker.wanted(info.orig_filename, stat.S_IFMT(info.external_attr >> 16) or folder)
            if info.flag_bits & 0x1:
                unpacker.fault(shown(info.orig_filename), "is encrypted")
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                unpacker.fault(shown(info.orig_filename), "is compressed by another method than deflate")
            elif name is not None:
                with archive.open(info) as member:
                    unpacker.write(name, member)


def _check_zip_end(file: BinaryIO, unpacker: _Unpacker) -> None:
    """Bound the list of members before `zipfile` reads it whole: a small file can claim millions."""
    size = file.seek(0, 2)
    file.seek(max(0, size - _ZIP_END_BYTES - 0xFFFF - 20))
    tail = file.read(_ZIP_END_BYTES + 0xFFFF + 20)
    end = tail.rfind(_ZIP_END)
    if end < 0 or len(tail) - end < _ZIP_END_BYTES:
        unpacker.refuse("archive", "is a .zip without an end: it was cut short")
    if _ZIP64_LOCATOR in tail[max(0, end - 20) : end]:
        unpacker.refuse("archive", "is a zip64 file: use .tar.zst for adapters of this size")
    if int.from_bytes(tail[end + 12 : end + 16], "little") > MAX_PAX_BYTES:
        unpacker.refuse("archive", f"has more than {MAX_MEMBERS} members")
    file.seek(0)


class _Budget:
    """Counts decompressed bytes: a bomb ends here, whatever its headers say."""

    def __init__(self, stream: Readable, unpacker: _Unpacker) -> None:
        self._stream = stream
        self._unpacker = unpacker
        limits = unpacker.limits
        self._left = limits.max_file_bytes + limits.max_config_bytes + MAX_BESIDE_BYTES + CHUNK

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            self._unpacker.refuse("archive", "unpacks to more than an adapter may have")
        return data

    def exactly(self, size: int) -> bytes:
        """`size` bytes, which must be small."""
        data = bytearray()
        while len(data) < size:
            chunk = self.read(size - len(data))
            if not chunk:
                raise EOFError("it was cut short")
            data += chunk
        return bytes(data)


class _TarMember:
    """The content of one member, as a stream that ends where the member does."""

    def __init__(self, stream: _Budget, size: int) -> None:
        self._stream = stream
        self._left = size
        self._padding = -size % BLOCK

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(min(size, self._left))  # too little: the next header or padding is missing
        self._left -= len(data)
        return data

    def skip(self) -> None:
        while self.read(CHUNK):
            pass
        self._stream.exactly(self._padding)


_TAR_MODES = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.LNKTYPE: stat.S_IFLNK,
}


def _unpack_tar(stream: _Budget, unpacker: _Unpacker) -> None:
    """One pass over the blocks. Python's reader would buffer extended headers of any size; this does not."""
    for member in _tar_headers(stream, unpacker):
        content = _TarMember(stream, member.size)
        name = unpacker.wanted(member.name, _TAR_MODES.get(member.type, stat.S_IFCHR))
        beside = MAX_BESIDE.get(member.name.rpartition("/")[2], MAX_README_BYTES)
        if member.size > (unpacker.limits.max_bytes(name) if name else beside):
            unpacker.refuse(shown(member.name), f"{member.size} bytes are more than allowed")
        if name is not None:
            unpacker.write(name, content)
        content.skip()


def _tar_headers(stream: _Budget, unpacker: _Unpacker) -> Iterator[tarfile.TarInfo]:
    while any(block := stream.exactly(BLOCK)):
        member = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        if member.size < 0:
            unpacker.refuse(shown(member.name), "has a negative size")
        if member.type not in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            yield member
            continue
        if member.size > MAX_PAX_BYTES:
            unpacker.refuse("archive", "has an extended header that is too long")
        for key in _pax_keys(stream.exactly(member.size + -member.size % BLOCK)[: member.size]):
            if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse"):
                unpacker.refuse(
                    "archive", f"an extended header changes {shown(key.decode('ascii', 'replace'))}"
                )


def _pax_keys(payload: bytes) -> Iterator[bytes]:
    while payload:
        length, space, _ = payload.partition(b" ")
        if not space or not length.isdigit() or not len(length) + 3 <= int(length[:8]) <= len(payload):
            raise tarfile.HeaderError("an extended header is malformed")
        yield payload[len(length) + 1 : int(length)].partition(b"=")[0]
        payload = payload[int(length) :]
