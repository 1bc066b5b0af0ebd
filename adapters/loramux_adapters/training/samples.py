"""Rows -> token ids and which of them are trained on, in the words of the base's own chat template.

Promises: what stands before a trained turn is tokenized from the text the server would render for it; a loss mask is
either right or refused: by the template's own `{% generation %}` marks if it has them, else by rendering growing
prefixes of the conversation, checked to be prefixes. Everything cut or dropped is counted. No torch.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2.exceptions import TemplateError

from loramux_adapters.errors import TrainingError
from loramux_adapters.training.rows import ChatRow, CompletionRow, Row

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]  # characters, end exclusive


@dataclass(frozen=True, slots=True)
class Sample:
    """`ids`, int32; `mask`, one byte a token, 1 where the token is to be predicted. The first never is."""

    ids: array[int]
    mask: bytes

    @property
    def trained(self) -> int:
        return sum(self.mask)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class DataReport:
    """What became of a file; every number a person would ask for before training starts."""

    file: str
    sha256: str
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    shortest: int = 0
    median: int = 0
    longest: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    dropped_rows: int = 0
    marked_by: str = ""  # how the loss mask was found
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class DataSet:
    samples: list[Sample]
    report: DataReport

    def digest(self) -> str:
        """sha256 over every token and mask: equal data under an equal tokenizer and template."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(len(sample).to_bytes(8, "little") + sample.ids.tobytes() + sample.mask)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Piece:
    """A text, the characters of it that are trained on, and whether the end token closes it."""

    text: str
    spans: tuple[Span, ...]
    special_tokens: bool = False  # may the tokenizer add its own
    closed: bool = False


class Tokenize:
    """A tokenizer with its template, and how the two mark what the assistant said."""

    def __init__(
        self, tokenizer: Any, *, train_on_inputs: bool = False, chat_template: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.train_on_inputs = train_on_inputs
        self._template = chat_template  # else the tokenizer's own
        self._specials = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
        self.unrolled = 0  # conversations whose turns became samples of their own
        self.unclosed = 0  # trained turns that end without a special token
        self.marked_by: set[str] = set()

    def samples(self, row: Row) -> Iterator[Sample]:
        """One sample, or one for each trained turn. Raises TrainingError if the template cannot be used."""
        if isinstance(row, ChatRow):
            pieces = self._chat(row)
        elif isinstance(row, CompletionRow):
            self.marked_by.add("prompt and completion")
            whole = row.prompt + row.completion
            start = 0 if self.train_on_inputs else len(row.prompt)
            pieces = [_Piece(whole, ((start, len(whole)),), special_tokens=True, closed=True)]
        else:
            self.marked_by.add("every token")
            pieces = [_Piece(row.text, ((0, len(row.text)),), special_tokens=True, closed=True)]
        for piece in pieces:
            yield self._sample(piece, row.line)

    def _chat(self, row: ChatRow) -> list[_Piece]:
        if not (self._template or self.tokenizer.chat_template):
            raise TrainingError(
                "this base has no chat template, so conversations cannot be written for it: use rows of "
                '{"prompt", "completion"} or {"text"}',
                param="training_file",
                code="no_chat_template",
            )
        whole = self._render(row, len(row.messages))
        if self.train_on_inputs:
            self.marked_by.add("every token (train_on_inputs)")
            return [_Piece(whole, ((0, len(whole)),))]
        if spans := self._generation_marks(row, whole):
            self.marked_by.add("the template's generation marks")
            return [_Piece(whole, tuple(spans))]
        self.marked_by.add("growing prefixes of the conversation")
        turns = [self._turn(row, place) for place, trained in enumerate(row.weights) if trained]
        if all(whole.startswith(text) for text, _ in turns):
            return [_Piece(whole, tuple(span for _, span in turns))]
        # The template writes an earlier turn otherwise once more follows (it drops reasoning, say). Each
        # turn is then trained on as it was when it was written, which is what the server asks for.
        self.unrolled += 1
        return [_Piece(text, (span,)) for text, span in turns]

    def _turn(self, row: ChatRow, place: int) -> tuple[str, Span]:
        """The conversation up to and including message `place`, and the characters that answer its prompt."""
        prompt = self._render(row, place, prompt=True)
        text = self._render(row, place + 1)
        if not text.startswith(prompt):
            raise TrainingError(
                f"Line {row.line}, message {place + 1}: this base's chat template writes the assistant's turn otherwise "
                "than its own generation prompt begins it, so the assistant's tokens cannot be told apart; set "
                "train_on_inputs to train on every token, or use prompt/completion rows",
                param="training_file",
                code="assistant_tokens_unknown",
            )
        return text, (len(prompt), max(len(prompt) + 1, len(text.rstrip())))

    def _generation_marks(self, row: ChatRow, whole: str) -> list[Span]:
        """Spans inside `{% generation %}`; none if the template has no such marks or turns differ in weight."""
        template: str = self.tokenizer.get_chat_template(self._template, row.tools)
        if not _GENERATION.search(template):
            return []
        from transformers.utils.chat_template_utils import render_jinja_template

        with _template_faults(row.line):
            rendered: Any = render_jinja_template(
                conversations=[row.messages],
                tools=[*row.tools] if row.tools else None,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        texts, marks = rendered
        spans: list[Span] = [(start, end) for start, end in marks[0]]
        assistants = [trained for message, trained in zip(row.messages, row.weights, strict=True)
                      if message["role"] == "assistant"]  # fmt: skip
        if texts[0] != whole or len(spans) != len(assistants):
            return []
        return [span for span, trained in zip(spans, assistants, strict=True) if trained]

    def _render(self, row: ChatRow, count: int, *, prompt: bool = False) -> str:
        with _template_faults(row.line):
            text: str = self.tokenizer.apply_chat_template(
                row.messages[:count],
                tools=row.tools,
                chat_template=self._template,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        return text

    def _sample(self, piece: _Piece, line: int) -> Sample:
        encoded = self.tokenizer(
            piece.text, add_special_tokens=piece.special_tokens, return_offsets_mapping=True, truncation=False
        )
        ids = array("i", encoded["input_ids"])
        # A token that begins before a span belongs to what the server would give as the prompt.
        mask = bytearray(len(ids))
        spans = iter(piece.spans)
        begin, end = next(spans)
        for place, (start, stop) in enumerate(encoded["offset_mapping"]):
            while start >= end and (following := next(spans, None)) is not None:
                begin, end = following
            mask[place] = begin <= start < end and stop > start
        if piece.closed and (closing := self.tokenizer.eos_token_id) is not None:
            if not ids or ids[-1] != closing:
                ids.append(closing)
                mask.append(1)
            mask[-1] = 1
        elif not piece.closed:
            self._note_end(ids, mask)
        if mask:
            mask[0] = 0
        return Sample(ids, bytes(mask))

    def _note_end(self, ids: Sequence[int], mask: bytearray) -> None:
        """Count a conversation whose last trained token ends nothing: it does not teach the model to stop."""
        last = mask.rfind(1)
        self.unclosed += last >= 0 and ids[last] not in self._specials


class _template_faults:
    """A template is a program: what it raises on these messages is the training file's fault, or its own."""

    def __init__(self, line: int) -> None:
        self.line = line

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TemplateError | TypeError | ValueError | LookupError | AttributeError):
            raise TrainingError(
                f"Line {self.line}: the base's chat template does not accept these messages: {error}",
                param="training_file",
                code="chat_template_error",
            ) from error


def tokenize_rows(
    rows: Iterable[Row], tokenize: Tokenize, max_length: int, *, file: str, sha256: str
) -> DataSet:
    """Samples of at most `max_length` tokens with something to learn in each. Raises TrainingError if none is left."""
    if not getattr(tokenize.tokenizer, "is_fast", False):
        raise TrainingError(
            "this base's tokenizer does not tell where its tokens lie in the text (it is not a fast one), so "
            "the assistant's tokens cannot be told apart",
            param="model",
        )
    report = DataReport(file=file, sha256=sha256)
    kept: list[Sample] = []
    for row in rows:
        report.rows += 1
        before = len(kept)
        cut = False
        for sample in tokenize.samples(row):
            if len(sample) > max_length:
                cut = True
                report.truncated_tokens += len(sample) - max_length
                sample = Sample(sample.ids[:max_length], sample.mask[:max_length])
            if sample.trained:
                kept.append(sample)
        report.truncated_rows += cut
        report.dropped_rows += len(kept) == before
    _summarize(report, kept, tokenize, max_length)
    if not kept:
        raise TrainingError(
            f"{file}: no row has anything to learn within max_seq_length {max_length}", param="max_seq_length"
        )
    return DataSet(kept, report)


def _summarize(report: DataReport, kept: list[Sample], tokenize: Tokenize, max_length: int) -> None:
    lengths = sorted(len(sample) for sample in kept) or [0]
    report.samples = len(kept)
    report.tokens = sum(lengths)
    report.trained_tokens = sum(sample.trained for sample in kept)
    report.shortest, report.median, report.longest = lengths[0], lengths[len(lengths) // 2], lengths[-1]
    report.marked_by = " and ".join(sorted(tokenize.marked_by))
    say = report.warnings.append
    if report.truncated_rows:
        say(
            f"{report.truncated_rows} of {report.rows} rows are longer than max_seq_length {max_length} and were cut, "
            f"by {report.truncated_tokens} tokens together"
        )
    if report.dropped_rows:
        say(f"{report.dropped_rows} of {report.rows} rows were dropped: nothing to learn was left in them")
    if tokenize.unrolled:
        say(
            f"in {tokenize.unrolled} conversations the chat template writes earlier turns otherwise than it wrote them "
            "at first: each trained turn became a sample of its own"
        )
    if tokenize.unclosed:
        say(
            f"{tokenize.unclosed} samples end without a special token, so the model is not taught where to stop: "
            "the chat template writes none after the assistant's words"
        )
    if tokenize.train_on_inputs:
        say("train_on_inputs is set: the loss is on every token, the user's too")
    if 0 < report.rows < 10:
        say(f"only {report.rows} rows: expect the model to learn them by heart")
