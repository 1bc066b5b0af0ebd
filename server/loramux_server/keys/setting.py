"""The type of the setting `api_key`: one key, or several with commas between them; never shown, also not in errors."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, SecretStr
from pydantic_settings import NoDecode


def parse_keys(value: object) -> object:
    """What is wrong is said without the keys."""
    keys = value.split(",") if isinstance(value, str) else value
    if not isinstance(keys, list) or not all(
        isinstance(key, str) and re.fullmatch(r"[\x21-\x2b\x2d-\x7e]{1,512}", key) for key in keys
    ):
        raise ValueError("a key is 1 to 512 printable ASCII characters without spaces and commas")
    return keys


Keys = Annotated[list[SecretStr], NoDecode, BeforeValidator(parse_keys)]
