"""What `loramux train` shows: the plan before it starts, progress on standard error, the result on standard output.

Nothing heavy is imported until something is shown. Decides nothing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from loramux_adapters.training.run import TrainingResult, TrainingRun


class Display:
    """A bar with the live loss while standard error is a terminal, else a line now and then."""

    def __init__(self, run: TrainingRun, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._quiet, self._live = quiet, console.is_terminal and not quiet
        self._bar: Progress = Progress(*columns, console=console, disable=not self._live)
        self._task = self._bar.add_task("", total=run.recipe.total_steps, completed=run.step)
        self._every = max(1, run.recipe.total_steps // 20)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, event: object) -> None:
        from loramux_adapters.training.diagnoses import Diagnosis
        from loramux_adapters.training.run import CheckpointReport, EvalReport
        from loramux_adapters.training.trainer import StepReport

        if isinstance(event, StepReport):
            rate = event.tokens / max(event.seconds, 1e-9)
            line = f"loss {event.train_loss:.3f} lr {event.learning_rate:.1e} {rate:.0f} tok/s"
            self._bar.update(self._task, completed=event.step, description=line)
            if event.step % self._every == 0 or event.step == event.total_steps:
                self._line(f"step {event.step}/{event.total_steps} {line}", only_without_bar=True)
        elif isinstance(event, EvalReport):
            self._line(
                f"step {event.step}: validation loss {event.valid_loss:.3f}, "
                f"token accuracy {event.valid_mean_token_accuracy:.1%}"
            )
        elif isinstance(event, CheckpointReport):
            self._line(f"step {event.step}: {event.path}")
        elif isinstance(event, Diagnosis):
            self._line(f"warning   step {event.step}: {event.message}")

    def _line(self, text: str, *, only_without_bar: bool = False) -> None:
        if self._live and not only_without_bar:
            self._bar.console.print(text, highlight=False)
        elif not self._live and not self._quiet:
            typer.echo(text, err=True)


def show_plan(run: TrainingRun) -> None:
    recipe, data = run.recipe, run.data.report
    typer.echo(
        f"data      {data.rows} rows, {data.samples} samples of {data.shortest} to {data.longest} tokens (median "
        f"{data.median}); {data.trained_tokens} of {data.tokens} tokens are trained on, by {data.marked_by}",
        err=True,
    )
    typer.echo(
        f"adapter   r {recipe.r}, lora_alpha {recipe.lora_alpha:g}, {', '.join(recipe.target_modules)}: "
        f"{run.trainable_parameters:,} parameters",
        err=True,
    )
    typer.echo(
        f"training  {recipe.total_steps} steps, {recipe.n_epochs} epochs, batches of {recipe.batch_size} x "
        f"{recipe.gradient_accumulation_steps}, learning rate {recipe.learning_rate:g} ({recipe.lr_scheduler})"
        + (f", from step {run.step}" if run.step else ""),
        err=True,
    )
    for field, why in run.why.items():
        typer.echo(f"auto      {field} {run.chosen(field)}: {why}", err=True)
    for warning in run.warnings:
        typer.echo(f"warning   {warning}", err=True)


def print_plan(run: TrainingRun, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(run.plan(), indent=2, allow_nan=False))


def print_result(result: TrainingResult, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"out": str(result.out), **result.manifest}, indent=2, allow_nan=False))
        return
    curve = [entry for entry in result.manifest["loss_curve"] if "train_loss" in entry]
    typer.echo(
        f"{result.out}: trained, loss {curve[0]['train_loss']:.3f} to {curve[-1]['train_loss']:.3f} in "
        f"{curve[-1]['step']} steps, generation {result.weights.generation[:12]}"
    )
