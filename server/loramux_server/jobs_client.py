"""/v1/files and /v1/fine_tuning/jobs of a running server, as the command line uses them.

Errors are those of `server_client.py`.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from loramux_server.server_client import Object, ServerClient

_JOBS = "/fine_tuning/jobs"


class JobsClient(ServerClient):
    root = "/v1"

    def upload(self, path: Path) -> Object:
        """Training data."""
        return self._upload("/files", {"purpose": "fine-tune"}, {"file": path})

    def create(self, fields: Object) -> Object:
        return self._call("POST", _JOBS, fields)

    def all(self) -> Iterator[Object]:
        """Every job, newest first, a page at a time."""
        after: dict[str, str] = {}
        while True:
            page = self._call("GET", f"{_JOBS}?" + urllib.parse.urlencode({"limit": "1000", **after}))
            yield from page["data"]
            if not page["has_more"]:
                return
            after = {"after": page["data"][-1]["id"]}

    def show(self, job_id: str) -> Object:
        return self._call("GET", _path(job_id))

    def checkpoints(self, job_id: str) -> Object:
        return self._call("GET", f"{_path(job_id)}/checkpoints?limit=1000")

    def change(self, job_id: str, what: str) -> Object:
        """`what` is cancel, pause or resume."""
        return self._call("POST", f"{_path(job_id)}/{what}", {})

    def events(self, job_id: str) -> Iterator[Object]:
        """From the beginning on and as they happen, until the job has ended or the server does."""
        return self._events(f"{_path(job_id)}/events?stream=true")


def _path(job_id: str) -> str:
    return f"{_JOBS}/{urllib.parse.quote(job_id, safe='')}"
