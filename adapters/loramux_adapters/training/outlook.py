"""What a run would be, before anybody starts it: rows as they are read, what is trained on, steps and memory. No torch.

    outlook(base, tokenizer, recipe, Path("train.jsonl"), decoder=decoder, dtype_bytes=2)

Promises: a file is checked whole, and every fault is found that the run itself would find before its first step. At most
`TOKENIZED` rows are tokenized, the longest ones among them; where a file has more, lengths are estimated from these, and
`exact` is False. What is shown of a row is cut for people; what is counted is not. Nothing is trained or written.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux_adapters.spec import AdapterSpec
from loramux_adapters.training.batches import Unit, pack
from loramux_adapters.training.memory import (
    DecoderShape,
    TrainingMemory,
    adapter_parameters,
    training_memory,
)
from loramux_adapters.training.recipe import Recipe, ResolvedRecipe, TrainingBase, resolve, sequence_length
from loramux_adapters.training.rows import ChatRow, CompletionRow, Row, read_rows
from loramux_adapters.training.samples import Sample, Tokenize, tokenize_rows
from loramux_adapters.training.start import continued, new_spec

TOKENIZED = 200
SHOWN = 8
_SHOWN_TOKENS = 600
_SHOWN_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of a conversation; of other rows `role` is the key of the row."""

    role: str
    content: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring tokens of a row, as text, that are all trained on or all not."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class RowOutlook:
    line: int
    turns: tuple[Turn, ...]
    parts: tuple[Part, ...]
    tokens: int
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class Outlook:
    """`tokens` and `trained_tokens` are of one pass over the data; `memory` is what training adds to the base."""

    rows: int
    validation_rows: int
    exact: bool
    tokens: int
    trained_tokens: int
    longest: int
    recipe: ResolvedRecipe
    why: dict[str, str]
    trainable_parameters: int
    memory: TrainingMemory
    warnings: tuple[str, ...]
    shown: tuple[RowOutlook, ...]


def outlook(
    base: TrainingBase,
    tokenizer: Any,
    recipe: Recipe,
    training_file: Path,
    *,
    decoder: DecoderShape,
    dtype_bytes: int,
    validation_file: Path | None = None,
    initial: AdapterSpec | None = None,
    chat_template: str | None = None,
) -> Outlook:
    """Raises TrainingError. `initial` is the spec of the adapter that is trained further."""
    if initial is not None:
        recipe = continued(recipe, initial, base.geometry)
    length = sequence_length(recipe, base)
    tokenize = Tokenize(tokenizer, train_on_inputs=recipe.train_on_inputs, chat_template=chat_template)
    data = read_rows(training_file)
    held_out = [] if validation_file is None else read_rows(validation_file, param="validation_file").rows
    chosen = _chosen(data.rows)
    read = tokenize_rows(chosen, tokenize, length, file=data.name, sha256=data.sha256)
    share = sum(map(_characters, chosen)) / max(1, sum(map(_characters, data.rows)))
    lengths = _lengths([len(sample) for sample in read.samples], data.rows, chosen, length)
    units: Sequence[Unit] = [(index,) for index in range(len(lengths))]
    if recipe.packing:
        units = pack(lengths, length)
    resolved, why = resolve(recipe, base, len(units), validated=validation_file is not None)
    spec = initial if initial is not None else new_spec(resolved)
    targets = [base.geometry.linear_shapes[name] for name in spec.targets(base.geometry)]
    exact = len(chosen) == len(data.rows)
    return Outlook(
        rows=len(data.rows),
        validation_rows=len(held_out),
        exact=exact,
        tokens=sum(lengths),
        trained_tokens=read.report.trained_tokens if exact else round(read.report.trained_tokens / share),
        longest=max(lengths),
        recipe=resolved,
        why=why,
        trainable_parameters=adapter_parameters(targets, resolved.r),
        memory=training_memory(
            decoder,
            targets,
            r=resolved.r,
            tokens=_longest_batch(lengths, units, resolved.batch_size),
            dtype_bytes=dtype_bytes,
            optimizer=resolved.optimizer,
            dropout=resolved.lora_dropout > 0,
            longest=max(lengths),
            device=base.device,
            accumulates=resolved.gradient_accumulation_steps > 1,
        ),
        warnings=tuple(read.report.warnings),
        shown=tuple(_shown(row, tokenize, length, recipe.train_on_inputs) for row in data.rows[:SHOWN]),
    )


def _chosen(rows: Sequence[Row]) -> list[Row]:
    """All of them, or half the longest, which memory depends on, and half spread over the file."""
    if len(rows) <= TOKENIZED:
        return list(rows)
    half = TOKENIZED // 2
    longest = heapq.nlargest(half, range(len(rows)), key=lambda index: _characters(rows[index]))
    spread = range(0, len(rows), -(-len(rows) // half))
    return [rows[index] for index in sorted({*longest, *spread})]


def _lengths(known: list[int], rows: Sequence[Row], chosen: Sequence[Row], longest: int) -> list[int]:
    """Tokens of every sample; of rows that were not tokenized by what a character took in those that were."""
    lines = {row.line for row in chosen}
    if len(lines) == len(rows):
        return known
    each = sum(known) / max(1, sum(_characters(row) for row in chosen))
    others = (_characters(row) for row in rows if row.line not in lines)
    return known + [min(longest, max(1, round(size * each))) for size in others]


def _longest_batch(lengths: Sequence[int], units: Iterable[Unit], batch_size: int) -> int:
    return sum(heapq.nlargest(batch_size, (sum(lengths[index] for index in unit) for unit in units)))


def _characters(row: Row) -> int:
    if isinstance(row, ChatRow):
        return sum(len(message["content"]) + 16 for message in row.messages)
    if isinstance(row, CompletionRow):
        return len(row.prompt) + len(row.completion)
    return len(row.text)


def _shown(row: Row, tokenize: Tokenize, length: int, everything: bool) -> RowOutlook:
    samples = list(tokenize.samples(row))
    cut = [Sample(one.ids[:length], one.mask[:length]) for one in samples]
    return RowOutlook(
        line=row.line,
        turns=tuple(_turns(row, everything)),
        parts=tuple(_parts(cut[0], tokenize.tokenizer)),
        tokens=sum(len(one) for one in cut),
        trained_tokens=sum(one.trained for one in cut),
    )


def _turns(row: Row, everything: bool) -> Iterable[Turn]:
    if isinstance(row, ChatRow):
        for message, trained in zip(row.messages, row.weights, strict=True):
            content = message["content"] or json.dumps(message.get("tool_calls", []))
            yield Turn(message["role"], content[:_SHOWN_CHARACTERS], trained or everything)
    elif isinstance(row, CompletionRow):
        yield Turn("prompt", row.prompt[:_SHOWN_CHARACTERS], everything)
        yield Turn("completion", row.completion[:_SHOWN_CHARACTERS], True)
    else:
        yield Turn("text", row.text[:_SHOWN_CHARACTERS], True)


def _parts(sample: Sample, tokenizer: Any) -> Iterable[Part]:
    """Text of runs of tokens with the same mask, special tokens by their names."""
    ids, mask = sample.ids[:_SHOWN_TOKENS], sample.mask[:_SHOWN_TOKENS]
    start = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or mask[place] != mask[start]:
            yield Part(tokenizer.decode(list(ids[start:place])), bool(mask[start]))
            start = place
