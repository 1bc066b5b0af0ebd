"""`loramux jobs`: the fine-tuning jobs of a running server, from the command line.

Without --json a person reads it; with --json standard output has exactly what the server answered. Nothing heavy is
imported until a command runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loramux_adapters.errors import RequestError

if TYPE_CHECKING:
    from loramux_server.jobs_client import JobsClient

jobs_app = typer.Typer(
    help="Start, list, watch and end the fine-tuning jobs of a running server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]
Url = Annotated[str, typer.Option(help="Address of the server.")]
Json = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]

LOCAL = "http://127.0.0.1:8000"
TOLD = 20  # lines about steps in a log, of a whole run


@jobs_app.command("create")
def create_job(
    file: Annotated[str, typer.Option(help="Training file: a path, which is uploaded, or a file's id.")],
    model: Annotated[str, typer.Option(help="The base's name, or an adapter's to train further.")],
    validation: Annotated[str | None, typer.Option(help="Validation file: a path or a file's id.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's name.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initial weights, order of rows and dropout.")] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", help="A hyperparameter, as in -p r=8; may repeat."),
    ] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Watch it until it ends.")] = False,
    url: Url = LOCAL,
    as_json: Json = False,
) -> None:
    """Train an adapter while the server serves."""
    hyperparameters = _hyperparameters(parameter or [])
    client = _client(url)
    given = {"validation_file": validation, "suffix": suffix, "seed": seed}
    fields = {name: value for name, value in given.items() if value is not None}
    for name, value in (("training_file", file), ("validation_file", validation)):
        if value is not None and not value.startswith("file-"):
            fields[name] = client.upload(Path(value))["id"]
        elif value is not None:
            fields[name] = value
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    job = client.create({"model": model, "method": method, **fields})
    typer.echo(json.dumps(job) if as_json else f"{job['id']} is {job['status']}")
    if follow:
        _watch(client, job["id"], as_json)


@jobs_app.command("list")
def list_jobs(url: Url = LOCAL, as_json: Json = False) -> None:
    """List the jobs, newest first."""
    jobs = list(_client(url).all())
    if as_json:
        typer.echo(json.dumps(jobs))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for title in ("job", "status", "model", "fine-tuned model", "created", "finishes"):
        table.add_column(title, no_wrap=True)
    for job in jobs:
        finish = job["finished_at"] or job["estimated_finish"]
        table.add_row(
            *(job["id"], job["status"], job["model"], job["fine_tuned_model"] or "-"),
            *(_time(job["created_at"]), _time(finish) if finish else "-"),
        )
    # A pipe has no width of its own, and must not lose columns.
    width = None if sys.stdout.isatty() else 240
    Console(markup=False, highlight=False, width=width).print(table)


@jobs_app.command("show")
def show_job(job_id: JobId, url: Url = LOCAL, as_json: Json = False) -> None:
    """Show everything about one job, and its checkpoints."""
    client = _client(url)
    job = client.show(job_id)
    if as_json:
        typer.echo(json.dumps(job))
        return
    for field, value in job.items():
        if field not in ("object", "method", "organization_id", "integrations"):
            typer.echo(f"{field:<18}{_shown(field, value)}")
    for one in client.checkpoints(job_id)["data"]:
        loss = one["metrics"]["train_loss"]
        said = "" if loss is None else f"  training loss {loss:.4f}"
        typer.echo(f"  {one['fine_tuned_model_checkpoint']}{said}")


@jobs_app.command("watch")
def watch_job(job_id: JobId, url: Url = LOCAL, as_json: Json = False) -> None:
    """Follow a job with its loss until it ends; exit code 1 if it does not succeed. Ctrl-C leaves it running."""
    _watch(_client(url), job_id, as_json)


def _changing(what: str, done: str) -> Callable[..., None]:
    def change(job_id: JobId, url: Url = LOCAL, as_json: Json = False) -> None:
        job = _client(url).change(job_id, what)
        typer.echo(json.dumps(job) if as_json else f"{job['id']} is {done}")

    return change


jobs_app.command("cancel", help="End a job; its checkpoints stay.")(_changing("cancel", "cancelled"))
jobs_app.command("pause", help="Let a job wait, and the next one train.")(_changing("pause", "paused"))
jobs_app.command("resume", help="Queue a paused job again.")(_changing("resume", "queued"))


def _client(url: str) -> JobsClient:
    from loramux_server.jobs_client import JobsClient

    return JobsClient(url)


def _hyperparameters(given: list[str]) -> dict[str, object]:
    """Values are read as JSON, so that the server judges them; what is no JSON is text."""
    fields: dict[str, object] = {}
    for entry in given:
        name, separator, value = entry.partition("=")
        if not (name and separator):
            raise RequestError(f"--parameter {entry}: is not name=value", param="parameter")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return fields


def _watch(client: JobsClient, job_id: str, as_json: bool) -> None:
    if as_json:
        for event in client.events(job_id):
            typer.echo(json.dumps(event))
    else:
        with _Display() as display:
            for event in client.events(job_id):
                display.show(event)
    job = client.show(job_id)
    if not as_json:
        made = f": {job['fine_tuned_model']}" if job["fine_tuned_model"] else ""
        typer.echo(f"{job_id} is {job['status']}{made}")
    if job["status"] != "succeeded":
        raise typer.Exit(1)


class _Display:
    """A bar with the live loss on a terminal, else a line now and then."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._live = console.is_terminal
        self._bar = Progress(*columns, console=console, disable=not self._live)
        self._task = self._bar.add_task("", total=None, visible=False)

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, event: dict[str, Any]) -> None:
        data = event["data"]
        if "train_loss" not in data:
            prefix = "" if event["level"] == "info" else f"{event['level']}: "
            self._line(f"{_time(event['created_at'])}  {prefix}{event['message']}")
            return
        step, total, rate = data["step"], data["total_steps"], data["tokens_per_second"]
        line = f"loss {data['train_loss']:.3f} lr {data['learning_rate']:.1e} {rate:.0f} tok/s"
        self._bar.update(self._task, total=total, completed=step, description=line, visible=True)
        if not self._live and (step % max(1, total // TOLD) == 0 or step == total):
            self._line(f"{_time(event['created_at'])}  step {step}/{total} {line}")

    def _line(self, text: str) -> None:
        if self._live:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            typer.echo(text)


def _shown(field: str, value: object) -> str:
    if field in ("created_at", "finished_at", "estimated_finish") and isinstance(value, int):
        return _time(value)
    return json.dumps(value) if isinstance(value, dict | list) else str("-" if value is None else value)


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
