"""The proof: the exported files, read back, against the function that was served.

Served: NF4 codes recomputed from the base (or as the checkpoint brought them), dequantized to the server's
compute dtype, and the adapters applied beside them. Both sides run transformers' modeling code in fp32, so
that what differs is what was stored and not the noise of two bf16 computations. Promises: never two models in
memory (see `streamed.py`); nothing is taken over from the merge. Does not decide what to do about a failed
proof.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch

from loramux_adapters.errors import ExportError
from loramux_adapters.export.checkpoint import Checkpoint
from loramux_adapters.export.linears import Delta, read_linear, row_pieces
from loramux_adapters.export.options import Format, Onto, VerifyOptions
from loramux_adapters.export.plan import ExportPlan, TensorPlan
from loramux_adapters.export.prompts import PROMPTS
from loramux_adapters.export.quantized import is_packed, read_packed
from loramux_adapters.export.skeleton import BaseSkeleton, read_skeleton
from loramux_adapters.export.streamed import StreamedModel, WeightSource

POSITIONS_AT_ONCE = 64

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How close a model's next-token distributions are to the served ones, over `positions` positions.

    `kl` is the mean of KL(model || served) in nats, `top1` the share of equal most likely tokens, `loss` the
    mean negative log-likelihood of the texts' next tokens.
    """

    positions: int
    kl: float
    kl_max: float
    top1: float
    max_logit_difference: float
    loss: float
    served_loss: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Proof:
    """`failures` is empty for a proven export; `required` is False where no equality can be asked for."""

    export: Agreement
    other: Agreement | None
    tokens_from: str
    required: bool
    failures: tuple[str, ...]


def verify_export(plan: ExportPlan, progress: Progress) -> Proof:
    """Compare `<out>.partial` with the served function. `progress` hears of every weight byte that was
    loaded.
    """
    options = plan.options.verify
    token_ids, lengths, tokens_from = tokenize(plan, options)
    exported = Checkpoint.open(plan.options.partial)
    skeleton = read_skeleton(plan.options.partial, exported)
    sources: list[tuple[BaseSkeleton, WeightSource]] = [
        (plan.skeleton, _Served(plan, progress)),
        (skeleton, _Exported(exported, skeleton, progress)),
    ]
    if options.compare and not plan.skeleton.prequantized:
        sources.append((plan.skeleton, _OtherBase(plan, progress)))
    models = [StreamedModel(skeleton.config, source) for skeleton, source in sources]
    hidden = [_positions(model.hidden(token_ids), lengths) for model in models]
    agreements = _compare(models, hidden, _next_tokens(token_ids, lengths))
    required = plan.options.format is not Format.NF4 and plan.options.onto is Onto.DEQUANTIZED
    failures = _failures(agreements[0], options) if required else ()
    other = agreements[1] if len(agreements) > 1 else None
    return Proof(agreements[0], other, tokens_from, required, failures)


def tokenize(plan: ExportPlan, options: VerifyOptions) -> tuple[torch.Tensor, list[int], str]:
    """Right-padded ids `[prompts, longest]`, each prompt's length, and where the tokens come from.

    A base without a tokenizer is compared on fixed pseudo-random tokens: the same function, if not the same
    use.
    """
    texts = (options.texts or PROMPTS)[: options.prompts]
    vocabulary = int(plan.skeleton.config.get_text_config().vocab_size)
    limit = min(options.tokens, int(getattr(plan.skeleton.config, "max_position_embeddings", options.tokens)))
    directory = plan.checkpoint.directory
    if any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ExportError(f"the base's tokenizer cannot be loaded: {error}", param="verify") from error
        rows = [tokenizer.encode(text)[:limit] for text in texts]
        origin = "built-in texts" if not options.texts else "given texts"
    else:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(vocabulary, (limit,), generator=generator).tolist() for _ in texts]
        origin = "pseudo-random tokens, because the base has no tokenizer"
    rows = [row for row in rows if len(row) > 1]
    if not rows or max(map(max, rows)) >= vocabulary:
        raise ExportError("the base's tokenizer does not fit its vocabulary", param="verify")
    lengths = [len(row) for row in rows]
    padded = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
    return padded, lengths, origin


class _Served:
    """The served function's weights, and the adapters beside them."""

    def __init__(self, plan: ExportPlan, progress: Progress) -> None:
        self._plan = plan
        self._progress = progress
        self._linears: dict[str, TensorPlan] = {t.source.name: t for t in plan.tensors if t.module}
        self._deltas = {
            module: Delta(module, plan.adapters)
            for module in dict.fromkeys(name for a in plan.adapters for name in a.weights.tensors)
        }

    def load(self, name: str) -> torch.Tensor:
        plan = self._plan
        stored = _stored_name(name, plan.checkpoint, plan.skeleton)
        self._progress(plan.checkpoint.tensors[stored].num_bytes)
        if stored in self._linears:
            return self.linear(self._linears[stored]).float()
        return plan.checkpoint.read(stored).to(plan.served_dtype).float()

    def linear(self, tensor: TensorPlan) -> torch.Tensor:
        return read_linear(self._plan, tensor).served(self._plan.served_dtype)

    def adapt(self, module: str, x: torch.Tensor) -> torch.Tensor | None:
        delta = self._deltas.get(module)
        return None if delta is None else (x @ delta.a.T) @ delta.b.T


class _OtherBase(_Served):
    """What merging onto the base that was not chosen would have given, in the export's dtype."""

    def linear(self, tensor: TensorPlan) -> torch.Tensor:
        plan = self._plan
        onto = Onto.ORIGINAL if plan.options.onto is Onto.DEQUANTIZED else Onto.DEQUANTIZED
        linear = read_linear(plan, tensor, codes=onto is Onto.DEQUANTIZED, original=onto is Onto.ORIGINAL)
        merged = linear.base(onto, plan.served_dtype).float()
        delta = self._deltas.get(tensor.module or "")
        if delta is not None:
            for start, stop in row_pieces(tensor.shape):
                merged[start:stop] += delta.rows(start, stop)
        return merged.to(plan.output_dtype)

    def adapt(self, module: str, x: torch.Tensor) -> torch.Tensor | None:
        return None


class _Exported:
    """The files as they were written."""

    def __init__(self, checkpoint: Checkpoint, skeleton: BaseSkeleton, progress: Progress) -> None:
        self._checkpoint = checkpoint
        self._skeleton = skeleton
        self._progress = progress

    def load(self, name: str) -> torch.Tensor:
        stored = _stored_name(name, self._checkpoint, self._skeleton)
        self._progress(self._checkpoint.tensors[stored].num_bytes)
        if is_packed(self._checkpoint, stored):
            return read_packed(self._checkpoint, stored).dequantize(self._skeleton.dtype).float()
        return self._checkpoint.read(stored).float()

    def adapt(self, module: str, x: torch.Tensor) -> torch.Tensor | None:
        return None


def _stored_name(name: str, checkpoint: Checkpoint, skeleton: BaseSkeleton) -> str:
    return name if name in checkpoint.tensors else skeleton.tied[name]


def _positions(states: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """`[batch, longest, width]` without the padding: `[positions, width]`."""
    return torch.cat([row[:length] for row, length in zip(states, lengths, strict=True)])


def _next_tokens(token_ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The token after each position, -1 after a prompt's last."""
    rows = []
    for row, length in zip(token_ids, lengths, strict=True):
        rows.append(torch.cat([row[1:length], torch.tensor([-1])]))
    return torch.cat(rows)


class _Meter:
    """Sums over positions, in fp64."""

    def __init__(self) -> None:
        self.positions = self.agreeing = self.scored = 0
        self.kl = self.kl_max = self.difference = self.loss = self.served_loss = 0.0

    def add(self, logits: torch.Tensor, served: torch.Tensor, targets: torch.Tensor) -> None:
        """Logits `[positions, vocabulary]` in fp32; `targets` -1 where there is no next token."""
        log_p, log_q = (x.double().log_softmax(dim=-1) for x in (logits, served))
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        self.positions += len(logits)
        self.kl += float(kl.sum())
        self.kl_max = max(self.kl_max, float(kl.max()))
        self.agreeing += int((logits.argmax(-1) == served.argmax(-1)).sum())
        self.difference = max(self.difference, float((logits - served).abs().max()))
        known = targets >= 0
        chosen = targets[known].unsqueeze(-1)
        self.scored += int(known.sum())
        self.loss -= float(log_p[known].gather(-1, chosen).sum())
        self.served_loss -= float(log_q[known].gather(-1, chosen).sum())

    def result(self) -> Agreement:
        return Agreement(
            positions=self.positions,
            kl=max(self.kl / self.positions, 0.0),
            kl_max=self.kl_max,
            top1=self.agreeing / self.positions,
            max_logit_difference=self.difference,
            loss=self.loss / self.scored,
            served_loss=self.served_loss / self.scored,
        )


def _compare(
    models: list[StreamedModel], hidden: list[torch.Tensor], targets: torch.Tensor
) -> list[Agreement]:
    """Each model after the first against the first."""
    meters = [_Meter() for _ in models[1:]]
    with ExitStack() as stack:
        heads = [stack.enter_context(model.head()) for model in models]
        for head in heads[1:]:  # the head is rarely touched by an export: hold equal weights once
            if torch.equal(head.module.weight, heads[0].module.weight):  # type: ignore[arg-type]
                head.module.weight = heads[0].module.weight
        for start in range(0, len(targets), POSITIONS_AT_ONCE):
            piece = slice(start, start + POSITIONS_AT_ONCE)
            served, *others = (head.logits(states[piece]) for head, states in zip(heads, hidden, strict=True))
            for meter, logits in zip(meters, others, strict=True):
                meter.add(logits, served, targets[piece])
    return [meter.result() for meter in meters]


def _failures(agreement: Agreement, options: VerifyOptions) -> tuple[str, ...]:
    failures = []
    if not agreement.kl <= options.max_kl:
        failures.append(f"KL {agreement.kl:.2e} is above {options.max_kl:.0e}")
    if not agreement.top1 >= options.min_top1:
        failures.append(f"top-1 agreement {agreement.top1:.2%} is below {options.min_top1:.1%}")
    return tuple(failures)


def progress_total(plan: ExportPlan) -> int:
    """The bytes `verify_export` will report."""
    if not plan.options.verify.prompts:
        return 0
    passes = 2 if plan.options.verify.compare and not plan.skeleton.prequantized else 1
    return passes * plan.read_bytes + plan.total_bytes
