"""The bytes of a file, read while they are sent; they stay readable when the file is deleted meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import BinaryIO
from urllib.parse import quote

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loramux_adapters.files import CHUNK
from loramux_server.api.stream import send_pieces, unless_disconnected
from loramux_server.training.records import FileRecord


class FileDownload(Response):
    """Closes `data` when the last byte is sent or the client has left."""

    media_type = "application/octet-stream"

    def __init__(self, file: FileRecord, data: BinaryIO) -> None:
        name = quote(file.filename, safe="")
        super().__init__(headers={"content-disposition": f"attachment; filename*=UTF-8''{name}"})
        self.headers["content-length"] = str(file.num_bytes)
        self._data = data

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with closing(self._data):
            start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await send(start)
            await unless_disconnected(receive, send_pieces(self._pieces(), send))

    def _pieces(self) -> Iterator[bytes]:
        while piece := self._data.read(CHUNK):
            yield piece
