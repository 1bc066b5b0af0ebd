"""What an adapter may be called and described as. Rules only: what is taken is `registry.py`'s knowledge."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping

from loramux_adapters.errors import AdapterConflict, RequestError

MAX_NAME = 128
MAX_DESCRIPTION = 4096
MAX_JSON_BYTES = 16 * 1024

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*")
_PIN = re.compile(r"[0-9a-f]{8,64}")


def check_name(name: str, reserved: Collection[str] = ()) -> str:
    """The name itself, if an adapter may have it."""
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME or any(_bad(part) for part in name.split("/")):
        raise RequestError(
            f"name: {name[: MAX_NAME + 1]!a} is not an adapter name: 1 to {MAX_NAME} letters, digits "
            "and ._:/-, beginning with a letter or digit, no part between slashes empty or begun by a dot",
            param="name",
            code="invalid_name",
        )
    if name in reserved:
        raise AdapterConflict(f"name: '{name}' is the base model's name", param="name")
    return name


def split_pin(model: str) -> tuple[str, str | None]:
    """'name@1a2b3c4d' -> ('name', '1a2b3c4d'); a malformed pin stays in the name."""
    name, at, pin = model.rpartition("@")
    return (name, pin) if at and _PIN.fullmatch(pin) else (model, None)


def check_description(text: str) -> str:
    if len(text) > MAX_DESCRIPTION or not _is_unicode(text):
        raise RequestError(
            f"description: must be text of at most {MAX_DESCRIPTION} characters", param="description"
        )
    return text


def check_json(field: str, value: Mapping[str, object]) -> dict[str, object]:
    """A client's JSON object, as a copy that is what reading it back would give."""
    try:
        text = json.dumps(dict(value), allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{field}: must be a JSON object: {error}", param=field) from None
    if not _is_unicode(text) or len(text.encode()) > MAX_JSON_BYTES:
        raise RequestError(f"{field}: must be at most {MAX_JSON_BYTES} bytes of valid JSON", param=field)
    copy: dict[str, object] = json.loads(text)
    return copy


def _bad(part: str) -> bool:
    return not part or part.startswith(".")


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can carry and nothing downstream can encode."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
