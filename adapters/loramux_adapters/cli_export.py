"""`loramux export` (alias `merge`): the words of the command line.

Exit codes: 0 exported (or planned, with --dry-run), 1 refused, 2 wrong usage, 3 written but not proven equal to the
served model. Standard output carries the result (with --json one JSON object), standard error progress and errors.
Nothing heavy is imported until the command runs. Does not know where the demo model comes from: the caller says.
How plan, progress and result look is `cli_export_output.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux_adapters.cli_errors import exit_codes
from loramux_adapters.cli_export_output import ProgressKind, progress_shown, show_plan, summary
from loramux_adapters.errors import LoramuxError

if TYPE_CHECKING:
    from loramux_adapters.export import ExportPlan

NOT_PROVEN_EXIT = 3

_HUB_FILES = [
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"),
    *("LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "README.md"),
]

ResolveModel = Callable[[str, str | None], tuple[Path, str]]
"""What --model and --revision say -> the directory, and the base's name for people (empty: the directory's)."""

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
Quantized = Annotated[str, typer.Option(help="How the server held the base: nf4 or none.")]
QuantizedOn = Annotated[str, typer.Option(help="Where the server quantized it: cpu or cuda.")]
Identity = Annotated[str | None, typer.Option(help="Quantization identity that the base must have.")]
Revision = Annotated[
    str | None, typer.Option(help="Hub revision of the base.", show_default="the default branch")
]
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
Progress = Annotated[
    ProgressKind | None,
    typer.Option(help="On standard error: a bar, none, or one JSON object a line.", show_default="bar"),
]


def register(app: typer.Typer, demo: Callable[[], tuple[Path, str]]) -> None:
    """Add `export` and its alias `merge` to an app. `demo` gives the embedded model's directory and hub id."""

    def resolve(model: str, revision: str | None) -> tuple[Path, str]:
        return demo() if model == "demo" else local_or_hub(model, revision)

    command = export_command(resolve)
    app.command("export")(command)
    app.command("merge", hidden=True)(command)


def local_or_hub(model: str, revision: str | None = None) -> tuple[Path, str]:
    """A directory as it is; anything else is a hub id, downloaded (or found in its cache) without pickles."""
    path = Path(model)
    if path.exists():
        return path, ""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from loramux_adapters.errors import BaseModelError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES)), model
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
        quantization: Quantized = "nf4",
        device: QuantizedOn = "cpu",
        base_identity: Identity = None,
        revision: Revision = None,
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
        progress: Progress = None,
    ) -> None:
        """Merge adapters into their base: a checkpoint that is checked to be the model that was served."""
        with exit_codes(as_json, _exit_code):
            from loramux_adapters.export import ExportOptions, VerifyOptions, WeightedAdapter
            from loramux_adapters.export import options as words

            texts = words.read_prompts(verify_file)
            prompts = verify if verify is not None else len(texts) or words.BUILT_IN_PROMPTS
            directory, name = resolve(model, revision)
            options = ExportOptions(
                model=directory,
                adapters=tuple(WeightedAdapter.parse(text) for text in adapter),
                out=out,
                name=name,
                format=words.parse_format(format),
                onto=words.parse_onto(onto),
                served_dtype=words.parse_served_dtype(served_dtype),
                quantization=words.parse_quantization(quantization),
                device=words.parse_device(device),
                base_identity=base_identity,
                shard_bytes=words.parse_size(shard_size),
                verify=VerifyOptions(prompts, verify_tokens, texts, compare=compare, strict=strict),
            )
            from loramux_adapters.export import plan_export

            plan = plan_export(options)
            if dry_run:
                show_plan(plan, as_json=as_json)
            else:
                shown = progress or (ProgressKind.NONE if quiet or as_json else ProgressKind.BAR)
                _run(plan, resume=resume, progress=shown, quiet=quiet, as_json=as_json)

    return export


def _run(plan: ExportPlan, *, resume: bool, progress: ProgressKind, quiet: bool, as_json: bool) -> None:
    from loramux_adapters.export import run_export

    with progress_shown(progress, plan) as observer:
        result = run_export(plan, resume=resume, observer=observer)
    if as_json:
        typer.echo(
            json.dumps({"out": str(result.out), "seconds": result.seconds, "report": result.report}, indent=2)
        )
    elif not quiet:
        for line in summary(result):
            typer.echo(line)


def _exit_code(error: LoramuxError) -> int:
    """An export that is not proven has one of its own."""
    from loramux_adapters.export import NOT_PROVEN

    return NOT_PROVEN_EXIT if error.code == NOT_PROVEN else 1
