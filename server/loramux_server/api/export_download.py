"""A finished export as an uncompressed tar, made while it is sent: one piece in memory, nothing written.

The size is known before the first byte, so a client sees whether it got everything. Reading stops when the client leaves,
and the files stay until then, also if the export is deleted meanwhile.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loramux_adapters.files import CHUNK, open_regular
from loramux_server.api.stream import send_pieces, unless_disconnected
from loramux_server.exports.jobs import ExportJob

_END = bytes(2 * tarfile.BLOCKSIZE)


class ExportDownload(Response):
    """Keeps `held` until the last byte is sent or the client has left."""

    media_type = "application/x-tar"

    def __init__(self, job: ExportJob, files: Sequence[Path], held: AbstractContextManager[object]) -> None:
        folder = re.sub(r"[^A-Za-z0-9._-]", "-", f"{job.adapter}-{job.request.format}")[:80]
        self._members = [(path, _header(folder, path)) for path in files]
        size = sum(len(header) + _padded(path.stat().st_size) for path, header in self._members) + len(_END)
        super().__init__(
            headers={"content-disposition": f'attachment; filename="{folder}.tar"'},
        )
        self.headers["content-length"] = str(size)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            start = {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
            await send(start)
            with closing(self._pieces()) as pieces:
                await unless_disconnected(receive, send_pieces(pieces, send))

    def _pieces(self) -> Generator[bytes, None, None]:
        for path, header in self._members:
            yield header
            with open_regular(path) as file:
                while data := file.read(CHUNK):
                    yield data
                yield bytes(-os.fstat(file.fileno()).st_size % tarfile.BLOCKSIZE)
        yield _END


def _header(folder: str, path: Path) -> bytes:
    """PAX, because a shard may be larger than the 8 GiB that the older format can say. Equal files, equal bytes."""
    info = tarfile.TarInfo(f"{folder}/{path.name}")
    info.size = path.stat().st_size
    return info.tobuf(tarfile.PAX_FORMAT)


def _padded(size: int) -> int:
    return size + -size % tarfile.BLOCKSIZE
