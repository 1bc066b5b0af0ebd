"""Rows run in pieces: cut by lengths alone, and the same losses and gradients as in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from loramux_adapters.training.loss import cross_entropy
from loramux_adapters.training.pieces import Piece, cut
from tests.adapters.training.reference import factors, packed_loss, peft_model, row_loss
from tests.adapters.training.support import load_tiny, make_trainer, random_samples, run_slices
from tests.adapters.training.test_gradients import BF16_BOUND, FP32_BOUND, gradients_of_step, worst

SIZE = 16
LENGTHS = (37, 5, 9, 16, 21, 33)  # cut into three, two that share a piece, one that fills it, two, three


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(1, 40))
def test_every_token_is_in_one_piece_and_none_is_too_long(lengths: list[int], size: int) -> None:
    pieces = cut(lengths, size)
    assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
    assert pieces[-1].end == sum(lengths)
    assert all(0 < piece.end - piece.start <= size for piece in pieces)
    positions = torch.cat([piece.positions(torch.device("cpu")) for piece in pieces])
    assert positions.tolist() == [place for length in lengths for place in range(length)]
    for piece in pieces:
        assert sum(length for _, length in piece.segments) == piece.end - piece.start
        assert piece.carried is None or len(piece.segments) == 1


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])  # gemma2: windows and capped scores
def test_gradients_are_those_of_whole_samples(architecture: str, tiny_model: Callable[[str], Path]) -> None:
    directory = tiny_model(architecture)
    base, samples = load_tiny(directory), random_samples(*LENGTHS)
    trainer = make_trainer(base, samples, batch_size=len(samples), max_grad_norm=0.0)
    trainer._stack.piece_tokens = SIZE
    peft = peft_model(directory, base, trainer.adapter)
    trained = sum(sample.trained for sample in samples)
    loss = torch.stack([row_loss(peft, sample) for sample in samples]).sum() / trained
    loss.backward()
    theirs = {name: p.grad for name, p in factors(peft, trainer.adapter).items() if p.grad is not None}
    ours, report = gradients_of_step(trainer)
    assert worst(ours, theirs) < FP32_BOUND
    assert report.train_loss == pytest.approx(loss.item(), rel=1e-5)


def test_where_the_lowest_trained_layer_has_no_keys_to_train(tiny_model: Callable[[str], Path]) -> None:
    directory = tiny_model("llama")
    base, samples = load_tiny(directory), random_samples(40)
    targets = ["layers.1.mlp.up_proj", "layers.2.self_attn.v_proj"]
    trainer = make_trainer(base, samples, target_modules=targets, max_grad_norm=0.0)
    trainer._stack.piece_tokens = SIZE
    peft = peft_model(directory, base, trainer.adapter)
    (row_loss(peft, samples[0]) / samples[0].trained).backward()
    theirs = {name: p.grad for name, p in factors(peft, trainer.adapter).items() if p.grad is not None}
    ours, _ = gradients_of_step(trainer)
    assert worst(ours, theirs) < FP32_BOUND


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", FP32_BOUND), ("bfloat16", BF16_BOUND)], ids=["fp32", "bf16"]
)
def test_with_dropout_accumulation_and_packing(
    dtype: str, bound: float, tiny_model: Callable[[str], Path]
) -> None:
    directory = tiny_model("llama")
    base, samples = load_tiny(directory, dtype), random_samples(*LENGTHS)
    trainer = make_trainer(
        base, samples, [(0, 1, 2), (3, 4, 5)], batch_size=1, gradient_accumulation_steps=2,
        lora_dropout=0.3, max_grad_norm=0.0,
    )  # fmt: skip
    trainer._stack.piece_tokens = SIZE
    peft = peft_model(directory, base, trainer.adapter)
    trained = sum(sample.trained for sample in samples)
    dropout: Any = trainer.adapter.dropout
    for micro, unit in enumerate(trainer._batches.of_step(0)):
        chosen = [samples[index] for index in unit]
        pieces = cut([len(sample) for sample in chosen], SIZE)
        trainer.adapter.dropout = _Piecewise(dropout, micro, pieces)  # type: ignore[assignment]
        (packed_loss(peft, chosen) / trained).backward()
    trainer.adapter.dropout = dropout
    theirs = {name: p.grad for name, p in factors(peft, trainer.adapter).items() if p.grad is not None}
    ours, _ = gradients_of_step(trainer)
    assert worst(ours, theirs) < bound


class _Piecewise:
    """The masks of a row as the trainer draws them for its pieces."""

    def __init__(self, dropout: Any, micro: int, pieces: list[Piece]) -> None:
        self._dropout, self._micro, self._pieces = dropout, micro, pieces

    def __call__(self, x: torch.Tensor, name: str) -> torch.Tensor:
        parts = []
        for piece in self._pieces:
            self._dropout.enter(0, self._micro, piece.start)
            parts.append(self._dropout(x[:, piece.start : piece.end], name))
        return torch.cat(parts, dim=1)


def test_validation_in_pieces(tiny_model: Callable[[str], Path]) -> None:
    samples = random_samples(*LENGTHS)
    trainer = make_trainer(load_tiny(tiny_model("mistral")), samples, batch_size=3)
    whole = run_slices(trainer.evaluate(samples))
    trainer._stack.piece_tokens = SIZE
    assert run_slices(trainer.evaluate(samples)).loss == pytest.approx(whole.loss, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(7, 50, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(50, (7,), generator=generator)
    expected = F.cross_entropy(logits.float(), targets, reduction="sum") / 3
    (gradient,) = torch.autograd.grad(expected, logits)
    found = cross_entropy(logits.detach(), targets, scale=1 / 3, gradient=True)
    assert found.gradient is not None
    assert found.gradient.dtype == dtype
    torch.testing.assert_close(found.loss, expected.detach())
    torch.testing.assert_close(found.gradient, gradient)
    assert int(found.correct) == int((logits.argmax(-1) == targets).sum())
    assert cross_entropy(logits.detach(), targets, gradient=False).gradient is None
