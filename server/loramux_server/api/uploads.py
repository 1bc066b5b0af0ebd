"""A multipart/form-data upload, streamed to disk: parts are named, bounded, and never held in memory.

Promises: only the parts that a `Form` calls files become files, in a fresh directory below the staging folder that is gone
when the block is left, whatever happened; fields are short texts; a part too many, unknown, repeated or too large is a 4xx
that names it. What the files hold is for others to ask. Parsing and writing run on a thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from loramux_adapters.adapter_files import ADAPTER_FILES, GateLimits
from loramux_adapters.archives import MAX_BESIDE_BYTES
from loramux_adapters.errors import RequestError
from loramux_adapters.files import storage_error
from loramux_adapters.sources import new_staging_directory
from loramux_server.api.body import BodyTooLarge, UnsupportedMediaType
from loramux_server.api.pace import IDLE_S, paced

ARCHIVE = "archive"
FILES = (*ADAPTER_FILES, ARCHIVE)
FIELDS = (
    "name",
    "description",
    "metadata",
    "default_sampling",
    "pinned",
    "overwrite",
    "verify",
    "allow_noop",
)
MAX_FIELD_BYTES = 64 * 1024
MAX_FRAMING_BYTES = 256 * 1024  # boundaries and headers of all parts

_BATCH = 1024 * 1024  # parsed and written at once, on one visit to a thread


class CrossOrigin(RequestError):
    code = "cross_origin"


@dataclass(frozen=True)
class Form:
    """What an upload may have: `files` with the largest size of each, and texts."""

    files: Mapping[str, int]
    fields: tuple[str, ...]
    max_bytes: int  # of the whole body


@dataclass(frozen=True)
class Upload:
    """What came: `directory` holds `files` by their parts' names, with what the sender calls them; `digest` stands for
    all of it."""

    directory: Path
    fields: dict[str, str]
    files: Mapping[str, str]
    digest: str


def receive_upload(
    request: Request, staging: Path, limits: GateLimits, *, idle_s: float = IDLE_S
) -> AbstractAsyncContextManager[Upload]:
    """Read an adapter."""
    archive = limits.max_file_bytes + limits.max_config_bytes + MAX_BESIDE_BYTES
    files = {name: limits.max_bytes(name) for name in ADAPTER_FILES} | {ARCHIVE: archive}
    return receive_form(request, staging, Form(files, FIELDS, max_body_bytes(limits)), idle_s=idle_s)


@asynccontextmanager
async def receive_form(
    request: Request, staging: Path, form: Form, *, idle_s: float = IDLE_S
) -> AsyncIterator[Upload]:
    """Read the whole body. Raises RequestError or StorageError; the files are removed when the block is left."""
    total = form.max_bytes
    boundary = _check_headers(request, total)
    try:
        directory = await asyncio.to_thread(new_staging_directory, staging)
    except OSError as error:
        raise storage_error("the upload cannot be stored", error) from error
    parts: _Parts | None = None
    try:
        parts = _Parts(boundary, directory, form)
        batch = bytearray()
        received = 0
        async for chunk in paced(request.stream(), idle_s):
            received += len(chunk)
            if received > total:
                raise BodyTooLarge(f"the upload is larger than {total} bytes")
            batch += chunk
            if len(batch) >= _BATCH:
                await asyncio.to_thread(parts.write, bytes(batch))
                batch.clear()
        yield await asyncio.to_thread(parts.finish, bytes(batch))
    finally:
        if parts is not None:
            parts.close()
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


def max_body_bytes(limits: GateLimits) -> int:
    """No upload that could be accepted is longer."""
    files = limits.max_file_bytes + limits.max_config_bytes + MAX_BESIDE_BYTES
    return files + len(FIELDS) * MAX_FIELD_BYTES + MAX_FRAMING_BYTES


def is_multipart(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


def _check_headers(request: Request, limit: int) -> bytes:
    """The boundary. A form of another site's page can be sent without asking the browser's user: refused."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise CrossOrigin("uploads from another site's pages are not accepted")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("compressed request bodies are not accepted; send an archive instead")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise BodyTooLarge(f"the upload is larger than {limit} bytes")
    _, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise _malformed("the Content-Type has no boundary")
    return boundary


@dataclass
class _Part:
    """The part being read: its headers, then either a file or a text."""

    header: bytearray = field(default_factory=bytearray)
    disposition: bytes = b""
    header_name: bytearray = field(default_factory=bytearray)
    name: str = ""
    filename: str = ""
    text: bytearray = field(default_factory=bytearray)
    file: BinaryIO | None = None
    size: int = 0


class _Parts:
    """The parser's callbacks. One thread at a time."""

    def __init__(self, boundary: bytes, directory: Path, form: Form) -> None:
        self._directory = directory
        self._form = form
        self._part = _Part()
        self._fields: dict[str, str] = {}
        self._digests: dict[str, str] = {}  # of the files, by part name
        self._filenames: dict[str, str] = {}
        self._hash = hashlib.sha256()
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_begin": self._header_begin,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._data,
                    "on_part_end": self._end,
                    "on_end": self._all_ended,
                },
            )
        except FormParserError as error:
            raise _malformed("the boundary is too long") from error

    def write(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed("it is not multipart/form-data as RFC 7578 has it") from error

    def finish(self, rest: bytes) -> Upload:
        self.write(rest)
        if not self._ended:
            raise _malformed("it was cut short")
        digest = hashlib.sha256(repr((sorted(self._fields.items()), sorted(self._digests.items()))).encode())
        return Upload(self._directory, self._fields, self._filenames, digest.hexdigest())

    def close(self) -> None:
        if self._part.file is not None:
            self._part.file.close()

    # --- called by the parser --------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._part = _Part()

    def _header_begin(self) -> None:
        self._part.header_name.clear()
        self._part.header.clear()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._part.header_name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._part.header += data[start:end]

    def _header_end(self) -> None:
        if self._part.header_name.lower() == b"content-disposition":
            self._part.disposition = bytes(self._part.header)

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._part.disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or name not in (*self._form.files, *self._form.fields):
            known = ", ".join((*self._form.files, *self._form.fields))
            raise RequestError(f"{name[:64]!a} is no part of an upload; these are: {known}", param=name[:64])
        if name in self._fields or name in self._digests:
            raise RequestError(f"{name}: is there twice", param=name)
        self._part.name = name
        if name in self._form.files:
            self._part.filename = options.get(b"filename", b"").decode("utf-8", "replace")
            self._hash = hashlib.sha256()
            try:
                self._part.file = open(self._directory / name, "xb", buffering=0)  # noqa: SIM115 (in _end, close)
            except OSError as error:
                raise storage_error("the upload cannot be stored", error) from error

    def _data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        part.size += end - start
        limit = self._form.files.get(part.name, MAX_FIELD_BYTES)
        if part.size > limit:
            raise BodyTooLarge(f"{part.name}: is larger than the {limit} bytes allowed", param=part.name)
        rest = memoryview(data)[start:end]
        if part.file is None:
            part.text += rest
            return
        self._hash.update(rest)
        try:
            while rest:
                rest = rest[part.file.write(rest) :]
        except OSError as error:
            raise storage_error("the upload cannot be stored", error) from error

    def _end(self) -> None:
        part = self._part
        if part.file is not None:
            part.file.close()
            self._digests[part.name] = self._hash.hexdigest()
            self._filenames[part.name] = part.filename
            return
        try:
            self._fields[part.name] = part.text.decode("utf-8")
        except UnicodeDecodeError:
            raise RequestError(f"{part.name}: is not valid UTF-8", param=part.name) from None

    def _all_ended(self) -> None:
        self._ended = True


def _malformed(reason: str) -> RequestError:
    return RequestError(f"the upload cannot be read: {reason}", code="invalid_multipart")
