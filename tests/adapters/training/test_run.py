"""Whole runs on a tiny model: the adapter PEFT loads, the same curve as Hugging Face's, resume to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from loramux_adapters.errors import StorageError, TrainingError
from loramux_adapters.nf4 import NF4Linear
from loramux_adapters.training.checkpoints import OPTIMIZER_FILE
from loramux_adapters.training.diagnoses import Diagnosis
from loramux_adapters.training.layout import STATE_FILE
from loramux_adapters.training.pieces import Piece
from loramux_adapters.training.recipe import Recipe, learning_rate_factor
from loramux_adapters.training.run import CheckpointReport, EvalReport, TrainingResult, TrainingRun
from loramux_adapters.training.trainer import StepReport
from loramux_adapters.weights import CONFIG_FILE, WEIGHTS_FILE, LoraWeights
from loramux_server.base.loading import ResidentBase
from tests.adapters.training.reference import dense_model, factors, packed_loss, peft_model
from tests.adapters.training.support import byte_tokenizer, chat, load_tiny, write_jsonl

FIELDS: dict[str, Any] = {"r": 4, "n_epochs": 3, "batch_size": 2, "learning_rate": 5e-3, "lora_dropout": 0.1}
WORDS = ["red", "green", "blue", "white", "black", "grey", "pink"]


@pytest.fixture(scope="module")
def base(tiny_model: Callable[[str], Path]) -> ResidentBase:
    return load_tiny(tiny_model("llama"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(
        tmp_path / "data.jsonl", [chat(f"colour {i}", word * (1 + i % 3)) for i, word in enumerate(WORDS)]
    )


def prepare(
    base: ResidentBase, data: Path, out: Path, recipe: dict[str, Any] | None = None, **options: Any
) -> TrainingRun:
    asked = Recipe.parse(FIELDS | (recipe or {}))
    return TrainingRun.prepare(base.model, base.geometry, byte_tokenizer(), asked, data, out, **options)


def finish(run: TrainingRun, *, stop_after: int | None = None) -> tuple[list[Any], TrainingResult | None]:
    """The events, and the result unless it was dropped after so many steps, as a killed process drops it."""
    events: list[Any] = []
    slices = run.slices()
    while True:
        try:
            event = next(slices)
        except StopIteration as end:
            return events, end.value
        if event is not None:
            events.append(event)
        if isinstance(event, StepReport) and event.step == stop_after:
            next(slices)  # somewhere inside the next step
            return events, None


def digest(base: ResidentBase) -> list[Any]:
    """Every byte and every module of the served model."""
    tensors = [*base.model.parameters(), *base.model.buffers()]
    tensors += [
        part
        for m in base.model.modules()
        if isinstance(m, NF4Linear)
        for part in m.quantized.canonical_parts()
    ]
    sums = [tensor.detach().contiguous().view(-1).view(torch.uint8).long().sum().item() for tensor in tensors]
    places = [tensor.data_ptr() for tensor in tensors]
    return [
        *sums,
        *places,
        *[(name, type(m)) for name, m in base.model.named_modules()],
        base.model.config.to_dict(),
    ]


def test_a_run_gives_what_peft_loads(base: ResidentBase, data: Path, tmp_path: Path, tiny_model: Any) -> None:
    before = digest(base)
    generator = torch.get_rng_state()
    run = prepare(base, data, tmp_path / "out", validation_file=data)
    events, result = finish(run)
    assert digest(base) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert result is not None

    steps = [event for event in events if isinstance(event, StepReport)]
    assert [event.step for event in steps] == list(range(1, 13))
    assert steps[-1].train_loss < 0.85 * steps[0].train_loss
    evals = [event for event in events if isinstance(event, EvalReport)]
    assert [event.step for event in evals] == list(range(13))
    assert evals[-1].valid_loss < evals[0].valid_loss
    saves = [event.step for event in events if isinstance(event, CheckpointReport)]
    assert saves == [4, 8, 12]

    weights = LoraWeights.read(tmp_path / "out", base.geometry)
    assert weights.generation == result.weights.generation
    ids = torch.arange(1, 30)[None]
    with pytest.warns(UserWarning, match="loramux_base_identity"):
        theirs: Any = PeftModel.from_pretrained(dense_model(tiny_model("llama"), base), tmp_path / "out")
    row, calls = run._trainer._stack.start(ids[0], Piece(0, 29, ((0, 29),)))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[0]
        plain = base.model(input_ids=ids).logits[0]
        for index, call in enumerate(calls):
            row = run._trainer._stack.layer(index, row, call)
        ours = run._trainer._stack.logits(row[0])
    assert float((ours - expected).norm() / expected.norm()) < 1e-5
    assert float((plain - expected).norm() / expected.norm()) > 0.05


def test_the_manifest_says_how_the_adapter_came_about(base: ResidentBase, data: Path, tmp_path: Path) -> None:
    run = prepare(base, data, tmp_path / "out", {"max_steps": 3, "save_steps": 2})
    finish(run)
    manifest = json.loads((tmp_path / "out" / "training_manifest.json").read_text())
    assert manifest["base"]["identity"] == base.geometry.identity
    assert manifest["recipe"]["learning_rate"] == 5e-3
    assert manifest["asked"] == FIELDS | {"max_steps": 3, "save_steps": 2}
    assert manifest["auto"].keys() >= {"target_modules", "lora_alpha", "seed"}
    assert manifest["data"]["rows"] == len(WORDS)
    assert [entry["step"] for entry in manifest["loss_curve"]] == [1, 2, 3]
    assert manifest["trainable_parameters"] == sum(p.numel() for p in run._trainer.parameters.values())
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert config["loramux_base_identity"] == base.geometry.identity
    assert config["base_model_name_or_path"] == "org/tiny"
    for step in (2, 3):  # every checkpoint is an adapter, and says the same of itself
        checkpoint = tmp_path / "out" / "checkpoints" / f"step-{step}"
        assert LoraWeights.read(checkpoint, base.geometry).rank == 4
        provenance = json.loads((checkpoint / STATE_FILE).read_text())["provenance"]
        assert set(manifest) - set(provenance) == {"format", "created_at", "generation", "loss_curve"}
        assert provenance == {key: manifest[key] for key in provenance}


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_curve_is_that_of_hugging_face_and_peft(
    packing: bool, base: ResidentBase, data: Path, tmp_path: Path, tiny_model: Any
) -> None:
    """Same data, initial values and order; AdamW and clipping as their trainer has them. Bound: 1e-4 relative."""
    fields = {
        "packing": packing,
        "max_seq_length": 128,
        "lr_scheduler": "linear",
        "warmup_ratio": 0.0,
        "weight_decay": 0.01,
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.0,
        "max_grad_norm": 0.5,
    }
    run = prepare(base, data, tmp_path / "out", fields)
    model = peft_model(tiny_model("llama"), base, run.adapter)
    parameters = factors(model, run.adapter)
    optimizer = torch.optim.AdamW(parameters.values(), lr=5e-3, weight_decay=0.01)
    recipe = run.recipe
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            learning_rate_factor(step, recipe.total_steps, "linear", 0.0)
            if step < recipe.total_steps
            else 0.0
        ),
    )
    theirs = []
    for step in range(recipe.total_steps):
        micros = [[run.data.samples[i] for i in unit] for unit in run._trainer._batches.of_step(step)]
        trained = sum(sample.trained for unit in micros for sample in unit)
        losses = [packed_loss(model, unit) / trained for unit in micros]
        torch.stack(losses).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        theirs.append((sum(loss.item() for loss in losses), norm.item()))
    events, _ = finish(run)
    ours = [(event.train_loss, event.grad_norm) for event in events if isinstance(event, StepReport)]
    assert len(ours) == recipe.total_steps >= 3
    for (our_loss, our_norm), (their_loss, their_norm) in zip(ours, theirs, strict=True):
        assert our_loss == pytest.approx(their_loss, rel=1e-4)
        assert our_norm == pytest.approx(their_norm, rel=1e-3)


@pytest.mark.parametrize("stop", [1, 4, 6, 11])
def test_resume_gives_the_same_bytes(stop: int, base: ResidentBase, data: Path, tmp_path: Path) -> None:
    fields = {"save_steps": 3, "gradient_accumulation_steps": 1, "weight_decay": 0.1}
    whole = tmp_path / "whole"
    events, _ = finish(prepare(base, data, whole, fields, validation_file=data))
    out = tmp_path / "out"
    assert finish(prepare(base, data, out, fields, validation_file=data), stop_after=stop)[1] is None
    run = prepare(base, data, out, fields, validation_file=data, resume=True)
    assert run.step == (stop - 1) // 3 * 3  # stopped inside of what follows the step
    finish(run)
    assert (out / WEIGHTS_FILE).read_bytes() == (whole / WEIGHTS_FILE).read_bytes()
    curves = [
        json.loads((place / "training_manifest.json").read_text())["loss_curve"] for place in (whole, out)
    ]
    assert curves[0] == curves[1]
    assert (
        run.history[-1]["train_loss"]
        == [event for event in events if isinstance(event, StepReport)][-1].train_loss
    )


def test_a_damaged_checkpoint_is_passed_over(base: ResidentBase, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(prepare(base, data, out, {"save_steps": 2}), stop_after=7)
    latest = out / "checkpoints" / "step-6" / OPTIMIZER_FILE
    latest.write_bytes(latest.read_bytes()[:-1] + b"\x01")
    run = prepare(base, data, out, {"save_steps": 2}, resume=True)
    assert run.step == 4
    assert any("step-6 is damaged" in warning for warning in run.warnings)
    finish(run)
    assert not (out / "checkpoints" / "step-2" / OPTIMIZER_FILE).exists()  # thinned
    assert (out / "checkpoints" / "step-12" / OPTIMIZER_FILE).exists()


def test_resume_refuses_another_run(base: ResidentBase, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(prepare(base, data, out, {"save_steps": 2}), stop_after=3)
    with pytest.raises(TrainingError, match="holds the checkpoints of an unfinished run"):
        prepare(base, data, out)
    with pytest.raises(TrainingError, match=r"cannot resume: learning_rate was 0.005 and is 0.1") as caught:
        prepare(base, data, out, {"save_steps": 2, "learning_rate": 0.1}, resume=True)
    assert caught.value.param == "learning_rate"
    other = write_jsonl(tmp_path / "other.jsonl", [chat("x", "y")] * 7)
    with pytest.raises(TrainingError, match="cannot resume: the rows") as caught:
        prepare(base, other, out, {"save_steps": 2}, resume=True)
    assert caught.value.param == "training_file"


def test_a_finished_adapter_is_never_written_over(base: ResidentBase, data: Path, tmp_path: Path) -> None:
    finish(prepare(base, data, tmp_path / "out", {"max_steps": 1}))
    with pytest.raises(TrainingError, match="holds a finished adapter"):
        prepare(base, data, tmp_path / "out", {"max_steps": 1}, resume=True)


def test_an_adapter_is_trained_further(base: ResidentBase, data: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    finish(prepare(base, data, first, {"target_modules": "attention-qv", "use_rslora": True}))
    initial = LoraWeights.read(first, base.geometry)
    recipe = {"init_from": str(first), "max_steps": 2}
    run = prepare(base, data, tmp_path / "out", recipe, initial=initial, validation_file=data)
    events, result = finish(run)
    assert result is not None
    assert result.weights.spec == initial.spec
    assert result.manifest["initial"] == initial.generation
    fresh = finish(prepare(base, data, tmp_path / "fresh", {"max_steps": 2}, validation_file=data))[0]
    assert events[0].valid_loss < fresh[0].valid_loss
    for field, value in (("r", 8), ("target_modules", "all-linear"), ("use_rslora", False)):
        with pytest.raises(TrainingError, match=f"{field} is a property of the adapter") as caught:
            prepare(base, data, tmp_path / "no", recipe | {field: value}, initial=initial)
        assert caught.value.param == field


def test_a_run_that_diverges_says_so(base: ResidentBase, data: Path, tmp_path: Path) -> None:
    run = prepare(base, data, tmp_path / "out", {"learning_rate": 1.0, "max_grad_norm": 0.0})
    with torch.no_grad():
        next(iter(run.adapter.layers.values())).lora_b.fill_(float("nan"))
    with pytest.raises(
        TrainingError, match="diverged in step 1: loss nan, .* try a lower learning_rate than 1"
    ) as caught:
        finish(run)
    assert caught.value.code == "diverged"
    assert not (tmp_path / "out" / CONFIG_FILE).exists()


def test_faults_of_the_validation_file_name_it(base: ResidentBase, data: Path, tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "valid.jsonl", [{"messages": []}])
    with pytest.raises(TrainingError, match=r"valid.jsonl. Line 1") as caught:
        prepare(base, data, tmp_path / "out", validation_file=bad)
    assert caught.value.param == "validation_file"
    assert not (tmp_path / "out").exists()


def test_a_run_tells_each_diagnosis_once(base: ResidentBase, data: Path, tmp_path: Path) -> None:
    fields = {"learning_rate": 1e-8, "n_epochs": 8, "batch_size": 2, "save_steps": 16}
    events, result = finish(prepare(base, data, tmp_path / "out", fields))
    told = [event for event in events if isinstance(event, Diagnosis)]
    assert [diagnosis.code for diagnosis in told] == ["loss_not_moving"]
    assert result is not None
    assert [entry["step"] for entry in result.manifest["loss_curve"] if "diagnoses" in entry] == [
        told[0].step
    ]


def test_running_out_of_memory_fails_the_run_only(
    base: ResidentBase, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(base, data, tmp_path / "out")
    layer, calls = run._trainer._stack.layer, 0

    def exhausted(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the backward half
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
        return layer(*arguments)

    monkeypatch.setattr(run._trainer._stack, "layer", exhausted)
    with pytest.raises(TrainingError, match="Tried to allocate 1 GiB.*try a smaller batch_size") as caught:
        finish(run)
    assert caught.value.code == "out_of_memory"
    assert torch.is_grad_enabled()


def test_what_cannot_be_written_is_said(base: ResidentBase, data: Path, tmp_path: Path) -> None:
    run = prepare(base, data, tmp_path / "out", {"max_steps": 1})
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(StorageError, match="a checkpoint cannot be written: Not a directory"):
        finish(run)
    with pytest.raises(StorageError, match="the adapter cannot be written"):
        run._finish(run.adapter.weights())
