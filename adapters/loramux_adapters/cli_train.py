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
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loramux_adapters.cli_errors import exit_codes
from loramux_adapters.cli_train_output import Display, print_plan, print_result, show_plan
from loramux_adapters.cli_verify import LoadBase, Quantization, VerifyBase
from loramux_adapters.errors import TrainingError
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.targets import targets_of_text
from loramux_adapters.training.tensorboard import TensorBoardLog, check_tensorboard

if TYPE_CHECKING:
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
        quantization: Annotated[
            Quantization, typer.Option(help="How the base is held: nf4 (QLoRA), or none (LoRA on 16 bit).")
        ] = "nf4",
        tensorboard: Annotated[
            Path | None, typer.Option(help="Write TensorBoard files there; needs loramux[tensorboard].")
        ] = None,
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
            if tensorboard is not None:
                check_tensorboard()
            run = _prepare(
                asked,
                partial(load, model, device, dtype, quantization),
                model,
                data,
                out,
                validation,
                resume,
                quiet,
            )
            if not quiet:
                show_plan(run)
            if dry_run:
                print_plan(run, as_json=as_json)
                return
            result = _drive(run, tensorboard, quiet=quiet)
            print_result(result, as_json=as_json)

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
    recipe: Recipe, load: Callable[[], VerifyBase], model: str, data: Path, out: Path, validation: Path | None,
    resume: bool, quiet: bool,
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
    base = load()
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


def _drive(run: TrainingRun, tensorboard: Path | None, *, quiet: bool) -> TrainingResult:
    """Run to the end; Ctrl-C finishes the step and writes a checkpoint, a second one does not wait."""
    from loramux_adapters.training.run import EvalReport
    from loramux_adapters.training.trainer import StepReport

    with ExitStack() as stack:
        stopped = stack.enter_context(_stop_signal())
        display = stack.enter_context(Display(run, quiet=quiet))
        log = None if tensorboard is None else stack.enter_context(TensorBoardLog(tensorboard, run.step))
        slices = run.slices()
        while True:
            try:
                event = next(slices)
            except StopIteration as end:
                result: TrainingResult = end.value
                return result
            display.show(event)
            if log is not None and isinstance(event, StepReport):
                log.trained(event)
            elif log is not None and isinstance(event, EvalReport):
                log.evaluated(event)
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


@contextmanager
def _exit_codes(as_json: bool) -> Iterator[None]:
    """Ctrl-C has a code of its own."""
    try:
        with exit_codes(as_json):
            yield
    except _Stopped as stop:
        typer.echo(f"loramux: {stop}", err=True)
        raise typer.Exit(STOPPED_EXIT) from stop
