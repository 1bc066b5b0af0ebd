"""`loramux keys`: the keys of a server, made, listed and revoked in its data directory, also while it runs.

A key is printed once, alone on standard output, so that it can be piped; nobody can have it printed again. Nothing heavy is
imported until a command runs.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from loramux_adapters.errors import RequestError

if TYPE_CHECKING:
    from loramux_server.keys.principal import Scope
    from loramux_server.keys.store import KeyRecord, KeyStore

keys_app = typer.Typer(
    help="Make, list and revoke the keys of a server, in its data directory. From the first key on nobody gets in without.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

DataDir = Annotated[
    Path | None,
    typer.Option(help="The server's --data-dir, or LORAMUX_DATA_DIR.", show_default="the server's"),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(help="The server's --config, or LORAMUX_CONFIG; it may name the data directory."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="What it is for; shown in the list.")] = "",
    tenant: Annotated[
        str, typer.Option(help="Whose adapters, files and jobs it reaches, beside what is shared.")
    ] = "default",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What it may do: infer, adapters, train, metrics, admin; may repeat. metrics and admin are for operators: "
            "metrics names everybody's adapters, admin does everything.",
            show_default="infer",
        ),
    ] = None,
    expires_in: Annotated[
        str | None, typer.Option(help="How long it is valid, such as 12h, 30d, 8w.")
    ] = None,
    rpm: Annotated[
        int | None, typer.Option(min=0, help="Requests a minute; 0: no limit.", show_default="the server's")
    ] = None,
    tpm: Annotated[
        int | None, typer.Option(min=0, help="Tokens a minute; 0: no limit.", show_default="the server's")
    ] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it, this once. A running server knows it with the next request."""
    from loramux_server.keys.store import NewKey

    expires = None if expires_in is None else time.time() + _seconds(expires_in)
    wanted = NewKey(
        name=name,
        tenant=tenant,
        scopes=cast("list[Scope]", [one for given in scope or ["infer"] for one in given.split(",")]),
        expires=expires,
        requests_per_minute=rpm,
        tokens_per_minute=tpm,
    )
    with _store(data_dir, config) as store:
        record, key = store.create(wanted)
    if as_json:
        typer.echo(json.dumps({**_shown(record), "key": key}))
        return
    typer.echo(key)
    who = "admin" if "admin" in record.scopes else f"tenant {record.tenant}"
    typer.echo(f"{record.id}: {who}, may {', '.join(record.scopes)}; it is not shown again", err=True)
    typer.echo(f"for servers with --data-dir {store.data_dir}", err=True)


@keys_app.command("list")
def list_keys(data_dir: DataDir = None, config: ConfigFile = None, as_json: Json = False) -> None:
    """List the keys, without what opens anything."""
    with _store(data_dir, config) as store:
        records = store.all()
    if as_json:
        typer.echo(json.dumps([_shown(record) for record in records]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for title in ("id", "name", "tenant", "scopes", "state", "created", "expires", "rpm", "tpm"):
        table.add_column(title, no_wrap=True)
    for record in records:
        table.add_row(
            record.id,
            record.name or "-",
            record.tenant,
            ",".join(record.scopes),
            record.state(time.time()),
            _time(record.created),
            _time(record.expires),
            _limit(record.requests_per_minute),
            _limit(record.tokens_per_minute),
        )
    # A pipe has no width of its own, and must not lose columns.
    width = None if sys.stdout.isatty() else 240
    Console(markup=False, highlight=False, width=width).print(table)


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, from the list.")],
    data_dir: DataDir = None,
    config: ConfigFile = None,
) -> None:
    """Let a key open nothing any more, from the next request on; requests that run finish."""
    with _store(data_dir, config) as store:
        record = store.revoke(key_id)
    typer.echo(f"{record.id} is revoked")


@contextmanager
def _store(data_dir: Path | None, config: Path | None) -> Iterator[KeyStore]:
    from loramux_server.config import read_data_dir
    from loramux_server.keys.store import KeyStore

    store = KeyStore(read_data_dir(data_dir, config))
    try:
        yield store
    finally:
        store.close()


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,6})([mhdw])", text)
    if match is None or not int(match[1]):
        raise RequestError(
            f"expires-in: {text[:32]!a} is not a time such as 90m, 12h, 30d or 8w", param="expires_in"
        )
    return int(match[1]) * _UNITS[match[2]]


def _shown(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "name": record.name,
        "tenant": record.tenant,
        "scopes": list(record.scopes),
        "state": record.state(time.time()),
        "created": int(record.created),
        "expires": None if record.expires is None else int(record.expires),
        "revoked": None if record.revoked is None else int(record.revoked),
        "requests_per_minute": record.requests_per_minute,
        "tokens_per_minute": record.tokens_per_minute,
    }


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _limit(amount: int | None) -> str:
    return "-" if amount is None else str(amount or "none")
