"""`loramux adapters`: the adapters of a running server, from the command line.

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

if TYPE_CHECKING:
    from loramux_server.adapters_client import AdaptersClient

adapters_app = typer.Typer(
    help="List, add, change and remove the adapters of a running server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(help="The adapter's name.")]
Url = Annotated[str, typer.Option(help="Address of the server.")]
Json = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an adapter of that name.")]
Pin = Annotated[bool | None, typer.Option("--pin/--no-pin", help="Keep it on the device.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not try what it does to the base first.")]
AllowNoop = Annotated[bool, typer.Option("--allow-noop", help="Accept an adapter that changes nothing.")]
Description = Annotated[str | None, typer.Option(help="What it is for.")]

LOCAL = "http://127.0.0.1:8000"


@adapters_app.command("list")
def list_adapters(url: Url = LOCAL, as_json: Json = False) -> None:
    """List the adapters."""
    adapters = list(_client(url).all())
    if as_json:
        typer.echo(json.dumps(adapters))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for title in (
        "name",
        "generation",
        "state",
        "verified",
        "tier",
        "rank",
        "size",
        "in use",
        "pinned",
        "source",
    ):
        table.add_column(title, no_wrap=True)
    for one in adapters:
        table.add_row(
            one["id"],
            one["generation"][:12],
            one["state"],
            one["verification"]["verdict"] if one["verification"] else "-",
            one["tier"],
            str(one["rank"] or "-"),
            _size(one["bytes"]),
            str(one["in_flight"]),
            "yes" if one["pinned"] else "",
            one["source"],
        )
    # A pipe has no width of its own, and must not lose columns.
    width = None if sys.stdout.isatty() else 240
    Console(markup=False, highlight=False, width=width).print(table)


@adapters_app.command("add")
def add_adapter(
    name: Name,
    path: Annotated[Path, typer.Argument(help="Its folder, or a .zip, .tar, .tar.gz or .tar.zst of it.")],
    overwrite: Overwrite = False,
    pin: Pin = None,
    description: Description = None,
    no_verify: NoVerify = False,
    allow_noop: AllowNoop = False,
    url: Url = LOCAL,
    as_json: Json = False,
) -> None:
    """Upload an adapter."""
    flags = _flags(overwrite, pin, no_verify, allow_noop)
    fields = {flag: str(value).lower() for flag, value in flags.items() if value is not None}
    if description is not None:
        fields["description"] = description
    _report(_client(url).upload(name, path, fields), "is", as_json)


@adapters_app.command("pull")
def pull_adapter(
    name: Name,
    source: Annotated[str, typer.Argument(help="hf://organisation/repository@revision")],
    overwrite: Overwrite = False,
    pin: Pin = None,
    description: Description = None,
    no_verify: NoVerify = False,
    allow_noop: AllowNoop = False,
    url: Url = LOCAL,
    as_json: Json = False,
) -> None:
    """Let the server fetch an adapter from the Hugging Face hub."""
    flags = _flags(overwrite, pin, no_verify, allow_noop)
    _report(_client(url).pull(name, source, {**flags, "description": description}), "is", as_json)


@adapters_app.command("show")
def show_adapter(name: Name, url: Url = LOCAL, as_json: Json = False) -> None:
    """Show everything about one adapter; NAME may be name@generation."""
    adapter = _client(url).show(name)
    if as_json:
        typer.echo(json.dumps(adapter))
        return
    history, verification = adapter.pop("generations"), adapter.pop("verification")
    for field, value in adapter.items():
        typer.echo(f"{field:<17}{_shown(field, value)}")
    for entry in history:
        typer.echo(
            f"  {entry['generation']}  {_time(entry['created'])}  {entry['origin'] or entry['source']}"
        )
    _show_verification(name, verification)


@adapters_app.command("rm")
def remove_adapter(
    name: Name,
    timeout: Annotated[
        float, typer.Option(min=0, max=600, help="Wait so many seconds for its requests.")
    ] = 30,
    url: Url = LOCAL,
    as_json: Json = False,
) -> None:
    """Forget an adapter; requests that run on it finish."""
    answer = _client(url).delete(name, timeout)
    left = f", {answer['in_flight']} requests still run on it" if answer["in_flight"] else ""
    typer.echo(json.dumps(answer) if as_json else f"{name} is deleted{left}")


@adapters_app.command("rollback")
def rollback_adapter(
    name: Name,
    generation: Annotated[
        str | None, typer.Argument(help="The first digits of it; default: the one before the current.")
    ] = None,
    url: Url = LOCAL,
    as_json: Json = False,
) -> None:
    """Point a name back at an earlier generation."""
    _report(_client(url).rollback(name, generation), "is back at", as_json)


def _pinning(pinned: bool) -> Callable[..., None]:
    def change(name: Name, url: Url = LOCAL, as_json: Json = False) -> None:
        adapter = _client(url).change(name, {"pinned": pinned})
        _report(adapter, "is pinned at" if pinned else "is no longer pinned at", as_json)

    return change


adapters_app.command("pin", help="Keep an adapter on the device.")(_pinning(True))
adapters_app.command("unpin", help="Let an adapter leave the device when others need room.")(_pinning(False))


def _flags(overwrite: bool, pin: bool | None, no_verify: bool, allow_noop: bool) -> dict[str, bool | None]:
    return {"overwrite": overwrite, "pinned": pin, "verify": not no_verify, "allow_noop": allow_noop}


def _client(url: str) -> AdaptersClient:
    from loramux_server.adapters_client import AdaptersClient

    return AdaptersClient(url)


def _show_verification(name: str, verification: dict[str, Any] | None) -> None:
    if verification is None or "report" not in verification:
        typer.echo(f"{'verification':<17}{'-' if verification is None else verification['verdict']}")
        return
    from loramux_adapters.cli_verify import show_report
    from loramux_adapters.verify_report import VerifyReport

    typer.echo(f"{'verification':<17}{_time(verification['checked_at'])}")
    show_report(VerifyReport.from_json(verification["report"]), name)


def _report(adapter: dict[str, Any], verb: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(adapter))
        return
    for warning in adapter.get("warnings", ()):
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{adapter['id']} {verb} generation {adapter['generation'][:12]}")


def _shown(field: str, value: object) -> str:
    if field in ("created", "updated") and isinstance(value, int):
        return _time(value)
    if field == "bytes":
        return _size(value)
    return (
        json.dumps(value) if isinstance(value, dict | list | bool) else str("-" if value is None else value)
    )


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _size(count: object) -> str:
    if not isinstance(count, int):
        return "-"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
