"""Requests nobody would write: schemathesis from our OpenAPI document, and bytes that are hardly HTTP. Never a 5xx.

Both run against the application with an engine that does not compute (fake_application.py), so that ten thousand requests
take minutes. What is checked is the front: parsing, limits, error envelopes, and that answers are as documented.
"""

from __future__ import annotations

import json
import re
import socket
from collections import Counter
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

from loramux_server.api.routes.keys import MAX_BODY_BYTES
from tests.conformance.environment import ConformanceError, Environment
from tests.conformance.fake_application import AUTHORIZATION, fake_application
from tests.conformance.outcome import Outcome

CASES = 10_000
RAW_CASES = 3000
SEED = 0
# Not asked: whether every request that fits the schema is accepted. A schema cannot say which models there are.
CHECKS = (
    *("not_a_server_error", "content_type_conformance", "response_headers_conformance"),
    *(
        "response_schema_conformance",
        "negative_data_rejection",
        "unsupported_method",
        "allow_header_conformance",
        "ignored_auth",
    ),
)
_POSTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
    "/v1/adapters",
    "/v1/fine_tuning/jobs",
    "/v1/keys",
)
_BODIES = (
    b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stop": ["a"]}',
    b'{"model": "tiny", "prompt": [[5, 6], [7]], "max_tokens": 4, "logprobs": 2, "echo": true, "n": 2}',
    b'{"model": "tiny", "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}',
    b'{"model": "tiny", "training_file": "file-1", "hyperparameters": {"n_epochs": 1}, "suffix": "x", "seed": 1}',
    b'{"name": "x", "tenant": "t", "scopes": ["infer"], "expires_in": 60, "requests_per_minute": 5}',
    b'{"model": "tiny", "prompt": "a \\ud83d\\ude00 b", "logit_bias": {"5": -100}, "temperature": 0.5e0}',
)
_NASTY = (
    b"", b"null", b"[]", b"\xff\xfe", b"{" * 2000, b"[" * 100_000, b'{"a":1,"a":2}', b'{"a": NaN}', b'{"a": 1e999}',
    b'{"a": "\\ud800"}', b'{"a": ' + b"9" * 5000 + b"}", b'\xef\xbb\xbf{"model": "tiny"}', b'{"model": "\x00"}',
    b'{"model": "tiny", "prompt": "\xc0\x80"}', b'{"model": "tiny", "prompt": "\\u0000"}', b'"' + b"x" * 10**6 + b'"',
)  # fmt: skip
_UNFINISHED = {
    "length too long",
    "broken chunks",
    "no chunks",
    "TLS hello",
    "websocket",
}  # what more could come for
_HEADERS = f"Host: x\r\nConnection: close\r\nAuthorization: {AUTHORIZATION}\r\n"
_PIECES = (
    b"{",
    b"}",
    b'"',
    b"\\",
    b"\x00",
    b"\xff",
    b"1e400",
    b"-0",
    b"NaN",
    b"\\ud800",
    b"null",
    b"[" * 70,
    b"\xed\xa0\x80",
)


def run_schemathesis(url: str, environment: Environment) -> Outcome:
    """There is no server at `url`: the application runs here."""
    outcome = Outcome()
    with fake_application() as fake:
        _generated(fake, environment, outcome)
        send_raw(fake, outcome)
    return outcome


def _generated(url: str, environment: Environment, outcome: Outcome) -> None:
    report = environment.folder / "report.ndjson"
    report.unlink(missing_ok=True)
    done = environment.run(
        *("schemathesis", "run", f"{url}/openapi.json", "--checks", ",".join(CHECKS), "--mode", "all"),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "200", "--seed", str(SEED)),
        *("--header", f"Authorization: {AUTHORIZATION}"),
        *("--continue-on-failure", "--no-color", "--suppress-health-check", "all", "--request-timeout", "30"),
        *("--generation-database", "none", "--report", "ndjson", "--report-ndjson-path", report),
        check=False,
        SCHEMATHESIS_HOOKS=str(Path(__file__).parent / "clients" / "fuzz_hooks.py"),
    )
    if not report.is_file():
        raise ConformanceError(done.stdout[-3000:] + done.stderr[-2000:])
    statuses, failed = _read_report(report)
    outcome.failures |= failed
    count = sum(statuses.values())
    outcome.passed += count
    outcome.figures |= {"generated_requests": count, "generated_statuses": dict(sorted(statuses.items()))}
    if count < CASES:
        outcome.failures["number of requests"] = f"{count} were sent, fewer than {CASES}"


def _read_report(report: Path) -> tuple[Counter[str], dict[str, str]]:
    """How often each status was answered, and the failures by operation and kind."""
    statuses: Counter[str] = Counter()
    failed: dict[str, str] = {}
    for line in report.read_text().splitlines():
        event = json.loads(line)
        scenario = event.get("ScenarioFinished")
        if scenario is None:
            continue
        recorder = scenario["recorder"]
        for interaction in recorder.get("interactions", {}).values():
            if response := interaction.get("response"):
                statuses[str(response["status_code"])] += 1
        for checks in recorder.get("checks", {}).values():
            for check in checks:
                if check["status"] != "success":
                    info = check.get("failure_info") or {}
                    failure = info.get("failure", info)
                    name = f"{recorder['label']} {check['name']}"
                    failed.setdefault(name, f"{failure.get('title', '')}: {failure.get('message', '')}")
    return statuses, failed


def send_raw(url: str, outcome: Outcome) -> None:
    """Mutated and broken bodies by hand-written HTTP. A 5xx is no answer; to close the connection is one to what is not
    finished, and to what is so large that it is not read.
    """
    random = Random(SEED)
    statuses: Counter[str] = Counter()
    requests = [(path, body) for path in _POSTS for body in _NASTY]
    requests += [(random.choice(_POSTS), _mutated(random)) for _ in range(RAW_CASES)]
    for number, (path, body) in enumerate(requests):
        head = f"POST {path} HTTP/1.1\r\n{_HEADERS}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        _judge(url, f"raw body {number}", head.encode() + body, statuses, outcome, ends=False)
    for name, request in _broken_http().items():
        _judge(url, f"raw {name}", request, statuses, outcome, ends=name in _UNFINISHED)
    outcome.figures |= {
        "raw_requests": sum(statuses.values()),
        "raw_statuses": dict(sorted(statuses.items())),
    }


def _judge(
    url: str, name: str, request: bytes, statuses: Counter[str], outcome: Outcome, *, ends: bool
) -> None:
    """`ends`: the server is told that nothing more is coming, which to a whole request means that its client leaves."""
    answer = _send(url, request, ends=ends)
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    status = found[1].decode() if found else "closed"
    statuses[status] += 1
    unanswered = status == "closed" and not ends and len(request) <= MAX_BODY_BYTES
    if status.startswith("5") or unanswered:
        outcome.failures[name] = f"{request[-200:]!r} -> {answer[-300:]!r}"
    else:
        outcome.passed += 1


def _send(url: str, request: bytes, *, ends: bool) -> bytes:
    where = urlsplit(url)
    with socket.create_connection((where.hostname or "", where.port or 0), timeout=30) as connection:
        answer = b""
        try:
            connection.sendall(request)
            if ends:
                connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65536):
                answer += chunk
        except OSError:  # it closed before it had read all
            pass
        return answer


def _mutated(random: Random) -> bytes:
    body = bytearray(random.choice(_BODIES))
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(body) + 1)
        match random.randrange(4):
            case 0:
                body[place:place] = random.choice(_PIECES)
            case 1:
                del body[place : place + random.randint(1, 8)]
            case 2:
                body[place : place + 1] = bytes([random.randrange(256)])
            case _:
                body[place:place] = body[: random.randrange(len(body) + 1)]
    return bytes(body)


def _broken_http() -> dict[str, bytes]:
    headers = _HEADERS.encode()
    post = b"POST /v1/completions HTTP/1.1\r\n" + headers + b"Content-Type: application/json\r\n"
    models = b"GET /v1/models HTTP/1.1\r\n" + headers
    return {
        "20 MB header": models + b"X-Big: " + b"x" * 20_000_000 + b"\r\n\r\n",
        "100 kB query": b"GET /v1/models?" + b"q" * 100_000 + b" HTTP/1.1\r\n" + headers + b"\r\n",
        "10,000 headers": models + b"A: b\r\n" * 10_000 + b"\r\n",
        "negative length": post + b"Content-Length: -1\r\n\r\n{}",
        "length of letters": post + b"Content-Length: abc\r\n\r\n{}",
        "length too long": post + b"Content-Length: 1000\r\n\r\n{}",
        "two lengths": post + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        "length and chunks": post + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "broken chunks": post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        "no chunks": post + b"Transfer-Encoding: chunked\r\n\r\n",
        "compressed": post + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
        "no version": b"GET /v1/models\r\n\r\n",
        "not HTTP": bytes(range(256)) * 40,
        "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
        "odd method": b"BREW /v1/models HTTP/1.1\r\n" + headers + b"\r\n",
        "encoded path": b"GET /v1/models/%00%ff%2e%2e/%2e%2e HTTP/1.1\r\n" + headers + b"\r\n",
        "latin-1 header": models + b"X-Request-Id: \xff\xfe\r\n\r\n",
        "websocket": b"GET /v1/responses HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        b"Authorization: " + AUTHORIZATION.encode() + b"\r\n\r\n",
    }  # fmt: skip
