"""/v1/adapters of a running server, as the command line uses it. Errors are those of `server_client.py`."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path

from loramux_adapters.adapter_files import ADAPTER_FILES
from loramux_server.server_client import Object, ServerClient


class AdaptersClient(ServerClient):
    root = "/v1/adapters"

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
        return self._upload("", {"name": name, **fields}, files)

    def pull(self, name: str, source: str, fields: Object) -> Object:
        """Let the server fetch hf://organisation/repository@revision."""
        return self._call("POST", "", {"name": name, "source": source, **fields})

    def change(self, name: str, fields: Object) -> Object:
        return self._call("PATCH", _path(name), fields)

    def rollback(self, name: str, generation: str | None) -> Object:
        return self._call("POST", f"{_path(name)}/rollback", {"generation": generation})

    def delete(self, name: str, timeout: float) -> Object:
        return self._call("DELETE", f"{_path(name)}?timeout={timeout}")


def _path(name: str) -> str:
    return "/" + urllib.parse.quote(name, safe="/:@")
