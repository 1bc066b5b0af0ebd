"""What training is worth: a base, a LoRA on its 16-bit weights and a QLoRA on NF4, on rows that none of them saw.

    python -m loadtests.quality_bench [--model demo] [--task sentiment extract pirate] [--epochs 2] [--save]

The tasks are the data sets that the demo adapters were made from, a few hundred conversations each; every fifth is held
out. Base and adapter are computed by the same run: the validation loss before the first step is the base's. Loss and
accuracy are over the tokens of the assistant's answers; `right` counts answers that are right from their first token to
their last, each predicted from the right beginning. Goal: the QLoRA's held-out loss is within 1 % of the LoRA's, over
all tasks that are run. Each training runs in a process of its own. Asserts nothing.

Unless told otherwise the task is `pirate`, whose answers are free text: minutes on two cores. All three take four times
as long.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rich.table import Table

from loadtests.adapters import model_directory
from loadtests.measured import answer, console, goal_line, in_child, options_parser, run_as_script, save
from loramux_adapters.demo import NAMES
from loramux_adapters.demo.datasets import build

GOAL = 0.01
HELD_OUT = 5  # every so many rows one
_TOLD = 10  # times a training

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
    parser = options_parser(__doc__)
    parser.add_argument("--task", nargs="+", default=["pirate"], choices=NAMES)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rows", type=int, help="take only so many rows of a task")
    options = parser.parse_args()
    if options.measure:
        answer(train(Case(**options.measure)))
        return
    model = str(model_directory(options.model))
    tasks = {
        task: {
            method: _trained(Case(model, task, method, options.epochs, options.rows, options.threads))
            for method in METHODS
        }
        for task in options.task
    }
    show(tasks)
    if options.save:
        settings = {name: getattr(options, name) for name in ("model", "epochs", "rows", "threads")}
        runs = {task: {method: asdict(one) for method, one in both.items()} for task, both in tasks.items()}
        found = {"tasks": runs, "qlora_over_lora": compared(tasks)}
        print(save("quality", "base, LoRA and QLoRA on held-out rows", settings, found))


def _trained(case: Case) -> Trained:
    told = in_child("loadtests.quality_bench", f"{case.task}, {case.method}", asdict(case), case.threads)
    return Trained(**{**told, "base": Score(**told["base"]), "adapter": Score(**told["adapter"])})


def train(case: Case) -> Trained:
    """In this process: `loramux train` with what "auto" becomes, but for the epochs."""
    import torch
    from transformers import AutoTokenizer

    from loramux_adapters.training.recipe import Recipe
    from loramux_adapters.training.run import TrainingRun
    from loramux_server.base.demo import default_cache_dir
    from loramux_server.base.loading import LoadOptions, load_base

    torch.set_num_threads(case.threads)
    base = load_base(
        LoadOptions(
            model=case.model,
            name="base",
            quantization=METHODS[case.method],
            cpu_kernels=default_cache_dir().absolute() / "kernels",
        )
    )
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
        print(f"{run.recipe.total_steps} steps of {run.recipe.batch_size} rows", flush=True)
        before = _scored(run)
        for event in run.slices():
            _tell(event)
        return Trained(before, _scored(run), len(parts["train"]), len(parts["held-out"]), run.step)


def _tell(event: object) -> None:
    from loramux_adapters.training.run import EvalReport
    from loramux_adapters.training.trainer import StepReport

    if isinstance(event, StepReport) and event.step % max(1, event.total_steps // _TOLD) == 0:
        print(f"step {event.step} of {event.total_steps}, loss {event.train_loss:.3f}", flush=True)
    elif isinstance(event, EvalReport):
        print(f"step {event.step}, held-out loss {event.valid_loss:.4f}", flush=True)


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
    text = f"QLoRA <= {1 + GOAL:g}x LoRA's loss, over {', '.join(tasks)}"
    return {"by_task": ratios, "text": text, "value": over_all, "met": over_all <= 1 + GOAL}


def show(tasks: dict[str, dict[Method, Trained]]) -> None:
    out = console()
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
    out.print(table)
    found = compared(tasks)
    for task, value in found["by_task"].items():
        one = tasks[task]["QLoRA"]
        out.print(
            f"  {task}: QLoRA's loss is {value - 1:+.2%} of LoRA's; {one.rows} rows, {one.steps} steps, "
            f"{one.held_out} held out",
            highlight=False,
        )
    out.print(goal_line(found), highlight=False)


if __name__ == "__main__":
    run_as_script(main, "quality_bench")
