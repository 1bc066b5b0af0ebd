"""What requests do on the event loop, where all of them run: no reading of adapters' files, no removing of folders."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.store import GenerationStore
from loramux_server.api import body
from loramux_server.exports.jobs import JobFolder
from tests.adapters.conftest import AdapterFiles, adapter_files, make_lora_weights, tiny_geometry
from tests.api.catalog_support import contents, variant
from tests.api.tenants_support import TenantStand, stand
from tests.api.training_support import PATIENCE_S

__all__ = ["adapter_files", "make_lora_weights", "stand", "tiny_geometry"]  # fixtures

Watch = Callable[[Any, str], None]
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def threads() -> set[tuple[str, int]]:
    """What was called that is watched, and on which threads."""
    return set()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, threads: set[tuple[str, int]]) -> Watch:
    """`watched(owner, name)`; what reads or removes files is."""

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watching(*arguments: Any) -> Any:
            threads.add((name, threading.get_ident()))
            return real(*arguments)

        monkeypatch.setattr(owner, name, watching)

    watch(GenerationStore, "manifest")
    watch(JobFolder, "remove")
    return watch


def on_the_loop(seen: set[tuple[str, int]]) -> set[str]:
    return {name for name, thread in seen if thread == threading.get_ident()}


async def test_adapters_files_are_read_on_threads(
    stand: TenantStand,
    adapter_files: AdapterFiles,
    tmp_path: Path,
    threads: set[tuple[str, int]],
    watched: Watch,
) -> None:
    assert (
        await stand.upload("alice", "hers", contents(variant(adapter_files, 0), tmp_path / "a"))
    ).status_code == 201
    file = await stand.upload_rows("alice")
    job = {"model": "hers", "training_file": file}
    for url, asked in (
        ("/v1/completions", {"model": "hers", "prompt": "hi"}),
        ("/v1/chat/completions", {"model": "hers", "messages": MESSAGES}),
        ("/v1/responses", {"model": "tiny:hers", "input": "hi"}),
        ("/v1/fine_tuning/jobs", job),
        ("/v1/adapters/plan", {"name": "hers"}),
        ("/v1/adapters/hers/exports", {}),
    ):
        threads.clear()
        await stand.ok("alice", "POST", url, json=asked)
        assert ("manifest", on_the_loop(threads)) == ("manifest", set()), url
        assert threads, f"{url} reads nothing, and would show nothing"
    for url in ("/v1/adapters/hers", "/v1/adapters", "/v1/adapters/hers/download"):
        await stand.ask("alice", "GET", url)
    assert on_the_loop(threads) == set()


async def test_a_long_body_is_parsed_on_a_thread(
    stand: TenantStand, threads: set[tuple[str, int]], watched: Watch
) -> None:
    watched(body, "_check_depth")
    for text in ("hi", "word " * body.LONG_BODY):
        threads.clear()
        answer = await stand.ask("alice", "POST", "/tokenize", json={"prompt": text})
        assert answer.status_code == 200
        assert {name for name, _ in threads} == {"_check_depth"}
        assert on_the_loop(threads) == ({"_check_depth"} if text == "hi" else set())


async def test_an_export_that_is_read_is_removed_on_a_thread(
    stand: TenantStand,
    adapter_files: AdapterFiles,
    tmp_path: Path,
    threads: set[tuple[str, int]],
    watched: Watch,
) -> None:
    await stand.upload("alice", "hers", contents(variant(adapter_files, 0), tmp_path / "a"))
    shown = await stand.ok("alice", "POST", "/v1/adapters/hers/exports", json={})
    export = stand.exports.get("hers", shown["id"])
    export.job = export.job.saying("as if it had been carried out", status="succeeded")
    with ExitStack() as downloads:
        for _ in range(2):
            downloads.enter_context(stand.exports.reading("hers", shown["id"]))
        await stand.ok("alice", "DELETE", f"/v1/adapters/hers/exports/{shown['id']}")
        assert export.folder.path.exists(), "it is read"
    async with asyncio.timeout(PATIENCE_S):
        while export.folder.path.exists():
            await asyncio.sleep(0.01)
    assert {name for name, _ in threads} >= {"remove"}
    assert on_the_loop(threads) == set()
