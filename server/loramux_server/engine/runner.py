"""The only file that runs the model: a step's tokens in, logits of the rows that sample out.

Promises: one forward pass per step for all sequences, decoding and prompt chunks of any adapters alike; modeling code is
transformers', unmodified. The step's tensors are built on the CPU and moved once.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch

from loramux_adapters.bank import AdapterBank
from loramux_adapters.errors import BaseModelError
from loramux_adapters.transfer import on_device
from loramux_server.base.loading import ResidentBase
from loramux_server.engine import attention
from loramux_server.engine.attention_kernels import AttentionShape, attention_kernels
from loramux_server.engine.decode_graphs import CudaRecorder, DecodeGraphs, Record, replay_seconds
from loramux_server.engine.kv_store import KVStore
from loramux_server.engine.paged_batch import Chunk, PagedBatch
from loramux_server.engine.recorded_adapters import recorded_adapters
from loramux_server.engine.recorded_inputs import RecordedInputs
from loramux_server.engine.sampler import score_prompt
from loramux_server.engine.sequence import Scheduled, Sequence
from loramux_server.engine.tape import MOST_ROWS, PARTS, TapeRecorder


def kv_bytes_per_token(base: ResidentBase) -> int:
    """Bytes of keys and values one token takes in all layers."""
    layers, heads, head_dim = _kv_shape(base)
    return layers * 2 * heads * head_dim * base.dtype.itemsize


def _kv_shape(base: ResidentBase) -> tuple[int, int, int]:
    config = base.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, head_dim


def _same(some: SequenceOf[Scheduled], others: SequenceOf[Scheduled]) -> bool:
    """Whether they are the very same items."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _own_blocks(sequence: Sequence, length: int, block_size: int) -> list[int]:
    """The blocks that hold its first `length` tokens."""
    return sequence.blocks[: -(-length // block_size)]


@dataclass(frozen=True, slots=True)
class _Layout:
    """All that is known of a step before its tokens are."""

    scheduled: SequenceOf[Scheduled]  # as they were given
    items: list[Scheduled]  # as their rows lie: decoding sequences first, which attention runs as one batch
    positions: list[int]  # of each row
    generations: list[str | None]  # of each row
    drawn: list[int]  # rows that are drawn from, in the order of `scheduled`
    paged: PagedBatch  # on the CPU


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """What graphs are recorded for: rows of a step, and tokens of a sequence, at most."""

    rows: int
    length: int


class ModelRunner:
    def __init__(
        self,
        base: ResidentBase,
        bank: AdapterBank,
        *,
        num_blocks: int,
        block_size: int,
        graph_limits: GraphLimits | None = None,
    ) -> None:
        """Without `graph_limits` no step is recorded; nor is one on CPUs without compiled kernels."""
        self.base = base
        self.bank = bank
        layers, kv_heads, head_dim = _kv_shape(base)
        shape = AttentionShape(block_size, base.config.num_attention_heads, kv_heads, head_dim)
        self.kernels = attention_kernels(base.device, base.dtype, shape, base.native)
        self.store = KVStore(
            layers, num_blocks, block_size, kv_heads, head_dim, base.dtype, base.device, base.native
        )
        self._self_check()
        base.model.set_attn_implementation(attention.NAME)
        self._prepared: _Layout | None = None
        self.graphs: DecodeGraphs | None = None
        if graph_limits is not None and self.kernels.decode is not None:
            if base.device.type == "cuda":
                self.graphs = self.decode_graphs(graph_limits, CudaRecorder(base.device))
            elif base.native is not None and bank.pool.by_rows is not None:
                limits = replace(graph_limits, rows=min(graph_limits.rows + max(PARTS), MOST_ROWS))
                self.graphs = self.decode_graphs(limits, TapeRecorder(), PARTS)

    def decode_graphs(self, limits: GraphLimits, record: Record, parts: SequenceOf[int] = ()) -> DecodeGraphs:
        blocks = -(-limits.length // self.store.block_size)
        return DecodeGraphs(
            self._forward,
            recorded_adapters(self.bank, limits.rows, replay_seconds(self.base.device, record)),
            RecordedInputs(self.store, self.kernels, max_rows=limits.rows, max_blocks=blocks),
            record,
            max_rows=limits.rows,
            parts=parts if self.kernels.prefill is not None else (),
        )

    def prepare(self, scheduled: SequenceOf[Scheduled]) -> None:
        """Lay a step out that has not come yet: the one after each of its sequences has computed one more token."""
        starts = {item.sequence.id: item.sequence.num_computed + 1 for item in scheduled}
        self._prepared = self._lay_out(scheduled, starts)

    @torch.inference_mode()
    def run(self, scheduled: SequenceOf[Scheduled]) -> torch.Tensor:
        """Logits `[draws, vocab]` in fp32 for all draws of the items, in the order they were given.

        Prompts whose log-probabilities were asked for are scored on the way. On CUDA it does not wait for the device.
        """
        layout, self._prepared = self._prepared, None
        if layout is None or not _same(layout.scheduled, scheduled):
            layout = self._lay_out(
                scheduled, {item.sequence.id: item.sequence.num_computed for item in scheduled}
            )
        tokens = [token for item in layout.items for token in item.tokens]
        drawn, paged = layout.drawn, layout.paged
        scored = self._scored_rows(layout.items)
        if self.graphs is not None and drawn == list(range(paged.num_decodes)) and not scored:
            replayed = self.graphs.run(tokens, layout.positions, layout.generations, paged)
            if replayed is not None:
                return replayed.to(torch.float32, copy=True)
        self.bank.set_adapter(layout.generations)
        device = self.base.device
        kept = drawn + scored
        logits = self._forward(
            on_device([tokens], device),
            on_device([layout.positions], device),
            on_device(kept or [0], device),
            paged.to(device),
        )
        row = len(drawn)
        for item in layout.items:
            if positions_of := item.sequence.unscored(item.count):
                score_prompt(item.sequence, positions_of, logits[row : row + len(positions_of)])
                row += len(positions_of)
        return logits[: len(drawn)].float()

    def _lay_out(self, scheduled: SequenceOf[Scheduled], starts: Mapping[str, int]) -> _Layout:
        """`starts`: the position of each item's first token, by its sequence's id."""
        order = sorted(range(len(scheduled)), key=lambda i: scheduled[i].num_known > 1)
        items = [scheduled[i] for i in order]
        positions: list[int] = []
        generations: list[str | None] = []
        for item in items:
            start = starts[item.sequence.id]
            positions += range(start, start + item.count)
            generations += [item.sequence.generation] * item.count
        paged = self._paged_batch(items, starts)
        return _Layout(scheduled, items, positions, generations, self._drawn_rows(items, order), paged)

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor, paged: PagedBatch
    ) -> torch.Tensor:
        """Logits `[k, vocab]` of the rows `kept [k]`; tokens and positions are `[1, T]`."""
        output = self.base.model(
            input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=kept, paged=paged
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    @staticmethod
    def _drawn_rows(items: list[Scheduled], order: list[int]) -> list[int]:
        """Rows of the last known token of each item that samples, and of its drafts, back in the scheduler's order."""
        drawn = [range(0)] * len(items)
        row = 0
        for index, item in zip(order, items, strict=True):
            row += item.count
            if item.samples:
                drawn[index] = range(row - 1 - len(item.drafts), row)
        return [row for rows in drawn for row in rows]

    @staticmethod
    def _scored_rows(items: list[Scheduled]) -> list[int]:
        """Rows of the prompt tokens whose successors are to be scored, item after item."""
        rows: list[int] = []
        start = 0
        for item in items:
            first = item.sequence.num_computed
            rows += [start + position - first for position in item.sequence.unscored(item.count)]
            start += item.count
        return rows

    def _paged_batch(self, items: list[Scheduled], starts: Mapping[str, int]) -> PagedBatch:
        size = self.store.block_size
        slots: list[int] = []
        begun: list[int] = []
        chunks: list[Chunk] = []
        decodes = [item for item in items if item.num_known == 1]
        for item in items:
            sequence, start = item.sequence, starts[item.sequence.id]
            for position in range(start, start + item.count):
                slots.append(sequence.blocks[position // size] * size + position % size)
            last, filled = divmod(start + item.count, size)
            # A kernel reads no further than a sequence goes.
            if filled and last * size >= start and self.kernels.decode is None:
                begun.append(sequence.blocks[last])
            if item.num_known > 1:
                blocks = torch.tensor(_own_blocks(sequence, start + item.count, size))
                chunks.append(Chunk(len(slots) - item.count, item.count, start, blocks))
        # A draft is one more row over the same blocks, which sees a token more than the row before it.
        seen = [
            (item.sequence, starts[item.sequence.id] + place)
            for item in decodes
            for place in range(1, item.count + 1)
        ]
        lengths = [length for _, length in seen]
        tables = [_own_blocks(sequence, length, size) for sequence, length in seen]
        width = max(map(len, tables), default=0)
        # A sequence's table is filled up with its own first block: what is masked must still be a number.
        table = [own + own[:1] * (width - len(own)) for own in tables]
        return PagedBatch(
            slots=torch.tensor(slots),
            begun=torch.tensor(begun, dtype=torch.long),
            num_decodes=len(seen),
            block_table=torch.tensor(table, dtype=torch.long).view(len(seen), width),
            lengths=torch.tensor(lengths, dtype=torch.long),
            chunks=chunks,
            store=self.store,
            kernels=self.kernels,
        )

    @torch.inference_mode()
    def _self_check(self) -> None:
        """Our attention against transformers' own on one short prompt, whole and split; a wrong base never serves.

        Raises BaseModelError if the logits differ by more than rounding.
        """
        base = self.base
        count = min(24, base.max_position)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, base.config.vocab_size, (1, count), generator=generator).to(base.device)
        positions = torch.arange(count, device=base.device)[None]
        implementation = base.config._attn_implementation
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # in which the CPU's kernels leave the work to torch
            reference = (
                base.model(input_ids=tokens, position_ids=positions, use_cache=False).logits[0].float()
            )
        base.model.set_attn_implementation(attention.NAME)
        try:
            ours = [
                base.model(
                    input_ids=tokens[:, start:stop],
                    position_ids=positions[:, start:stop],
                    use_cache=False,
                    paged=self._probe_batch(start, stop),
                ).logits[0]
                for start, stop in ((0, count - 4), (count - 4, count - 1), (count - 1, count))
            ]
        except (TypeError, RuntimeError) as error:
            raise BaseModelError(
                f"{type(base.model).__name__} does not run on the paged KV cache: {error}", param="model"
            ) from error
        finally:
            base.model.set_attn_implementation(implementation)
        # Relative to the logits' size: single logits of a 16-bit model move by several units in the last place.
        distance = (torch.cat(ours).float() - reference).norm().item() / max(reference.norm().item(), 1e-6)
        bound = 1e-3 if base.dtype == torch.float32 else 0.1
        if not distance <= bound:
            raise BaseModelError(
                f"{type(base.model).__name__} gives other logits on the paged KV cache than in transformers "
                f"(relative error {distance:.3g}, at most {bound:g} is rounding); it is not supported",
                param="model",
            )

    def _probe_batch(self, start: int, stop: int) -> PagedBatch:
        size = self.store.block_size
        device = self.base.device
        blocks = torch.arange(-(-stop // size), device=device)
        decode = stop - start == 1
        return PagedBatch(
            slots=torch.arange(start, stop, device=device),
            begun=blocks[:0],
            num_decodes=int(decode),
            block_table=blocks[None] if decode else blocks.new_zeros((0, 0)),
            lengths=torch.tensor([stop] if decode else [], dtype=torch.long, device=device),
            chunks=[] if decode else [Chunk(0, stop - start, start, blocks)],
            store=self.store,
            kernels=self.kernels,
        )
