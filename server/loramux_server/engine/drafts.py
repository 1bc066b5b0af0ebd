"""Speculation without a second model: what came after the same tokens before is likely to come again. Policy, no torch.

Prompt lookup (https://github.com/apoorvumang/prompt-lookup-decoding): the last tokens of a sequence are looked up in what
came before them, and the tokens that followed there are its drafts. The engine runs them behind the sequence's own
token in the same pass and keeps those that it would have chosen itself. Promises: looking up takes the same time however
long the sequence is; drafts are a function of the sequence's tokens alone. Does not decide what is kept (`engine.py`).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from loramux_server.engine.options import SpeculativeConfig
from loramux_server.engine.sequence import Sequence
from loramux_server.engine.stats import DraftCounts

# Places with the same n-gram that are compared, latest first, to find the one where the most tokens before agree.
_CANDIDATES = 16
# Up to so many tokens a step takes little longer with one more; measured on CPUs, on CUDA what one fused product takes.
STEP_TOKENS = {"cpu": 16, "cuda": 64}


def num_kept(drafts: SequenceOf[int], drawn: SequenceOf[int | None]) -> int:
    """How many of the drawn tokens hold: `drawn[n]` was drawn as if all drafts before it were right.

    Each was drawn from its own distribution whatever the draft is. So a draft is right as often as it is likely, and if not,
    the other token comes from what is left of the distribution: this is rejection sampling, and with a seed or greedily
    it gives the very tokens that come without drafts.
    """
    right = 0
    while right < len(drafts) and drawn[right] == drafts[right]:
        right += 1
    return right + 1


class PromptLookup:
    """The tokens of one sequence, and for each place the one before where the same n-gram ended."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._shortest, self._longest = config.window
        self._most = self._length = config.num_speculative_tokens
        self._tokens: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}  # where an n-gram of the shortest length ended last
        # by number of tokens: where the n-gram that ends there ended before; 0 is nowhere
        self._earlier = [0]

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: SequenceOf[int]) -> None:
        for token in tokens:
            self._tokens.append(token)
            end = len(self._tokens)
            if end < self._shortest:
                self._earlier.append(0)
                continue
            gram = tuple(self._tokens[end - self._shortest :])
            self._earlier.append(self._latest.get(gram, 0))
            self._latest[gram] = end

    def propose(self, most: int) -> list[int]:
        """At most `most` tokens that may come next. Where the match runs into its own end, it repeats itself."""
        count = min(most, self._length)
        place = self._best_match()
        if count <= 0 or not place:
            return []
        period = len(self._tokens) - place
        return [self._tokens[place + offset % period] for offset in range(count)]

    def verified(self, proposed: int, accepted: int) -> None:
        """Be bolder after drafts that were all right, and propose no more than what was right after others."""
        if accepted == proposed:
            self._length = min(self._most, 2 * self._length)
        else:
            self._length = max(1, accepted)

    def _best_match(self) -> int:
        """The number of tokens up to where the longest match ends, the latest of those; 0 if there is none."""
        best = length = 0
        place = self._earlier[-1]
        for _ in range(_CANDIDATES):
            if not place or length == self._longest:
                break
            matching = self._matching(place)
            if matching > length:
                best, length = place, matching
            place = self._earlier[place]
        return best

    def _matching(self, place: int) -> int:
        """How many tokens before `place`, where the shortest n-gram matches, are those at the end; at most the longest."""
        tokens, end, length = self._tokens, len(self._tokens), self._shortest
        while length < min(self._longest, place) and tokens[place - length - 1] == tokens[end - length - 1]:
            length += 1
        return length


class Drafter:
    """Who gets drafts, and what became of them."""

    def __init__(self, config: SpeculativeConfig, step_tokens: int) -> None:
        """A step of more than `step_tokens` tokens gets no drafts: there computing limits, and a wrong one costs."""
        self.config = config
        self.step_tokens = step_tokens
        self.counts = DraftCounts()

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        """At most `most` drafts for a decoding sequence, no more than may be kept before it ends."""
        most = min(most, sequence.params.max_tokens - len(sequence.output) - 1)
        # A grammar says what may come only after it was told what came.
        if most <= 0 or sequence.constraint is not None:
            return []
        if sequence.lookup is None:
            sequence.lookup = PromptLookup(self.config)
        sequence.lookup.extend(sequence.tokens(len(sequence.lookup), sequence.num_tokens))
        return sequence.lookup.propose(most)

    def verified(self, sequence: Sequence, proposed: int, accepted: int) -> None:
        if sequence.lookup is not None and proposed:
            sequence.lookup.verified(proposed, accepted)
            counts = self.counts
            self.counts = DraftCounts(
                counts.num_drafts + 1,
                counts.num_draft_tokens + proposed,
                counts.num_accepted_tokens + accepted,
            )
