"""How `loramux export` looks: the plan, the progress and the result, for people and for programs.

With progress as JSON, standard error carries one object a line: first `{"event": "plan", "phases": {phase: bytes},
"warnings": [...]}`, then `{"event": "progress", "phase", "done", "total"}` a few times a second. A phase the plan
does not name ("noise") is one that turned out to be needed. Nothing heavy is imported with this module.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from loramux_adapters.export import ExportOptions, ExportPlan, ExportProgress, ExportResult

SECONDS_BETWEEN_LINES = 0.25

_TITLES = {"merge": "Merging", "verify": "Verifying", "noise": "Measuring the server's own rounding"}

Observer = Callable[["ExportProgress"], None]


class ProgressKind(StrEnum):
    """How progress is shown on standard error."""

    BAR = "bar"
    NONE = "none"
    JSON = "json"


@contextmanager
def progress_shown(kind: ProgressKind, plan: ExportPlan) -> Iterator[Observer]:
    """An observer for `run_export`; warnings of the plan are said first."""
    if kind is ProgressKind.NONE:
        yield lambda progress: None
    elif kind is ProgressKind.JSON:
        yield _json_lines(plan)
    else:
        for warning in plan.warnings:
            typer.echo(f"warning: {warning}", err=True)
        with _bar() as observer:
            yield observer


def _json_lines(plan: ExportPlan) -> Observer:
    from loramux_adapters.export.verify import verify_bytes

    phases = {"merge": plan.total_bytes, "verify": verify_bytes(plan)}
    _line({"event": "plan", "phases": phases, "warnings": list(plan.warnings)})
    said_phase, said_at = "", 0.0

    def observe(progress: ExportProgress) -> None:
        nonlocal said_phase, said_at
        now = time.monotonic()
        due = progress.phase != said_phase or progress.done == progress.total
        if due or now - said_at >= SECONDS_BETWEEN_LINES:
            said_phase, said_at = progress.phase, now
            fields = {"phase": progress.phase, "done": progress.done, "total": progress.total}
            _line({"event": "progress", **fields})

    return observe


def _line(fields: dict[str, Any]) -> None:
    typer.echo(json.dumps(fields), err=True)


@contextmanager
def _bar() -> Iterator[Observer]:
    """A bar on standard error with bytes and time left; without a terminal rich prints nothing but the end."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def observe(progress: ExportProgress) -> None:
            if progress.phase not in tasks:
                title = _TITLES.get(progress.phase, progress.phase)
                tasks[progress.phase] = bar.add_task(title, total=progress.total)
            bar.update(tasks[progress.phase], completed=progress.done, total=progress.total)

        yield observe


def plan_json(plan: ExportPlan) -> dict[str, Any]:
    """What --dry-run --json prints."""
    from loramux_adapters.export.plan import Action

    options: ExportOptions = plan.options
    return {
        "base": options.base_name,
        "adapters": [
            {
                "name": adapter.name,
                "weight": adapter.weight,
                "rank": adapter.weights.rank,
                "modules": len(adapter.weights.tensors),
            }
            for adapter in plan.adapters
        ],
        "format": options.format.value,
        "onto": options.onto.value,
        "tensors": {action.value: count for action in Action if (count := plan.count(action))},
        "shards": len(plan.shards),
        "bytes": plan.total_bytes,
        "free_bytes": plan.free_bytes,
        "peak_memory_bytes": plan.peak_memory,
        "warnings": list(plan.warnings),
    }


def show_plan(plan: ExportPlan, *, as_json: bool) -> None:
    """Print what would be done."""
    facts = plan_json(plan)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    adapters = ", ".join(
        f"{a['name']} x {a['weight']:g} (rank {a['rank']}, {a['modules']} modules)" for a in facts["adapters"]
    )
    typer.echo(f"base       {facts['base']}")
    typer.echo(f"adapters   {adapters}")
    typer.echo(f"export     {facts['format']} onto {facts['onto']} weights")
    typer.echo("tensors    " + ", ".join(f"{count} {action}" for action, count in facts["tensors"].items()))
    typer.echo(
        f"disk       {facts['bytes'] / 1e9:.2f} GB in {facts['shards']} file(s), {facts['free_bytes'] / 1e9:.2f} GB free"
    )
    typer.echo(f"memory     about {facts['peak_memory_bytes'] / 1e9:.2f} GB at most")
    for warning in facts["warnings"]:
        typer.echo(f"warning    {warning}")


def summary(result: ExportResult) -> Iterator[str]:
    """What was done, in lines."""
    yield f"exported to {result.out} in {result.seconds:.0f} s"
    delta = result.report["delta"]
    if delta["survival_mean"] is not None:
        yield f"survival of the adapter's change: {delta['survival_mean']:.4f} (worst tensor {delta['survival_min']:.4f})"
    if result.proof is None:
        yield "not compared with the served model (--verify 0)"
        return
    rows = {
        "export": result.proof.export,
        "other base": result.proof.other,
        "serving noise": result.proof.noise,
    }
    for name, agreement in rows.items():
        if agreement is not None:
            yield (
                f"{name} || served: KL {agreement.kl:.1e}, top-1 {agreement.top1:.2%}, loss {agreement.loss:.4f} "
                f"(served {agreement.served_loss:.4f}) over {agreement.positions} positions"
            )
