"""`loramux export` (alias `merge`): the words of the command line, and what is shown while an export runs.

Exit codes: 0 exported (or planned, with --dry-run), 1 refused, 2 wrong usage, 3 written but not proven equal to the
served model. Standard output carries the result (with --json one JSON object), standard error progress and errors.
Nothing heavy is imported until the command runs. Does not know where the demo model comes from: the caller says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loramux_adapters.errors import LoramuxError

if TYPE_CHECKING:
    from loramux_adapters.export import ExportOptions, ExportPlan, ExportProgress, ExportResult

NOT_PROVEN_EXIT = 3

_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
_TITLES = {"merge": "Merging", "verify": "Verifying", "noise": "Measuring the server's own rounding"}

ResolveModel = Callable[[str], tuple[Path, str]]
"""What --model says -> the directory, and the base's name for people (empty: the directory's)."""

Model = Annotated[str, typer.Option(help="Base model: a directory, a hub id, or demo.")]
Adapters = Annotated[
    list[str], typer.Option(help="Adapter directory, or DIRECTORY=WEIGHT; repeat to add several.")
]
Out = Annotated[Path, typer.Option(help="Directory to create.")]
Stored = Annotated[str, typer.Option(help="bf16, fp16, fp32 or nf4.")]
MergedOnto = Annotated[
    str, typer.Option(help="dequantized (as served) or original (the checkpoint's own weights).")
]
Served = Annotated[str, typer.Option(help="Compute dtype of the server: auto, bf16, fp16 or fp32.")]
ShardSize = Annotated[str, typer.Option(help="Largest weight file, such as 5GB or 500MiB.")]
Prompts = Annotated[
    int | None,
    typer.Option(help="Prompts to compare with the served model on; 0 for none.", show_default="all"),
]
PromptTokens = Annotated[int, typer.Option(help="Tokens of each prompt at most.")]
PromptFile = Annotated[
    Path | None, typer.Option(help="Prompts to use instead of the built-in ones, one a line.")
]
Compare = Annotated[bool, typer.Option("--compare", help="Also measure a merge onto the other base.")]
Strict = Annotated[bool, typer.Option("--strict", help="Make no allowance for the server's own rounding.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an export that was stopped.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def register(app: typer.Typer, demo: Callable[[], tuple[Path, str]]) -> None:
    """Add `export` and its alias `merge` to an app. `demo` gives the embedded model's directory and hub id."""

    def resolve(model: str) -> tuple[Path, str]:
        return demo() if model == "demo" else local_or_hub(model)

    command = export_command(resolve)
    app.command("export")(command)
    app.command("merge", hidden=True)(command)


def local_or_hub(model: str) -> tuple[Path, str]:
    """A directory as it is; anything else is a hub id, downloaded (or found in its cache) without pickles."""
    path = Path(model)
    if path.exists():
        return path, ""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from loramux_adapters.errors import BaseModelError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES)), model
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseModelError(
            f"--model {model}: neither a directory nor a model the hub gives: {reason}", param="model"
        ) from error


def export_command(resolve: ResolveModel) -> Callable[..., None]:
    """The command function, with typer's annotations, over a way to find models."""

    def export(
        model: Model,
        adapter: Adapters,
        out: Out,
        format: Stored = "bf16",
        onto: MergedOnto = "dequantized",
        served_dtype: Served = "auto",
        shard_size: ShardSize = "5GB",
        verify: Prompts = None,
        verify_tokens: PromptTokens = 160,
        verify_file: PromptFile = None,
        compare: Compare = False,
        strict: Strict = False,
        dry_run: DryRun = False,
        resume: Resume = False,
        quiet: Quiet = False,
        as_json: AsJson = False,
    ) -> None:
        """Merge adapters into their base: a checkpoint that is checked to be the model that was served."""
        with _exit_codes(as_json):
            from loramux_adapters.export import ExportOptions, VerifyOptions, WeightedAdapter
            from loramux_adapters.export import options as words

            texts = words.read_prompts(verify_file)
            prompts = verify if verify is not None else len(texts) or words.BUILT_IN_PROMPTS
            directory, name = resolve(model)
            options = ExportOptions(
                model=directory,
                adapters=tuple(WeightedAdapter.parse(text) for text in adapter),
                out=out,
                name=name,
                format=words.parse_format(format),
                onto=words.parse_onto(onto),
                served_dtype=words.parse_served_dtype(served_dtype),
                shard_bytes=words.parse_size(shard_size),
                verify=VerifyOptions(prompts, verify_tokens, texts, compare=compare, strict=strict),
            )
            _carry_out(options, dry_run=dry_run, resume=resume, quiet=quiet, as_json=as_json)

    return export


def _carry_out(options: ExportOptions, *, dry_run: bool, resume: bool, quiet: bool, as_json: bool) -> None:
    from loramux_adapters.export import plan_export

    plan = plan_export(options)
    if dry_run:
        _show_plan(plan, as_json=as_json)
    else:
        _run(plan, resume=resume, quiet=quiet, as_json=as_json)


def _run(plan: ExportPlan, *, resume: bool, quiet: bool, as_json: bool) -> None:
    from loramux_adapters.export import run_export

    if not (quiet or as_json):
        for warning in plan.warnings:
            typer.echo(f"warning: {warning}", err=True)
    with _progress(shown=not (quiet or as_json)) as observer:
        result = run_export(plan, resume=resume, observer=observer)
    if as_json:
        typer.echo(
            json.dumps({"out": str(result.out), "seconds": result.seconds, "report": result.report}, indent=2)
        )
    elif not quiet:
        for line in _summary(result):
            typer.echo(line)


@contextmanager
def _exit_codes(as_json: bool) -> Iterator[None]:
    """With --json errors are JSON on standard output; in both modes an unproven export exits with 3."""
    try:
        yield
    except LoramuxError as error:
        from loramux_adapters.export import NOT_PROVEN

        if as_json:
            fields = {"message": error.message, "param": error.param, "code": error.code}
            typer.echo(json.dumps({"error": fields}, indent=2))
        else:
            typer.echo(f"loramux: {error.message}", err=True)
        raise typer.Exit(NOT_PROVEN_EXIT if error.code == NOT_PROVEN else 1) from error


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[ExportProgress], None]]:
    """A bar on standard error with bytes and time left; without a terminal rich prints nothing but the end."""
    if not shown:
        yield lambda progress: None
        return
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


def _show_plan(plan: ExportPlan, *, as_json: bool) -> None:
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


def _summary(result: ExportResult) -> Iterator[str]:
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
