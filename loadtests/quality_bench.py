"""What training is worth: a base, a LoRA on its 16-bit weights and a QLoRA on NF4, on rows that none of them saw.

    python -m loadtests.quality_bench [--model demo] [--task sentiment extract pirate] [--epochs 3] [--save]

The tasks are the data sets that the demo adapters were made from, a few hundred conversations each; every fifth is held
out. Base and adapter are computed by the same run: the validation loss before the first step is the base's. Loss and
accuracy are over the tokens of the assistant's answers; `right` counts answers that are right from their first token to
their last, each predicted from the right beginning. Goal: the QLoRA's held-out loss is within 1 % of the LoRA's, over
all tasks. Each training runs in a process of its own. Asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from loadtests import BenchError
from loadtests.adapters import model_directory
from loadtests.report import FORMAT, RESULTS, cpu_model, usable_cores
from loramux_adapters.demo import NAMES
from loramux_adapters.demo.datasets import build

GOAL = 0.01
HELD_OUT = 5  # every so many rows one
_PLAIN_WIDTH = 120

Method = Literal["LoRA", "QLoRA"]
METHODS: dict[Method, Literal["none", "nf4"]] = {"LoRA": "none", "QLoRA": "nf4"}


@dataclass(frozen=True)
class Case:
    model: str
    task: str
    method: Method
    epochs: int
    rows: int | None  # of the task, all of them if None
    threads: int


@dataclass(frozen=True)
class Score:
    """Held out."""

    loss: float
    token_accuracy: float
    right: float  # share of the answers


@dataclass(frozen=True)
class Trained:
    base: Score
    adapter: Score
    rows: int
    held_out: int
    steps: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="'demo' or a model directory with a chat template")
    parser.add_argument("--task", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows", type=int, help="take only so many rows of a task")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--save", action="store_true", help="keep the figures in loadtests/results")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what a child process is started with
    options = parser.parse_args()
    if options.case:
        print(json.dumps(asdict(train(Case(**json.loads(options.case))))))
        return
    model = str(model_directory(options.model))
    tasks = {
        task: {
            method: _in_child(Case(model, task, method, options.epochs, options.rows, options.threads))
            for method in METHODS
        }
        for task in options.task
    }
    show(tasks)
    if options.save:
        print(save(tasks, {"model": options.model, "epochs": options.epochs, "rows": options.rows}))


def _in_child(case: Case) -> Trained:
    print(f"  {case.task}: {case.method}", file=sys.stderr)
    command = [sys.executable, "-m", "loadtests.quality_bench", "--case", json.dumps(asdict(case))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise BenchError(f"{case.method} on {case.task} failed:\n{done.stderr[-2000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    return Trained(**{**told, "base": Score(**told["base"]), "adapter": Score(**told["adapter"])})


def train(case: Case) -> Trained:
    """In this process: `loramux train` with what "auto" becomes, but for the epochs."""
    import torch
    from transformers import AutoTokenizer

    from loramux_adapters.training.recipe import Recipe
    from loramux_adapters.training.run import TrainingRun
    from loramux_server.base.loading import LoadOptions, load_base

    torch.set_num_threads(case.threads)
    base = load_base(LoadOptions(model=case.model, name="base", quantization=METHODS[case.method]))
    rows = build(case.task)[: case.rows]
    with tempfile.TemporaryDirectory() as directory:
        parts = {
            "train": [row for index, row in enumerate(rows) if index % HELD_OUT],
            "held-out": rows[::HELD_OUT],
        }
        paths = {name: Path(directory) / f"{name}.jsonl" for name in parts}
        for name, part in parts.items():
            paths[name].write_text("".join(json.dumps(row) + "\n" for row in part))
        run = TrainingRun.prepare(
            base.model,
            base.geometry,
            AutoTokenizer.from_pretrained(case.model),
            Recipe.parse({"n_epochs": case.epochs, "save_steps": 10_000_000, "eval_steps": 10_000_000}),
            paths["train"],
            Path(directory) / "out",
            validation_file=paths["held-out"],
        )
        before = _scored(run)
        for _ in run.slices():
            pass
        return Trained(before, _scored(run), len(parts["train"]), len(parts["held-out"]), run.step)


def _scored(run: Any) -> Score:
    """Each held-out sample by itself, so that answers can be counted."""
    samples = run.validation.samples
    scores = [_finished(run.evaluate([sample])) for sample in samples]
    tokens = sum(score.tokens for score in scores)
    return Score(
        loss=sum(score.loss * score.tokens for score in scores) / tokens,
        token_accuracy=sum(score.mean_token_accuracy * score.tokens for score in scores) / tokens,
        right=fmean(score.mean_token_accuracy == 1.0 for score in scores),
    )


def _finished(slices: Any) -> Any:
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value


def compared(tasks: dict[str, dict[Method, Trained]]) -> dict[str, Any]:
    """Each task weighs the same."""
    ratios = {task: runs["QLoRA"].adapter.loss / runs["LoRA"].adapter.loss for task, runs in tasks.items()}
    losses = {method: fmean(runs[method].adapter.loss for runs in tasks.values()) for method in METHODS}
    over_all = losses["QLoRA"] / losses["LoRA"]
    return {"by_task": ratios, "over_all": over_all, "met": over_all <= 1 + GOAL}


def show(tasks: dict[str, dict[Method, Trained]]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    table = Table(title="Held out, tokens and answers of the assistant", title_justify="left")
    for title in ("task", "", "loss", "token accuracy", "right answers"):
        table.add_column(title, justify="left" if title in ("task", "") else "right")
    for task, runs in tasks.items():
        lines: Sequence[tuple[str, Score]] = [
            ("base, 16 bit", runs["LoRA"].base),
            ("base, NF4", runs["QLoRA"].base),
            ("LoRA", runs["LoRA"].adapter),
            ("QLoRA", runs["QLoRA"].adapter),
        ]
        for name, score in lines:
            table.add_row(
                task, name, f"{score.loss:.4f}", f"{score.token_accuracy:.1%}", f"{score.right:.1%}"
            )
    console.print(table)
    found = compared(tasks)
    for task, value in found["by_task"].items():
        run = tasks[task]["QLoRA"]
        console.print(
            f"  {task}: QLoRA's loss is {value - 1:+.2%} of LoRA's; {run.rows} rows, {run.steps} steps, "
            f"{run.held_out} held out",
            highlight=False,
        )
    said = "met    " if found["met"] else "NOT MET"
    console.print(f"  {said}  QLoRA <= {1 + GOAL:g}x LoRA's loss: {found['over_all']:.4f}", highlight=False)


def save(tasks: dict[str, dict[Method, Trained]], settings: dict[str, Any]) -> Path:
    """`<date>-quality.json` beside the other scenarios' results."""
    written = {
        **{"format": FORMAT, "scenario": "quality", "summary": "base, LoRA and QLoRA on held-out rows"},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": usable_cores(), "system": platform.system()},
        "versions": {
            name: version(name) for name in ("loramux", "torch", "transformers", "peft", "bitsandbytes")
        },
        "settings": settings,
        "tasks": {
            task: {method: asdict(run) for method, run in runs.items()} for task, runs in tasks.items()
        },
        "qlora_over_lora": compared(tasks),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-quality.json"
    path.write_text(json.dumps(written, indent=2) + "\n")
    return path


if __name__ == "__main__":
    try:
        main()
    except BenchError as error:
        sys.exit(f"quality_bench: {error}")
