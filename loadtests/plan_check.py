"""Is `loramux plan` right? A short QLoRA training for real, and its memory beside the planned figure.

    python -m loadtests.plan_check [--model demo] [--max-seq-length 512 2048] [--batch-size 1] [--device cpu] [--save]

Each length runs in a process of its own: the base is loaded, two optimizer steps are taken on rows of exactly that many
tokens, all of them trained on, and what training added to the loaded base is measured at its highest. On CUDA that is
torch's own peak; on CPUs it is the sum of every allocation torch made and had not yet freed, from its profiler, because
resident memory also shows what the C library keeps for later (it is printed, from a run without the profiler). Prints
planned, measured and their ratio; asserts nothing.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from loadtests import BenchError
from loadtests.adapters import model_directory
from loadtests.measured import (
    answer,
    console,
    in_child,
    options_parser,
    reset_resident_peak,
    resident_now,
    resident_peak_since,
    run_as_script,
    save,
)
from loadtests.report import usable_cores
from loramux_adapters.planning.model import read_model
from loramux_adapters.planning.training import method_memory, training_options
from loramux_adapters.planning.weights import Device, resident_bytes
from loramux_adapters.training.recipe import Recipe

GOAL = 0.1  # planned / measured within 1 +- this
STEPS = 2  # the first one makes the optimizer's state, the second has it while it computes
ROWS = 2  # batches of data


@dataclass(frozen=True)
class Case:
    """One training to measure."""

    model: str
    device: str
    dtype: str
    max_seq_length: int
    batch_size: int
    r: int
    threads: int = field(default_factory=usable_cores)

    def recipe(self) -> Recipe:
        return Recipe.parse(
            {
                "r": self.r,
                "batch_size": self.batch_size,
                "max_seq_length": self.max_seq_length,
                "max_steps": STEPS,
                "n_epochs": 1,
                "learning_rate": 1e-5,
            }
        )


@dataclass(frozen=True)
class Measured:
    """Bytes. `training` is what was allocated at most beside the base; `resident` None where only CUDA was asked."""

    device: Device
    dtype: str
    weights: int
    training: int
    resident: int | None


@dataclass(frozen=True)
class Check:
    case: Case
    planned_weights: int
    planned_training: int
    measured: Measured

    @property
    def ratio(self) -> float:
        return self.planned_training / self.measured.training


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--max-seq-length", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--r", type=int, default=16)
    options = parser.parse_args()
    if options.measure:
        answer(measure(Case(**options.measure)))
        return
    model = str(model_directory(options.model))
    checks = [
        check(
            Case(model, options.device, options.dtype, length, options.batch_size, options.r, options.threads)
        )
        for length in options.max_seq_length
    ]
    show(checks)
    if options.save:
        settings = {name: getattr(options, name) for name in ("model", "device", "dtype", "threads")}
        found = {"checks": [{**asdict(one), "ratio": one.ratio} for one in checks]}
        print(save("plan", "memory of a QLoRA training, planned and measured", settings, found))


def check(case: Case) -> Check:
    """The measured figure from a process of its own, the planned one from the config."""
    measured = _measure_in_child(case)
    shape = read_model(case.model, case.model)
    item = 4 if measured.dtype == "float32" else 2
    options = training_options(shape, case.recipe(), measured.device)
    return Check(
        case=case,
        planned_weights=resident_bytes(shape, item, "nf4"),
        planned_training=method_memory(shape, options, "qlora", measured.device, item).beside_weights,
        measured=measured,
    )


def _measure_in_child(case: Case) -> Measured:
    what = f"{case.batch_size} x {case.max_seq_length} tokens"
    return Measured(**in_child("loadtests.plan_check", what, asdict(case), case.threads))


def measure(case: Case) -> Measured:
    """Load the base and train on it, in this process."""
    import torch
    from transformers import AutoTokenizer

    from loramux_server.base.loading import LoadOptions, load_base

    torch.set_num_threads(case.threads)
    base = load_base(LoadOptions(model=case.model, name="base", device=case.device, dtype=case.dtype))
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    with tempfile.TemporaryDirectory() as directory:
        data = _write_rows(Path(directory) / "data.jsonl", tokenizer, case)

        def train() -> None:
            _train(base, tokenizer, case.recipe(), data, Path(directory) / "out")

        if base.device.type == "cuda":
            resident, training = None, _cuda_peak(train)
        else:
            resident, training = _resident_peak(train), _allocated_peak(train)
    return Measured(
        device="cuda" if base.device.type == "cuda" else "cpu",
        dtype="float32" if base.dtype == torch.float32 else "bfloat16",
        weights=base.weight_bytes,
        training=training,
        resident=resident,
    )


def _write_rows(path: Path, tokenizer: Any, case: Case) -> Path:
    """Rows that are longer than max_seq_length, so that every one is cut to it."""
    words = "the quick brown fox jumps over the lazy dog " * case.max_seq_length
    assert len(tokenizer(words)["input_ids"]) > case.max_seq_length
    path.write_text(f"{json.dumps({'text': words})}\n" * case.batch_size * ROWS)
    return path


def _train(base: Any, tokenizer: Any, recipe: Recipe, data: Path, out: Path) -> None:
    from loramux_adapters.training.run import TrainingRun
    from loramux_adapters.training.trainer import StepReport

    run = TrainingRun.prepare(base.model, base.geometry, tokenizer, recipe, data, out)
    for event in run.slices():
        if isinstance(event, StepReport):
            print(f"step {event.step} of {STEPS}", flush=True)
            if event.step == STEPS:
                return  # before anything is written


def _cuda_peak(train: Callable[[], None]) -> int:
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _allocated_peak(train: Callable[[], None]) -> int:
    """The highest sum of what torch's CPU allocator gave out and had not got back."""
    from torch.profiler import ProfilerActivity, profile

    print("once more, with every allocation recorded", flush=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train()
    inner: Any = profiler.profiler
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _resident_peak(train: Callable[[], None]) -> int | None:
    """Growth of the process's resident memory at its highest; None where Linux does not tell."""
    gc.collect()
    try:
        reset_resident_peak()
    except BenchError:
        return None
    before = resident_now()
    train()
    return resident_peak_since() - before


def show(checks: Sequence[Check]) -> None:
    table = Table(title="QLoRA beside a resident base: planned / measured", title_justify="left")
    for title in (
        "tokens",
        "planned",
        "measured",
        "planned / measured",
        "resident memory grew by",
        "NF4 base",
    ):
        table.add_column(title, justify="right")
    for one in checks:
        right = abs(one.ratio - 1) <= GOAL
        resident = one.measured.resident
        exact = one.planned_weights == one.measured.weights
        table.add_row(
            f"{one.case.batch_size} x {one.case.max_seq_length}",
            _mb(one.planned_training),
            _mb(one.measured.training),
            f"{one.ratio:.3f} ({'within' if right else 'OUTSIDE'} {GOAL:.0%})",
            "-" if resident is None else _mb(resident),
            "as planned, to the byte" if exact else f"{one.planned_weights - one.measured.weights:+} bytes",
        )
    console().print(table)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


if __name__ == "__main__":
    run_as_script(main, "plan_check")
