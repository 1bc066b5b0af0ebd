"""Sizes as people write them, in settings and in requests: "4GiB", "512MB". No HTTP, no configuration."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
          "K": 2**10, "M": 2**20, "G": 2**30}  # fmt: skip


def parse_bytes(value: object) -> object:
    """ "4GiB", "512MB" or a plain number of bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError("give a size such as 4GiB, 512MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
