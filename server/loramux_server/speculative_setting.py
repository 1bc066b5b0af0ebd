"""The type of the setting `speculative_config`: a JSON object on the command line, a table in the file."""

from __future__ import annotations

import json
from typing import Annotated

import msgspec
from pydantic import PlainValidator
from pydantic_settings import NoDecode

from loramux_server.engine.options import SpeculativeConfig


def parse_speculative(value: object) -> SpeculativeConfig | None:
    """What is wrong is said with the field's name."""
    if value is None or isinstance(value, SpeculativeConfig):
        return value
    try:
        given = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(
            'give a JSON object such as {"method": "ngram", "num_speculative_tokens": 4}'
        ) from error
    try:
        return msgspec.convert(given, SpeculativeConfig)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


Speculative = Annotated[SpeculativeConfig | None, NoDecode, PlainValidator(parse_speculative)]
