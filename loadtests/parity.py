"""Are the tokens right? Every answer of a round, held against the reference's logits for exactly that answer.

The reference runs forward passes over prompt + answer, with the same weights in fp32 arithmetic and in its own dtype's,
and says, for each token, how far its logit is below the best one, by the nearer of the two. Greedy decoding in 16 bits may
take either of two tokens that are nearly tied, and differs from there on, so a token counts as right if it is within the
tolerance; `identical` streams took the fp32 reference's best token everywhere.
Does not run the reference (peers/peft_peer.py does).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# In logits, by the dtype that contestants compute in. On the embedded model PEFT's own bf16 answers are within 0.2, and
# answers of another adapter or of the base off by 2 or more.
TOLERANCES = {"bfloat16": 0.5, "float16": 0.5, "float32": 0.01}


@dataclass(frozen=True)
class StreamCheck:
    """One stream. `margin` is between the reference's two best tokens at the first difference."""

    first_difference: int | None
    margin: float | None
    deficit: float  # the largest, over all its tokens


@dataclass(frozen=True)
class Parity:
    """All streams of one contestant."""

    streams: int
    identical: int
    violations: int  # streams with a token outside the tolerance
    worst_deficit: float
    margins: list[float]  # of the streams that differ, ascending
    tolerance: float
    unreadable: int = 0  # streams whose tokens cannot be told from their names
    timed: int = 0  # streams of the timed rounds,
    timed_differently: int = 0  # and those whose text was not the checked one's (a near-tie fell otherwise)

    @property
    def right(self) -> bool:
        return self.violations == 0 and self.unreadable == 0

    @property
    def verdict(self) -> str:
        """For the table."""
        if self.violations or self.unreadable:
            what = "WRONG" if self.violations else "NOT CHECKED"
            return f"{what}: {self.violations or self.unreadable} of {self.streams} streams, off by {self.worst_deficit:.2f}"
        same = f"{self.identical}/{self.streams} identical"
        return (
            same if self.identical == self.streams else f"{same}, near-ties within {self.worst_deficit:.2f}"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(
    checks: Iterable[StreamCheck | None], tolerance: float, texts: tuple[int, int] = (0, 0)
) -> Parity:
    """`None` is a stream that could not be read. `texts`: timed streams, and those with another text."""
    everything = list(checks)
    read = [check for check in everything if check is not None]
    return Parity(
        streams=len(everything),
        identical=sum(check.first_difference is None for check in read),
        violations=sum(check.deficit > tolerance for check in read),
        worst_deficit=max((check.deficit for check in read), default=0.0),
        margins=sorted(check.margin for check in read if check.margin is not None),
        tolerance=tolerance,
        unreadable=len(everything) - len(read),
        timed=texts[0],
        timed_differently=texts[1],
    )


class Tokens:
    """The base's tokenizer: prompts in, and token ids back from the names in `logprobs`.

    A name that several tokens share says nothing, so an answer with one of them is not readable.
    """

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        from loramux_server.api.detokenize import Pieces
        from loramux_server.api.logprobs import token_name

        self._tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        pieces = Pieces(self._tokenizer)
        self._ids: dict[str, int | None] = {}
        for token in range(len(self._tokenizer)):
            name = token_name(pieces, token)
            self._ids[name] = None if name in self._ids else token

    @property
    def special(self) -> list[int]:
        """Ids of the special tokens, those that end an answer among them."""
        return list(self._tokenizer.all_special_ids)

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def ids(self, names: Sequence[str]) -> list[int] | None:
        found = [self._ids.get(name) for name in names]
        return [token for token in found if token is not None] if None not in found else None
