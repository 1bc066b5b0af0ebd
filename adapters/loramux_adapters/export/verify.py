"""The proof: the exported files, read back, against the function that was served.

Served: NF4 codes recomputed from the base (or as the checkpoint brought them), dequantized to the server's
compute dtype, and the adapters applied beside them. Both sides run transformers' modeling code in fp32, so that
what differs is what was stored and not the noise of two bf16 computations. That noise is measured only when the
absolute thresholds are missed, as the yardstick for what a user of the server could notice. Promises: never two
models in memory (see `streamed.py`); nothing is taken over from the merge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from loramux_adapters.errors import ExportError
from loramux_adapters.export.agreement import Agreement, AgreementMeter, shortfalls
from loramux_adapters.export.checkpoint import Checkpoint
from loramux_adapters.export.options import Format, Onto, Quantization, VerifyOptions
from loramux_adapters.export.plan import ExportPlan
from loramux_adapters.export.skeleton import read_skeleton
from loramux_adapters.export.sources import ExportedSource, OtherBaseSource, Progress, ServedSource
from loramux_adapters.export.streamed import StreamedModel
from loramux_adapters.prompts import PROMPTS

LOGITS_AT_ONCE = 2**21  # positions times vocabulary

Phases = Callable[[str, int], Progress]
"""Phase name and its bytes -> what to tell of every weight that was loaded."""


@dataclass(frozen=True, slots=True)
class Proof:
    """`failures` is empty for a proven export.

    `required` is False where equality cannot be asked for (NF4 again, or another base): then nothing fails.
    `noise` is the server's own arithmetic against fp32, None when it was not needed.
    """

    export: Agreement
    other: Agreement | None
    noise: Agreement | None
    tokens_from: str
    tokens_sha256: str
    required: bool
    failures: tuple[str, ...]


def verify_bytes(plan: ExportPlan) -> int:
    """What a verification reads, without measuring the server's noise; 0 without a verification."""
    if not plan.options.verify.prompts:
        return 0
    return (2 if _compares(plan) else 1) * plan.read_bytes + plan.total_bytes


def _compares(plan: ExportPlan) -> bool:
    """The other base is another one only where NF4 was served and the 16-bit weights are there."""
    nf4 = plan.options.quantization is Quantization.NF4 and not plan.skeleton.prequantized
    return plan.options.verify.compare and nf4


def _onto_served(plan: ExportPlan) -> bool:
    return plan.options.onto is Onto.DEQUANTIZED or plan.options.quantization is Quantization.NONE


def verify_export(plan: ExportPlan, phases: Phases) -> Proof:
    """Compare `<out>.partial` with the served function. Raises ExportError if that cannot be done."""
    options = plan.options.verify
    texts = _Texts.read(plan, options)
    compare = _compares(plan)
    progress = phases("verify", verify_bytes(plan))
    served = _Run(StreamedModel(plan.skeleton.config, ServedSource(plan, progress)), texts)
    exported = Checkpoint.open(plan.options.partial)
    skeleton = read_skeleton(plan.options.partial, exported)
    runs = [_Run(StreamedModel(skeleton.config, ExportedSource(exported, skeleton, progress)), texts)]
    if compare:
        runs.append(_Run(StreamedModel(plan.skeleton.config, OtherBaseSource(plan, progress)), texts))
    export, *others = _compare(served, runs, texts.targets)
    required = plan.options.format is not Format.NF4 and _onto_served(plan)
    failures = shortfalls(export, options) if required else ()
    noise = None
    if failures and not options.strict and plan.served_dtype != torch.float32:
        source = ServedSource(plan, phases("noise", plan.read_bytes))
        rounded = _Run(StreamedModel(plan.skeleton.config, source, plan.served_dtype), texts)
        (noise,) = _compare(served, [rounded], texts.targets)
        failures = shortfalls(export, options, noise)
    other = others[0] if others else None
    return Proof(export, other, noise, texts.origin, texts.sha256, required, failures)


@dataclass(frozen=True, eq=False)
class _Texts:
    """`token_ids` `[prompts, longest]`, padded on the right; `targets` is each position's next token or -1."""

    token_ids: torch.Tensor
    lengths: tuple[int, ...]
    origin: str

    @classmethod
    def read(cls, plan: ExportPlan, options: VerifyOptions) -> _Texts:
        config = plan.skeleton.config.get_text_config()
        limit = min(options.tokens, int(getattr(config, "max_position_embeddings", options.tokens)))
        rows, origin = _tokens(plan, options, limit)
        rows = [row for row in rows if len(row) > 1]
        if not rows or max(map(max, rows)) >= int(config.vocab_size):
            raise ExportError(
                "the base's tokenizer does not fit its vocabulary, or the texts are empty", param="verify"
            )
        padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = torch.tensor(row)
        return cls(padded, tuple(map(len, rows)), origin)

    @property
    def sha256(self) -> str:
        """Of the token ids that were compared on, prompt by prompt."""
        rows = [row[:length].tolist() for row, length in zip(self.token_ids, self.lengths, strict=True)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @property
    def targets(self) -> torch.Tensor:
        following = torch.full_like(self.token_ids, -1)
        following[:, :-1] = self.token_ids[:, 1:]
        for row, length in enumerate(self.lengths):
            following[row, length - 1] = -1
        return self.positions(following)

    def positions(self, values: torch.Tensor) -> torch.Tensor:
        """`[prompts, longest, ...]` without the padding: `[positions, ...]`."""
        return torch.cat([row[:length] for row, length in zip(values, self.lengths, strict=True)])


def _tokens(plan: ExportPlan, options: VerifyOptions, limit: int) -> tuple[list[list[int]], str]:
    """A base without a tokenizer is compared on fixed pseudo-random tokens: the same function, if not its use."""
    texts = (options.texts or PROMPTS)[: options.prompts]
    directory = plan.checkpoint.directory
    if any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ExportError(f"the base's tokenizer cannot be loaded: {error}", param="verify") from error
        rows = [list(tokenizer.encode(text))[:limit] for text in texts]
        return rows, "given texts" if options.texts else "built-in texts"
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(plan.skeleton.config.get_text_config().vocab_size)
    rows = [torch.randint(vocabulary, (limit,), generator=generator).tolist() for _ in texts]
    return rows, "pseudo-random tokens, because the base has no tokenizer"


class _Run:
    """A model and the last hidden states `[positions, width]` it gave for the texts."""

    def __init__(self, model: StreamedModel, texts: _Texts) -> None:
        self.model = model
        self.hidden = texts.positions(model.hidden(texts.token_ids))


def _compare(served: _Run, runs: list[_Run], targets: torch.Tensor) -> list[Agreement]:
    meters = [AgreementMeter() for _ in runs]
    with ExitStack() as stack:
        reference, *heads = [stack.enter_context(run.model.head()) for run in (served, *runs)]
        for head in heads:
            head.share(reference)
        step = max(1, LOGITS_AT_ONCE // reference.vocabulary)
        for start in range(0, len(targets), step):
            piece = slice(start, start + step)
            expected = reference.logits(served.hidden[piece])
            for meter, head, run in zip(meters, heads, runs, strict=True):
                meter.add(head.logits(run.hidden[piece]), expected, targets[piece])
    return [meter.result() for meter in meters]
