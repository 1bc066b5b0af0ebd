"""`loramux verify`: the words of the command line, and how a report is shown.

Exit codes: 0 the adapter may be served, 1 it may not or could not be checked, 2 wrong usage. Standard output carries the
report (with --json one JSON object), standard error progress and errors. Nothing heavy is imported until the command
runs. Does not know how a base is loaded: the caller says.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer

from loramux_adapters.cli_errors import exit_codes
from loramux_adapters.errors import UnknownAdapter

if TYPE_CHECKING:
    from loramux_adapters.spec import BaseGeometry
    from loramux_adapters.verify.check import Progress
    from loramux_adapters.verify_report import ModuleFacts, VerifyReport


@dataclass(frozen=True, slots=True)
class VerifyBase:
    """A resident base: a transformers model as the server holds it, its geometry, its tokenizer if it has one."""

    model: Any
    geometry: BaseGeometry
    tokenizer: Any


Quantization = Literal["nf4", "none"]


class LoadBase(Protocol):
    """From --model, --device, --dtype and --quantization to the base. Raises BaseModelError."""

    def __call__(
        self, model: str, device: str, dtype: str, quantization: Quantization = "nf4", /
    ) -> VerifyBase: ...


def register(app: typer.Typer, load: LoadBase) -> None:
    """Add `verify` to an app."""
    app.command("verify")(verify_command(load))


def verify_command(load: LoadBase) -> Callable[..., None]:
    """The command function, with typer's annotations, over a way to load bases."""

    def verify(
        adapter: Annotated[
            str,
            typer.Argument(
                help="Adapter directory, archive or hf://org/repo@revision; with --model demo also a "
                "shipped adapter's name."
            ),
        ],
        model: Annotated[str, typer.Option(help="Base model: a directory, a hub id, or demo.")],
        device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
        dtype: Annotated[
            str, typer.Option(help="Compute type of the server: auto, bfloat16, float16 or float32.")
        ] = "auto",
        quantization: Annotated[
            Quantization, typer.Option(help="As the server holds the base: nf4, or none.")
        ] = "nf4",
        prompts: Annotated[int, typer.Option(min=1, max=8, help="Built-in prompts to compare on.")] = 4,
        allow_noop: Annotated[
            bool, typer.Option("--allow-noop", help="Accept an adapter that changes nothing.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    ) -> None:
        """Check that an adapter changes its base, and computes what PEFT computes with it."""
        with exit_codes(as_json), _files_of(adapter, demo=model == "demo") as directory:
            report = _verify(directory, model, lambda: load(model, device, dtype, quantization), prompts)
        if as_json:
            typer.echo(json.dumps(report.to_json(), indent=2, allow_nan=False))
        else:
            show_report(report, adapter)
        if not report.passes(allow_noop=allow_noop):
            raise typer.Exit(1)

    return verify


def _verify(directory: Path, model: str, load: Callable[[], VerifyBase], prompts: int) -> VerifyReport:
    from loramux_adapters.adapter_files import DEFAULT_LIMITS
    from loramux_adapters.gate import smallest_geometry
    from loramux_adapters.verify import verify_adapter
    from loramux_adapters.weights import LoraWeights

    # What is wrong with the files alone is said before minutes are spent on the base.
    LoraWeights.read(directory, smallest_geometry(directory, DEFAULT_LIMITS))
    typer.echo(f"loading {model}", err=True)
    base = load()
    weights = LoraWeights.read(directory, base.geometry)
    with _progress() as observe:
        return verify_adapter(
            base.model, base.geometry, weights, tokenizer=base.tokenizer, prompts=prompts, observe=observe
        )


@contextmanager
def _files_of(adapter: str, *, demo: bool) -> Iterator[Path]:
    """The adapter's directory; archives and hub repositories are staged in a temporary one."""
    from loramux_adapters.demo import demo_adapters
    from loramux_adapters.sources import HuggingFaceHub, stage_archive, stage_hub

    path = Path(adapter)
    if demo and not path.exists() and adapter in demo_adapters():
        path = demo_adapters()[adapter]
    if path.is_dir():
        yield path
        return
    is_hub = adapter.startswith("hf://")
    if not is_hub and not path.is_file():
        raise UnknownAdapter(f"{adapter}: no such directory or archive", param="adapter")
    with TemporaryDirectory() as temporary:
        staging = Path(temporary)
        with (
            stage_hub(adapter, staging, hub=HuggingFaceHub())
            if is_hub
            else stage_archive(path, staging) as staged
        ):
            yield staged.directory


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A bar on standard error while it is a terminal, else nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda progress: bar.update(task, completed=progress.done, total=progress.total)


def show_report(report: VerifyReport, adapter: str) -> None:
    """A short table by kind of linear, and the figures in words; the last line is the verdict."""
    from rich.console import Console
    from rich.table import Table

    table = Table("linear", "modules", "rank", "mean change", "largest", "zero", title="||BA|| / ||W||")
    for leaf, modules in _by_leaf(report.weights.modules).items():
        relative = [module.relative for module in modules]
        ranks = sorted({module.rank for module in modules})
        zero = sum(module.name in report.weights.zero_modules for module in modules)
        table.add_row(
            leaf,
            str(len(modules)),
            "-".join(dict.fromkeys((str(ranks[0]), str(ranks[-1])))),
            f"{statistics.fmean(relative):.3%}",
            f"{max(relative):.3%}",
            str(zero),
        )
    # A pipe has no width of its own, and must not lose columns.
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    for line in _lines(report, adapter):
        typer.echo(line)


def _by_leaf(modules: tuple[ModuleFacts, ...]) -> dict[str, list[ModuleFacts]]:
    """By the last part of the name: q_proj, down_proj, ..."""
    groups: dict[str, list[ModuleFacts]] = {}
    for module in modules:
        groups.setdefault(module.name.rpartition(".")[2], []).append(module)
    return groups


def _lines(report: VerifyReport, adapter: str) -> Iterator[str]:
    weights, shift, peft = report.weights, report.shift, report.peft
    yield f"adapter   {adapter}, generation {report.generation[:12]}"
    yield f"base      {report.base} in {report.dtype} on {report.device}"
    yield (
        f"weights   {weights.nonzero_tensors:.1%} of the tensors and {weights.nonzero_elements:.1%} of their elements "
        "are not zero"
    )
    if shift is not None:
        yield (
            f"logits    moved by {shift.relative:.2%} (at most {shift.max_logit:.3g}), KL {shift.kl:.2e}, top-1 changed "
            f"at {shift.top1_changed:.1%} of {shift.positions} positions ({report.tokens_from})"
        )
    if peft is not None:
        yield (
            f"PEFT      logits differ by {peft.relative_error:.2e} (bound {peft.relative_bound:g}), updates by "
            f"{peft.update_error:.2e} (bound {peft.update_bound:g}), top-1 equal at {peft.top1_agreement:.1%}"
        )
    for warning in report.warnings:
        yield f"warning   {warning}"
    yield f"{report.verdict}: {report.reason}"
