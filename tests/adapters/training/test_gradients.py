"""The gradients of the layer-wise step against a plain backward pass of Hugging Face's model under PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.training.trainer import Trainer
from tests.adapters.training.reference import factors, packed_loss, peft_model, row_loss
from tests.adapters.training.support import load_tiny, make_trainer, random_samples, run_slices
from tests.conftest import TINY_CONFIGS

FP32_BOUND = 1e-4  # relative, of the worst tensor
BF16_BOUND = 0.07  # both sides round, ours not every product; PEFT multiplies the factors in fp32, we in bf16


def gradients_of_step(trainer: Trainer) -> tuple[dict[str, torch.Tensor], Any]:
    """What the optimizer would see, before clipping."""
    seen: dict[str, torch.Tensor] = {}
    step = trainer.optimizer.step

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.update({name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None})
        return step(*args, **kwargs)

    trainer.optimizer.step = spy  # type: ignore[method-assign]
    report = run_slices(trainer.slices())
    return seen, report


def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


@pytest.mark.parametrize("architecture", list(TINY_CONFIGS))
def test_every_architecture(architecture: str, tiny_model: Callable[[str], Path]) -> None:
    directory = tiny_model(architecture)
    base = load_tiny(directory)
    samples = random_samples(37, 21, 9)
    trainer = make_trainer(base, samples, batch_size=3, max_grad_norm=0.0)
    peft = peft_model(directory, base, trainer.adapter)
    trained = sum(sample.trained for sample in samples)
    loss = torch.stack([row_loss(peft, sample) for sample in samples]).sum() / trained
    loss.backward()
    theirs = {name: p.grad for name, p in factors(peft, trainer.adapter).items() if p.grad is not None}
    ours, report = gradients_of_step(trainer)
    assert worst(ours, theirs) < FP32_BOUND
    assert report.train_loss == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    assert report.grad_norm == pytest.approx(float(norm), rel=1e-4)
    assert (report.tokens, report.trained_tokens) == (67, trained)


def test_what_an_adapter_adds_first_is_not_lost_in_bf16(tiny_model: Callable[[str], Path]) -> None:
    """A thousandth of the base's output is less than half of bf16's last bit."""
    trainer = make_trainer(load_tiny(tiny_model("llama"), "bfloat16"), random_samples(9))
    x = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    for layer in trainer.adapter.layers.values():
        given = x.repeat(1, 1, layer.lora_a.shape[1] // 64)
        with torch.no_grad():
            base = layer.base_layer(given).float()
            share = given.float() @ layer.lora_a.T @ layer.lora_b.T * layer.scaling
            layer.lora_b *= 1e-3 * base.norm() / share.norm()
            expected = given.float() @ layer.lora_a.T @ layer.lora_b.T * layer.scaling
            added = layer(given).float() - base
        assert float((added - expected).norm() / expected.norm()) < 0.02, layer.name


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", FP32_BOUND), ("bfloat16", BF16_BOUND)], ids=["fp32", "bf16"]
)
def test_dropout_accumulation_and_packing(
    dtype: str, bound: float, tiny_model: Callable[[str], Path]
) -> None:
    directory = tiny_model("llama")
    base = load_tiny(directory, dtype)
    samples = random_samples(30, 12, 25, 8, 17)
    units = [(0, 3), (2,), (4, 1)]
    trainer = make_trainer(
        base,
        samples,
        units,
        batch_size=1,
        gradient_accumulation_steps=3,
        lora_dropout=0.3,
        max_grad_norm=0.0,
        use_rslora=True,
    )
    peft = peft_model(directory, base, trainer.adapter)
    trained = sum(sample.trained for sample in samples)
    for micro, unit in enumerate(trainer._batches.of_step(0)):
        trainer.adapter.dropout.enter(0, micro)
        (packed_loss(peft, [samples[index] for index in unit]) / trained).backward()
    theirs = {name: p.grad for name, p in factors(peft, trainer.adapter).items() if p.grad is not None}
    ours, _ = gradients_of_step(trainer)
    assert worst(ours, theirs) < bound


def test_dropout_drops_and_differs_by_moment_and_module(tiny_model: Callable[[str], Path]) -> None:
    trainer = make_trainer(load_tiny(tiny_model("llama")), random_samples(20), lora_dropout=0.5)
    dropout, x = trainer.adapter.dropout, torch.ones(100, 64)
    assert torch.equal(dropout(x, "a"), x)  # outside of a micro-batch
    dropout.enter(3, 1)
    first = dropout(x, "a")
    assert float((first == 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(first, dropout(x, "a"))
    assert not torch.equal(first, dropout(x, "b"))
    dropout.enter(3, 2)
    assert not torch.equal(first, dropout(x, "a"))


def test_clipping_scales_the_whole_gradient(tiny_model: Callable[[str], Path]) -> None:
    base, samples = load_tiny(tiny_model("llama")), random_samples(30)
    free, report = gradients_of_step(make_trainer(base, samples, max_grad_norm=0.0))
    clipped, same = gradients_of_step(make_trainer(base, samples, max_grad_norm=report.grad_norm / 10))
    assert same.grad_norm == pytest.approx(report.grad_norm)
    assert worst(clipped, {name: gradient / 10 for name, gradient in free.items()}) < 1e-4


def test_only_the_layers_above_the_lowest_target_are_repeated(tiny_model: Callable[[str], Path]) -> None:
    directory = tiny_model("llama")
    base, samples = load_tiny(directory), random_samples(25)
    trainer = make_trainer(
        base, samples, target_modules=["layers.1.self_attn.q_proj", "layers.2.mlp.up_proj"]
    )
    peft = peft_model(directory, base, trainer.adapter)
    (row_loss(peft, samples[0]) / samples[0].trained).backward()
    theirs = {name: p.grad for name, p in factors(peft, trainer.adapter).items() if p.grad is not None}
    ours, _ = gradients_of_step(make_trainer(base, samples, target_modules=list(trainer.adapter.spec.target_modules),
                                             max_grad_norm=0.0))  # fmt: skip
    assert worst(ours, theirs) < FP32_BOUND
    assert sum(1 for _ in trainer.slices()) == 3 + 1 + 2 * 2  # forward, loss, two layers again and back


def test_packed_samples_do_not_see_each_other(tiny_model: Callable[[str], Path]) -> None:
    """The loss of a packed batch is that of its rows alone, in sliding windows too."""
    for architecture in ("llama", "mistral", "gemma2"):
        base = load_tiny(tiny_model(architecture))
        samples = random_samples(33, 20, 11)
        trainer = make_trainer(base, samples, [(0, 1, 2)], packing=True)
        together = run_slices(trainer.evaluate(samples))
        alone = [run_slices(trainer.evaluate([sample])) for sample in samples]
        assert together.loss == pytest.approx(
            sum(score.loss * score.tokens for score in alone) / together.tokens, rel=1e-6
        )


def test_a_caller_in_inference_mode_changes_nothing(tiny_model: Callable[[str], Path]) -> None:
    base, samples = load_tiny(tiny_model("llama")), random_samples(20, 12)
    plain, _ = gradients_of_step(make_trainer(base, samples, batch_size=2))
    trainer = make_trainer(base, samples, batch_size=2)
    with torch.inference_mode():
        inside, _ = gradients_of_step(trainer)
    assert worst(inside, plain) == 0.0
    slices = trainer.slices()
    next(slices)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
