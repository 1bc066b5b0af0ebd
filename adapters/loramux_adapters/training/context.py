"""The longest context whose positions a base computes the same whatever else is in the batch. No torch.

"dynamic" and "longrope" rotary embeddings rescale every position by the longest row of a forward pass; in a batch of
strangers, or of training samples, only the length below which they do nothing is safe.
"""

from __future__ import annotations

from typing import Any

_DEFAULT = 2048
_LENGTH_DEPENDENT = {"dynamic", "longrope"}


def context_length(config: Any) -> int:
    """`max_position_embeddings` of a text config, or what it was before such a scaling."""
    longest = int(getattr(config, "max_position_embeddings", _DEFAULT))
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [value for value in rope.values() if isinstance(value, dict)] or [rope]:
        if parameters.get("rope_type") in _LENGTH_DEPENDENT:
            named = parameters.get("original_max_position_embeddings")
            original = named or getattr(config, "original_max_position_embeddings", None)
            longest = min(longest, int(original or longest))
    return longest
