"""How both processes write their logs, on standard error: text for people, or one JSON object a line for collectors.

Promises: every line of a request carries its id; JSON lines are whole lines whatever the message holds. Standard library
only. What is logged is decided where it is logged; prompts and answers never are.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import IO, Literal

from loramux_server.observed import ObservedRequest, current_request

LogFormat = Literal["text", "json"]
Process = Literal["front", "worker"]

_access = logging.getLogger("loramux.access")
_NOISY = ("httpx", "httpx2", "watchfiles", "urllib3", "uvicorn.error")
_OWN_HANDLERS = ("transformers", "huggingface_hub")  # print by themselves, each in its own format
# Asked every few seconds by machines; what they are told is in the metrics.
_QUIET_ROUTES = frozenset({"/health", "/ready", "/metrics"})


def set_up_logging(
    level: str, log_format: LogFormat, process: Process, stream: IO[str] | None = None
) -> None:
    """Everything that is logged goes to `stream`, by default standard error, in one format. Replaces what was set up."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(log_format == "json")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)


def adopt_libraries() -> None:
    """Take the lines of libraries that print by themselves; to be called once they are imported."""
    for name in _OWN_HANDLERS:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, and the request's id where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        request = current_request()
        if request is None or request.id in line:
            return line
        return f"{line} [{request.id}]"


class JsonFormatter(logging.Formatter):
    """One object a line; `fields` of a record (a mapping, by `extra`) become keys of their own."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        request = current_request()
        if request is not None:
            line["request_id"] = request.id
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            line |= fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_access(request: ObservedRequest) -> None:
    """The one line that says how a request went; probes and scrapes that went well are for debugging."""
    quiet = request.route in _QUIET_ROUTES and request.status < 400
    level = logging.DEBUG if quiet else logging.INFO
    if _access.isEnabledFor(level):
        fields = access_fields(request)
        head = f"{request.method} {request.route} {request.status}"
        rest = " ".join(f"{key}={value}" for key, value in fields.items() if key not in _IN_HEAD)
        _access.log(level, "%s %s", head, rest, extra={"fields": fields})


_IN_HEAD = ("method", "route", "status")


def access_fields(request: ObservedRequest) -> dict[str, object]:
    """What is known of it; keys are left out where nothing is."""
    fields: dict[str, object] = {
        "method": request.method,
        "route": request.route,
        "status": request.status,
        "seconds": round(request.seconds, 4),
    }
    if request.sequences:
        fields |= {
            "prompt_tokens": request.prompt_tokens,
            "completion_tokens": request.completion_tokens,
        }
    if request.first_token is not None:
        fields["first_token_seconds"] = round(request.first_token - request.began, 4)
    optional = {
        "adapter": request.adapter,
        "generation": request.generation,
        "error_code": request.error_code,
        "key_id": request.key_id,
    }
    return fields | {key: value for key, value in optional.items() if value is not None}
