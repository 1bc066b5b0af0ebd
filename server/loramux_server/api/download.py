"""An adapter's two files as a .tar.gz, made while it is sent: no weights are buffered and nothing is written.

Of one that was trained here the trainer's manifest lies beside them. What is sent can be uploaded again.
"""

from __future__ import annotations

import asyncio
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loramux_adapters.adapter_files import ADAPTER_FILES
from loramux_adapters.files import CHUNK, open_regular
from loramux_adapters.registry import Lease
from loramux_adapters.training.layout import MANIFEST_FILE


class AdapterDownload(Response):
    """Holds the lease until the last byte is sent or the client has left."""

    media_type = "application/gzip"

    def __init__(self, lease: Lease, directory: Path, trained: bytes | None) -> None:
        record = lease.record
        folder = re.sub(r"[^A-Za-z0-9._-]", "-", record.name)[:64]
        file_name = f"{folder}-{record.generation[:12]}.tar.gz"
        super().__init__(
            headers={
                "content-disposition": f'attachment; filename="{file_name}"',
                "x-adapter-generation": record.generation,
            },
        )
        del self.headers["content-length"]
        self._lease = lease
        self._chunks = packed(directory, folder, {} if trained is None else {MANIFEST_FILE: trained})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._lease:
            start = {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
            await send(start)
            while (chunk := await asyncio.to_thread(next, self._chunks, None)) is not None:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def packed(directory: Path, folder: str, beside: Mapping[str, bytes]) -> Iterator[bytes]:
    """The archive in pieces; equal files give equal bytes. Weights hardly compress, so little is tried."""
    gzip = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    for name in ADAPTER_FILES:
        with open_regular(directory / name) as file:
            size = os.fstat(file.fileno()).st_size
            yield gzip.compress(_header(folder, name, size))
            while data := file.read(CHUNK):
                yield gzip.compress(data)
            yield gzip.compress(_padding(size))
    for name, data in beside.items():
        yield gzip.compress(_header(folder, name, len(data)) + data + _padding(len(data)))
    yield gzip.compress(bytes(2 * tarfile.BLOCKSIZE)) + gzip.flush()


def _header(folder: str, name: str, size: int) -> bytes:
    info = tarfile.TarInfo(f"{folder}/{name}")
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
