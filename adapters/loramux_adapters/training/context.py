"""How long a row may be before the base's rotary embedding computes it otherwise than when serving. No torch."""

from __future__ import annotations

from typing import Any

_DEFAULT = 2048
_LENGTH_DEPENDENT = {"dynamic", "longrope"}


def context_length(config: Any) -> int:
    """`max_position_embeddings`, or what was there before a scaling that depends on the longest row of a batch."""
    longest = int(getattr(config, "max_position_embeddings", _DEFAULT))
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [value for value in rope.values() if isinstance(value, dict)] or [rope]:
        if parameters.get("rope_type") in _LENGTH_DEPENDENT:
            named = parameters.get("original_max_position_embeddings")
            original = named or getattr(config, "original_max_position_embeddings", None)
            longest = min(longest, int(original or longest))
    return longest
