"""A running server over HTTP, as the command line uses it. Standard library only.

Uploads are streamed from disk. Raises RequestError with the server's own sentence, or EngineError when none answers.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from loramux_adapters.errors import EngineError, RequestError
from loramux_adapters.files import CHUNK

Object = dict[str, Any]

_TIMEOUT_S = 600


def credentials() -> dict[str, str]:
    """The header with the key of the environment, if there is one."""
    key = os.environ.get("LORAMUX_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


class ServerClient:
    """`root` is what the paths of a subclass begin with."""

    root = ""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def _upload(self, path: str, fields: Mapping[str, str], files: Mapping[str, Path]) -> Object:
        for file in files.values():
            if not file.is_file():
                raise RequestError(f"{file}: is not a file")
        boundary = uuid4().hex
        parts = _form(boundary, fields, files)
        length = sum(len(part) if isinstance(part, bytes) else part.stat().st_size for part in parts)
        headers = {
            "content-type": f"multipart/form-data; boundary={boundary}",
            "content-length": str(length),
            "idempotency-key": uuid4().hex,
        }
        return self._send("POST", path, _read(parts), headers)

    def _call(self, method: str, path: str, body: Object | None = None) -> Object:
        headers = {"content-type": "application/json"} if body is not None else {}
        return self._send(method, path, None if body is None else json.dumps(body).encode(), headers)

    def _send(self, method: str, path: str, data: Any, headers: Mapping[str, str]) -> Object:
        with self._answering(method, path, data, headers) as response:
            answer: Object = json.load(response)
            return answer

    def _events(self, path: str) -> Iterator[Object]:
        """Server-sent events as they come, to the last one."""
        with self._answering("GET", path, None, {}) as response:
            for line in response:
                if line == b"data: [DONE]\n":
                    return
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))
        raise EngineError("the server ended the stream of events")

    @contextmanager
    def _answering(self, method: str, path: str, data: Any, headers: Mapping[str, str]) -> Iterator[Any]:
        address = f"{self._url}{self.root}{path}"
        request = urllib.request.Request(address, data, {**credentials(), **headers}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                yield response
        except urllib.error.HTTPError as error:
            raise RequestError(_sentence(error)) from error
        except (urllib.error.URLError, ValueError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise EngineError(
                f"no server answers at {self._url}: {reason}; start one with loramux serve"
            ) from error


def _form(boundary: str, fields: Mapping[str, str], files: Mapping[str, Path]) -> list[bytes | Path]:
    """A multipart body; a Path stands for the bytes of that file."""
    parts: list[bytes | Path] = []
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="'
    for name, text in fields.items():
        parts.append(f'{head}{name}"\r\n\r\n{text}\r\n'.encode())
    for name, path in files.items():
        shown = re.sub(r'[\x00-\x1f"\\\\]', "_", path.name)
        header = f'{head}{name}"; filename="{shown}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        parts += [header.encode(), path, b"\r\n"]
    return [*parts, f"--{boundary}--\r\n".encode()]


def _read(parts: Iterable[bytes | Path]) -> Iterator[bytes]:
    for part in parts:
        if isinstance(part, bytes):
            yield part
            continue
        with part.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk


def _sentence(error: urllib.error.HTTPError) -> str:
    """One line a fault, when there are several."""
    try:
        body = json.load(error)["error"]
    except (ValueError, KeyError, TypeError):
        return f"the server answered {error.code} {error.reason}"
    faults = body.get("faults") or []
    if len(faults) < 2:
        return str(body["message"])
    head = str(body["message"]).partition(":")[0]
    return "\n  ".join([f"{head}:", *(f"{fault['where']}: {fault['problem']}" for fault in faults)])
