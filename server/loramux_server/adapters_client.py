"""/v1/adapters of a running server, as the command line uses it. Standard library only.

Uploads are streamed from disk. Raises RequestError with the server's own sentence, or EngineError when none answers.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from loramux_adapters.adapter_files import ADAPTER_FILES
from loramux_adapters.errors import EngineError, RequestError
from loramux_adapters.files import CHUNK

Object = dict[str, Any]

_TIMEOUT_S = 600


class AdaptersClient:
    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def all(self) -> Iterator[Object]:
        """Every adapter, a page at a time."""
        after: dict[str, str] = {}
        while True:
            page = self._call("GET", "?" + urllib.parse.urlencode({"limit": "1000", **after}))
            yield from page["data"]
            if not page["has_more"]:
                return
            after = {"after": page["last_id"]}

    def show(self, name: str) -> Object:
        return self._call("GET", _path(name))

    def upload(self, name: str, path: Path, fields: Mapping[str, str]) -> Object:
        """`path` is an adapter's folder, or an archive of one."""
        names = ADAPTER_FILES if path.is_dir() else ("archive",)
        files = {name: path / name if path.is_dir() else path for name in names}
        for file in files.values():
            if not file.is_file():
                raise RequestError(f"{file}: is not a file")
        boundary = uuid4().hex
        parts = _form(boundary, {"name": name, **fields}, files)
        length = sum(len(part) if isinstance(part, bytes) else part.stat().st_size for part in parts)
        headers = {
            "content-type": f"multipart/form-data; boundary={boundary}",
            "content-length": str(length),
            "idempotency-key": uuid4().hex,
        }
        return self._send("POST", "", _read(parts), headers)

    def pull(self, name: str, source: str, fields: Object) -> Object:
        """Let the server fetch hf://organisation/repository@revision."""
        return self._call("POST", "", {"name": name, "source": source, **fields})

    def change(self, name: str, fields: Object) -> Object:
        return self._call("PATCH", _path(name), fields)

    def rollback(self, name: str, generation: str | None) -> Object:
        return self._call("POST", f"{_path(name)}/rollback", {"generation": generation})

    def delete(self, name: str, timeout: float) -> Object:
        return self._call("DELETE", f"{_path(name)}?timeout={timeout}")

    def _call(self, method: str, path: str, body: Object | None = None) -> Object:
        headers = {"content-type": "application/json"} if body is not None else {}
        return self._send(method, path, None if body is None else json.dumps(body).encode(), headers)

    def _send(self, method: str, path: str, data: Any, headers: Mapping[str, str]) -> Object:
        address = f"{self._url}/v1/adapters{path}"
        request = urllib.request.Request(address, data, dict(headers), method=method)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                answer: Object = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            raise RequestError(_sentence(error)) from error
        except (urllib.error.URLError, ValueError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise EngineError(
                f"no server answers at {self._url}: {reason}; start one with loramux serve"
            ) from error


def _path(name: str) -> str:
    return "/" + urllib.parse.quote(name, safe="/:@")


def _form(boundary: str, fields: Mapping[str, str], files: Mapping[str, Path]) -> list[bytes | Path]:
    """A multipart body; a Path stands for the bytes of that file."""
    parts: list[bytes | Path] = []
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="'
    for name, text in fields.items():
        parts.append(f'{head}{name}"\r\n\r\n{text}\r\n'.encode())
    for name, path in files.items():
        header = f'{head}{name}"; filename="{name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
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
