"""Answer the methods that a path does not have."""

from __future__ import annotations

from collections.abc import Collection

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

# Those that HTTP has and clients or scanners send.
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"}


def refuse_others(router: APIRouter, path: str, methods: Collection[str]) -> None:
    """405 with all methods of the path: the router by itself names those of its first route only."""
    allow = {"Allow": ", ".join(sorted(methods))}

    async def refuse() -> Response:
        raise HTTPException(405, headers=allow)

    others = sorted(_METHODS - set(methods))
    router.add_api_route(path, refuse, methods=others, include_in_schema=False)
