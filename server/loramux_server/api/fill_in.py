"""`suffix` of /v1/completions: prompts for models that were trained to fill in what is between two texts.

Promises: the markers are tokens of the base's own vocabulary, in the order prefix, suffix, middle, which all the families
below were trained with; a base that has none of them refuses a suffix. Does not judge whether the weights know the markers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramux_adapters.errors import RequestError
from loramux_server.api.protocol import CompletionBody
from loramux_server.api.texts import Texts

# Before the prefix, before the suffix, before what is filled in: Qwen, StarCoder, SantaCoder, Code Llama, DeepSeek.
_FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


@dataclass(frozen=True)
class Markers:
    prefix: int
    suffix: int
    middle: int


def markers_of(texts: Texts) -> Markers | None:
    """Of the first family whose markers are all tokens of the base."""
    for family in _FAMILIES:
        ids = texts.vocabulary_ids(family)
        if None not in ids:
            return Markers(*(one for one in ids if one is not None))
    return None


async def fill_in_prompts(texts: Texts, body: CompletionBody, suffix: str) -> list[list[int]]:
    """For each prompt the tokens that ask for what is between it and the suffix."""
    markers = markers_of(texts)
    if markers is None:
        raise RequestError(
            "suffix: this base's tokenizer has no tokens for filling in",
            param="suffix",
            code="unsupported_parameter",
        )
    given: Sequence[object] = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    prefixes = [prompt for prompt in given if isinstance(prompt, str)]
    if len(prefixes) < len(given):
        raise RequestError("suffix: goes with a prompt of text, not of token ids", param="suffix")
    if body.echo:
        raise RequestError("suffix: not together with echo; the answer comes between the two", param="suffix")
    [begin] = await texts.encode([""])
    [after, *encoded] = await texts.encode([suffix, *prefixes], specials=False)
    return [[*begin, markers.prefix, *before, markers.suffix, *after, markers.middle] for before in encoded]
