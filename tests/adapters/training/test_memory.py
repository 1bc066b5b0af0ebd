"""What a run is said to need: by hand for a small decoder, against what torch allocates, and refused with figures."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from loramux_adapters.errors import TrainingError
from loramux_adapters.training import memory
from loramux_adapters.training.memory import (
    MIB,
    DecoderShape,
    TrainingMemory,
    check_memory,
    free_memory,
    loss_rows,
    piece_tokens,
    training_memory,
)
from loramux_adapters.training.samples import Sample
from tests.adapters.training.support import load_tiny, make_trainer, random_samples, run_slices

SHAPE = DecoderShape(hidden=64, intermediate=128, layers=3, vocabulary=320, query_width=64, kv_width=32)
TARGETS = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)] * 3


def test_by_hand() -> None:
    parameters = 3 * 4 * (128 + 96 + 96 + 128 + 192 + 192 + 192)
    found = training_memory(SHAPE, TARGETS, r=4, tokens=100, dtype_bytes=2)
    assert (found.adapter, found.gradients, found.optimizer) == (
        4 * parameters,
        4 * parameters,
        8 * parameters,
    )
    assert found.layer_inputs == 5 * 100 * 64 * 4
    assert found.logits == 100 * 320 * (2 + 4 + 2)
    activations = max(found.layer_activations, found.logits)
    assert found.layer_inputs > found.gradients
    assert found.total == 12 * parameters + found.layer_inputs + activations
    micro = training_memory(SHAPE, TARGETS, r=4, tokens=100, dtype_bytes=2, accumulates=True)
    assert micro.total == found.total + found.gradients
    assert found.state == 12 * parameters


def test_what_changes_with_what() -> None:
    plain = training_memory(SHAPE, TARGETS, r=4, tokens=100, dtype_bytes=2)
    assert training_memory(SHAPE, TARGETS, r=8, tokens=100, dtype_bytes=2).state == 2 * plain.state
    small = training_memory(SHAPE, TARGETS, r=4, tokens=100, dtype_bytes=2, optimizer="adamw_8bit")
    assert 0.25 < small.optimizer / plain.optimizer < 0.26
    paged = training_memory(SHAPE, TARGETS, r=4, tokens=100, dtype_bytes=2, optimizer="paged_adamw_8bit")
    assert paged.optimizer == 0
    dropout = training_memory(SHAPE, TARGETS, r=4, tokens=100, dtype_bytes=2, dropout=True)
    assert dropout.layer_activations > plain.layer_activations
    few = training_memory(SHAPE, TARGETS, r=4, tokens=100, dtype_bytes=2, predicted=10)
    assert few.logits == plain.logits / 10
    many = training_memory(SHAPE, TARGETS, r=4, tokens=10**6, dtype_bytes=2)
    assert many.logits == 8 * 320 * loss_rows(320, "cuda")


def test_pieces_bound_what_a_layer_takes() -> None:
    size = piece_tokens(SHAPE, "cpu")
    one, two, long = (
        training_memory(SHAPE, TARGETS, r=4, tokens=tokens, longest=longest, dtype_bytes=2, device="cpu")
        for tokens, longest in ((size, size), (2 * size, size), (2 * size, 2 * size))
    )
    # Of several pieces the weights of a layer are dequantized once for all.
    layer, widest = 64 * 64 * 2 + 2 * 32 * 64 + 3 * 128 * 64, 128 * 64
    assert two.layer_activations - one.layer_activations == 2 * (layer - widest)
    assert (
        long.layer_inputs - two.layer_inputs == 3 * 2 * size * 2 * 32 * 2
    )  # keys and values of a cut sample


def test_wide_layers_have_short_pieces() -> None:
    demo = DecoderShape(576, 1536, 30, 49152, query_width=576, kv_width=192)
    seven = DecoderShape(4096, 11008, 32, 32000, query_width=4096, kv_width=4096)
    assert (demo.layer_parameters, seven.layer_parameters) == (3_538_944, 202_375_168)
    assert (piece_tokens(demo, "cpu"), piece_tokens(seven, "cpu")) == (128, 64)
    assert (piece_tokens(demo, "cuda"), piece_tokens(seven, "cuda")) == (8192, 672)
    alone = [piece_tokens(shape, "cpu", alone=True) for shape in (demo, seven)]
    assert alone == [2048, 672], "nobody waits for the end of a piece"
    assert (loss_rows(49152, "cpu"), loss_rows(256_000, "cpu"), loss_rows(32000, "cuda")) == (42, 32, 1048)


def test_the_shape_of_a_config() -> None:
    fields: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "vocab_size": 320,
    }
    plain = DecoderShape.of(SimpleNamespace(**fields))
    assert plain == DecoderShape(64, 256, 3, 320, query_width=64, kv_width=64)
    wide = DecoderShape.of(
        SimpleNamespace(**fields, head_dim=32, num_key_value_heads=2, intermediate_size=[128, 256])
    )
    assert wide == DecoderShape(64, 256, 3, 320, query_width=128, kv_width=64)


def peak(work: Callable[[], object]) -> int:
    """Bytes that torch had allocated more than at the start, at most."""
    gc.collect()  # what others left would count against this, were it freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@pytest.mark.parametrize(("lengths", "dtype"), [((200, 200), "float32"), ((400,), "bfloat16")])
def test_it_is_what_torch_allocates(
    lengths: tuple[int, ...], dtype: str, tiny_model: Callable[[str], Path]
) -> None:
    base = load_tiny(tiny_model("llama"), dtype)
    # With one token to learn in each, a layer is what takes most.
    samples = [Sample(one.ids, bytes(len(one) - 1) + b"\1") for one in random_samples(*lengths)]

    def two_steps() -> None:
        trainer = make_trainer(base, samples, batch_size=len(lengths), r=32)
        run_slices(trainer.slices())  # makes the optimizer's state
        run_slices(trainer.slices())

    needed = training_memory(
        DecoderShape.of(base.config),
        list(base.geometry.linear_shapes.values()),
        r=32,
        tokens=sum(lengths),
        dtype_bytes=torch.empty(0, dtype=base.dtype).element_size(),
        predicted=len(lengths),
        longest=max(lengths),
        device="cpu",
    )
    measured = peak(two_steps)
    assert 0.9 < needed.total / measured < 1.1, (needed, measured / MIB)


def test_a_run_that_cannot_fit_is_refused_with_the_figures() -> None:
    needed = TrainingMemory(*(kind * MIB for kind in (10, 20, 30, 40, 50, 60)), accumulates=True)
    check_memory(needed, 160 * MIB, "memory")
    with pytest.raises(TrainingError) as caught:
        check_memory(needed, 160 * MIB - 1, "GPU memory")
    assert caught.value.code == "not_enough_memory"
    assert str(caught.value).startswith(
        "training needs about 160 MiB (adapter 10, gradients 20, optimizer 30, layer inputs 40, layer activations 50, "
        "logits 60) and 160 MiB of GPU memory are free: try a smaller batch_size"
    )


def test_on_a_cpu_it_is_what_the_host_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 5 * MIB)
    assert free_memory(torch.device("cpu")) == 5 * MIB
