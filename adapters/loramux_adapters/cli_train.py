"""`loramux train`: the words of the command line, and what is shown while an adapter is trained.

Exit codes: 0 trained, 1 refused or failed, 2 wrong usage, 130 stopped by Ctrl-C with a checkpoint written. Standard
output carries the result (with --json one JSON object), standard error progress and errors. The flags are the fields
of a recipe. Nothing heavy is imported until the command runs. Does not know how a base is loaded: the caller says.
"""

from __future__ import annotations

import inspect
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loramux_adapters.cli_errors import exit_codes
from loramux_adapters.cli_verify import LoadBase, VerifyBase
from loramux_adapters.errors import TrainingError
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.targets import targets_of_text

if TYPE_CHECKING:
    from rich.progress import Progress

    from loramux_adapters.training.run import TrainingResult, TrainingRun
    from loramux_adapters.weights import LoraWeights

STOPPED_EXIT = 130


class _Stopped(Exception):
    """Ctrl-C; the run has a checkpoint of its last step."""


def register(app: typer.Typer, load: LoadBase) -> None:
    """Add `train` to an app."""
    app.command("train")(train_command(load))


def train_command(load: LoadBase) -> Callable[..., None]:
    """The command function over a way to load bases: a flag for each field of a recipe, after the fixed ones."""

    def train(
        model: Annotated[str, typer.Option(help="Base model: a directory, a hub id, or demo.")],
        data: Annotated[Path, typer.Option(help="Training file, JSONL.")],
        out: Annotated[Path, typer.Option(help="Directory for the adapter and its checkpoints.")],
        validation: Annotated[Path | None, typer.Option(help="Validation file, JSONL.")] = None,
        device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
        dtype: Annotated[str, typer.Option(help="Compute type: auto, bfloat16 or float32.")] = "auto",
        resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Check the data and show the plan; train nothing.")
        ] = False,
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
        **recipe: str | bool | None,
    ) -> None:
        """Train an adapter on a base as it is served, and write it as PEFT reads it."""
        with _exit_codes(as_json):
            asked = Recipe.parse(_fields(recipe))
            run = _prepare(asked, load, model, device, dtype, data, out, validation, resume, quiet)
            if not quiet:
                _show_plan(run)
            if dry_run:
                _print_plan(run, as_json=as_json)
                return
            result = _drive(run, quiet=quiet)
            _print_result(result, as_json=as_json)

    fixed = list(inspect.signature(train, eval_str=True).parameters.values())[:-1]
    flags = [_flag(name) for name in Recipe.model_fields]
    train.__signature__ = inspect.Signature([*fixed, *flags])  # type: ignore[attr-defined]
    train.__annotations__ = {parameter.name: parameter.annotation for parameter in (*fixed, *flags)}
    return train


def _flag(name: str) -> inspect.Parameter:
    """`--lora-alpha` for `lora_alpha`; values are read as JSON is, so that the recipe judges them."""
    field = Recipe.model_fields[name]
    spelled = "--" + name.replace("_", "-")
    kind: Any = bool if field.annotation is bool else str
    option = typer.Option(
        spelled,
        help=field.description,
        show_default=shown if (shown := str(field.default)) not in ("None", "False") else False,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _fields(given: Mapping[str, str | bool | None]) -> dict[str, object]:
    """What was given, as a JSON recipe would have it; target_modules also as a,b,c."""
    fields: dict[str, object] = {}
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, bool) or name == "init_from":
            fields[name] = value
        elif name == "target_modules":
            fields[name] = targets_of_text(value)
        else:
            try:
                fields[name] = json.loads(value)
            except ValueError:
                fields[name] = value
    return fields


def _prepare(
    recipe: Recipe, load: LoadBase, model: str, device: str, dtype: str, data: Path, out: Path,
    validation: Path | None, resume: bool, quiet: bool,
) -> TrainingRun:  # fmt: skip
    from loramux_adapters.training.checkpoints import check_output
    from loramux_adapters.training.rows import read_rows
    from loramux_adapters.training.run import TrainingRun

    # What is wrong with the files alone is said before minutes are spent on the base.
    check_output(out, resume=resume)
    for path, param in ((data, "data"), (validation, "validation")):
        if path is not None:
            read_rows(path, param=param)
    if not quiet:
        typer.echo(f"loading {model}", err=True)
    base = load(model, device, dtype)
    if base.tokenizer is None:
        raise TrainingError(f"'{model}' has no tokenizer that can be loaded", param="model")
    return TrainingRun.prepare(
        base.model,
        base.geometry,
        base.tokenizer,
        recipe,
        data,
        out,
        validation_file=validation,
        initial=_initial(recipe, base),
        resume=resume,
    )


def _initial(recipe: Recipe, base: VerifyBase) -> LoraWeights | None:
    if recipe.init_from is None:
        return None
    from loramux_adapters.weights import LoraWeights

    path = Path(recipe.init_from)
    if not path.is_dir():
        raise TrainingError(f"init_from: {path} is not an adapter directory", param="init_from")
    return LoraWeights.read(path, base.geometry)


def _drive(run: TrainingRun, *, quiet: bool) -> TrainingResult:
    """Run to the end; Ctrl-C finishes the step and writes a checkpoint, a second one does not wait."""
    from loramux_adapters.training.trainer import StepReport

    with _stop_signal() as stopped, _Display(run, quiet=quiet) as display:
        slices = run.slices()
        while True:
            try:
                event = next(slices)
            except StopIteration as end:
                result: TrainingResult = end.value
                return result
            display.show(event)
            if stopped() and isinstance(event, StepReport):
                slices.close()
                raise _Stopped(
                    f"stopped after step {event.step}, {run.save().path} is written: continue with --resume"
                )


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    asked = False

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


class _Display:
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

    def __enter__(self) -> _Display:
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


def _show_plan(run: TrainingRun) -> None:
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


def _print_plan(run: TrainingRun, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(run.plan(), indent=2, allow_nan=False))


def _print_result(result: TrainingResult, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"out": str(result.out), **result.manifest}, indent=2, allow_nan=False))
        return
    curve = [entry for entry in result.manifest["loss_curve"] if "train_loss" in entry]
    typer.echo(
        f"{result.out}: trained, loss {curve[0]['train_loss']:.3f} to {curve[-1]['train_loss']:.3f} in "
        f"{curve[-1]['step']} steps, generation {result.weights.generation[:12]}"
    )


@contextmanager
def _exit_codes(as_json: bool) -> Iterator[None]:
    """Ctrl-C has a code of its own."""
    try:
        with exit_codes(as_json):
            yield
    except _Stopped as stop:
        typer.echo(f"loramux: {stop}", err=True)
        raise typer.Exit(STOPPED_EXIT) from stop
