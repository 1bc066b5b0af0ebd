"""`loramux doctor`: the words of the command line. Exit codes: 0 nothing is wrong, 1 something is, 2 wrong usage."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loramux_server.config import read_data_dir

if TYPE_CHECKING:
    from loramux_server.doctor.finding import Finding


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Base model to look at: a directory, a hub id, or demo.")
    ] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="Adapter directory to put through the gate; may repeat.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="The server's --data-dir, or LORAMUX_DATA_DIR.", show_default="the server's"),
    ] = None,
    host: Annotated[str, typer.Option(help="The server's --host.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The server's --port.")] = 8000,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="The server's --device.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look for what would keep a server from running here; each fault comes with advice."""
    findings = _examine(model, adapter or [], read_data_dir(data_dir, None), host, port, device)
    faults = sum(one.state == "fault" for one in findings)
    if as_json:
        found = {"ok": faults == 0, "findings": [one.to_json() for one in findings]}
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(findings, faults)
    if faults:
        raise typer.Exit(1)


def _examine(
    model: str | None, adapters: Sequence[Path], data_dir: Path, host: str, port: int, device: str
) -> list[Finding]:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from loramux_server.doctor import environment, gpu, service
    from loramux_server.doctor import model as models

    findings = [*environment.environment(), *environment.libraries()]
    # What imports torch can fail in any way where it is missing, which has been said then.
    if not any(one.check == "library torch" for one in findings):
        findings += gpu.gpu(device)
        if model is not None:
            findings += models.model(model, adapters)
        elif adapters:
            findings += models.adapters_alone(adapters)
    findings += service.data_dir(data_dir)
    findings.append(service.port(host, port))
    return findings


def _show(findings: Sequence[Finding], faults: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "note": "yellow", "fault": "bold red"}
    table = Table("check", "", "found", box=None, pad_edge=False)
    for one in findings:
        found = Text(one.detail)
        if one.advice:
            found.append(f"\n→ {one.advice}", style="dim" if one.state == "note" else "bold")
        table.add_row(one.check, Text(one.state, style=styles[one.state]), found)
    console = Console()
    console.print(table)
    console.print()
    verdict = "nothing is wrong" if not faults else f"{faults} {'fault' if faults == 1 else 'faults'}"
    console.print(Text(verdict, style="bold red" if faults else "green"))
