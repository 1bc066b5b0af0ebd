"""`loramux ask`: one question to several models of a running server, at once. Standard library only."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from loramux_adapters.errors import EngineError, RequestError
from loramux_server.server_client import credentials

_TIMEOUT_S = 600


def ask_models(
    url: str, question: str, models: Sequence[str], *, max_tokens: int, temperature: float
) -> Iterator[tuple[str, str]]:
    """(model, answer) in the order asked. Raises RequestError with the server's own sentence, or EngineError."""

    def ask(model: str) -> str:
        body = {
            "model": model,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "messages": [{"role": "user", "content": question}],
        }
        try:
            request = urllib.request.Request(
                f"{url.rstrip('/')}/v1/chat/completions",
                data=json.dumps(body).encode(),
                headers={"content-type": "application/json", **credentials()},
            )
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                answer: str = json.load(response)["choices"][0]["message"]["content"]
                return answer
        except urllib.error.HTTPError as error:
            raise RequestError(_sentence(error, url)) from error
        except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise EngineError(
                f"no server answers at {url}: {reason}; start one with loramux serve"
            ) from error

    with ThreadPoolExecutor(max_workers=len(models)) as pool:
        yield from zip(models, pool.map(ask, models), strict=True)


def _sentence(error: urllib.error.HTTPError, url: str) -> str:
    """The server's own, or the status where something else answers at that address."""
    try:
        message: str = json.load(error)["error"]["message"]
        return message
    except (ValueError, LookupError, TypeError):
        return f"{url} answers {error.code} {error.reason}; is that a loramux server?"
