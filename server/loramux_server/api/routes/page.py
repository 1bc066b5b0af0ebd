"""The built-in page: `/` and `/page/<file>`, from the package's own files.

The files are made from server/page/ by `make page`; they are read once, when the application is built. Promises: nothing on
the page comes from another host, no inline script or style runs, and no other site may frame it. Needs no key: what the
page shows it asks of the API, as any client does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from loramux_server.api.methods import refuse_others

INDEX = "index.html"
_TYPES = {
    INDEX: "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "app.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "licenses.txt": "text/plain; charset=utf-8",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Asked for again at every visit, answered with 304: a page must never be older than its server.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _Asset:
    body: bytes
    headers: dict[str, str]

    def answer(self, request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if self.headers["ETag"] in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=self.headers)
        return Response(self.body, headers=self.headers)


def page_router() -> APIRouter:
    router = APIRouter()
    assets = {name: _read(name) for name in _TYPES}

    async def index(request: Request) -> Response:
        return assets[INDEX].answer(request)

    async def asset(request: Request, name: str) -> Response:
        if name not in assets or name == INDEX:
            raise HTTPException(404)
        return assets[name].answer(request)

    for path, endpoint in (("/", index), ("/page/{name}", asset)):
        router.add_api_route(path, endpoint, methods=["GET", "HEAD"], include_in_schema=False)
        refuse_others(router, path, {"GET", "HEAD"})
    return router


def _read(name: str) -> _Asset:
    body = (files("loramux_server") / "page" / name).read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    return _Asset(body, {**_HEADERS, "Content-Type": _TYPES[name], "ETag": tag})
