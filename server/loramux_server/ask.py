"""`loramux ask`: one question to several models of a running server, at once. Standard library only."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from loramux_adapters.errors import EngineError, RequestError

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
        request = urllib.request.Request(
            f"{url.rstrip('/')}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                answer: str = json.load(response)["choices"][0]["message"]["content"]
                return answer
        except urllib.error.HTTPError as error:
            raise RequestError(json.load(error)["error"]["message"]) from error
        except urllib.error.URLError as error:
            raise EngineError(
                f"no server answers at {url}: {error.reason}; start one with loramux serve"
            ) from error

    with ThreadPoolExecutor(max_workers=len(models)) as pool:
        yield from zip(models, pool.map(ask, models), strict=True)
