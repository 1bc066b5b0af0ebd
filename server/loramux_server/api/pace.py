"""How slow a request's body may come: a client that sends nothing, or next to nothing, is answered and let go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from loramux_adapters.errors import RequestError

IDLE_S = 60.0  # without a byte; and before the rate is looked at
MIN_RATE = 1024  # bytes a second since the first one was waited for


class BodyTimeout(RequestError):
    code = "body_timeout"


async def paced(chunks: AsyncIterator[bytes], idle_s: float = IDLE_S) -> AsyncGenerator[bytes, None]:
    """The chunks as they come, to the first that is empty. Raises BodyTimeout."""
    clock = asyncio.get_running_loop().time
    began, received = clock(), 0
    while chunk := await _next(chunks, idle_s):
        received += len(chunk)
        passed = clock() - began
        if passed > idle_s and received < passed * MIN_RATE:
            raise BodyTimeout(
                f"the body came with less than {MIN_RATE} bytes a second; send the request again"
            )
        yield chunk


async def _next(chunks: AsyncIterator[bytes], idle_s: float) -> bytes:
    try:
        return await asyncio.wait_for(anext(chunks, b""), idle_s)
    except TimeoutError:
        raise BodyTimeout(
            f"nothing of the body came for {idle_s:g} seconds; send the request again"
        ) from None
