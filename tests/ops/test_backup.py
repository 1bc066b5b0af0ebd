"""A copy of the data directory that is made while it is written to can be opened, and lacks nothing that it names."""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from loramux_adapters.registry import AdapterRegistry
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.store import GenerationStore
from loramux_adapters.weights import LoraWeights
from loramux_server.training.database import open_database
from loramux_server.training.files import FileStore
from tests.ops.support import DEPLOY

COPIES = 4


def weights(value: float) -> LoraWeights:
    spec = AdapterSpec(r=2, lora_alpha=4, target_modules=("q_proj",))
    pair = (torch.full((2, 64), value), torch.full((64, 2), value))
    return LoraWeights(spec, {"model.layers.0.self_attn.q_proj": pair})


def backup(source: Path, target: Path) -> None:
    """The script that docs/operations.md names."""
    command = [sys.executable, str(DEPLOY / "backup.py"), str(source), str(target)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_a_copy_made_while_adapters_are_published_is_whole(tmp_path: Path) -> None:
    live = tmp_path / "live"
    store = GenerationStore(live / "generations")
    registry = AdapterRegistry(live / "adapters.sqlite3", store)
    published, enough = threading.Event(), threading.Event()

    def publish() -> None:
        for turn in itertools.count(1):
            generation = store.publish(weights(float(turn)))
            registry.put(f"adapter-{turn % 7}", generation, source="upload")
            published.set()
            if enough.is_set():
                return

    writer = threading.Thread(target=publish)
    writer.start()
    try:
        assert published.wait(30)
        for number in range(COPIES):
            backup(live, tmp_path / f"copy-{number}")
    finally:
        enough.set()
        writer.join()
        registry.close()
    seen = set()
    for number in range(COPIES):
        copy = tmp_path / f"copy-{number}"
        copied = GenerationStore(copy / "generations")
        opened = AdapterRegistry(copy / "adapters.sqlite3", copied)
        names = opened.list()
        assert names
        for record in names:
            copied.verify(record.generation)  # every byte, by its hash
        seen.add(tuple(record.generation for record in names))
        opened.close()
    assert len(seen) > 1, "all copies are of one moment"


def test_a_copy_made_while_files_are_uploaded_is_whole(tmp_path: Path) -> None:
    live = tmp_path / "live"
    database = open_database(live)
    files = FileStore(live / "files", database)
    stored, enough = threading.Event(), threading.Event()

    def upload() -> None:
        for turn in itertools.count():
            (source := tmp_path / "source").write_bytes(b"%d\n" % turn * 1000)
            files.add(source, f"{turn}.jsonl", "fine-tune")
            stored.set()
            if enough.is_set():
                return

    writer = threading.Thread(target=upload)
    writer.start()
    try:
        assert stored.wait(30)
        for number in range(COPIES):
            backup(live, tmp_path / f"copy-{number}")
    finally:
        enough.set()
        writer.join()
        database.close()
    counts = set()
    for number in range(COPIES):
        opened = open_database(tmp_path / f"copy-{number}")
        copied = FileStore(tmp_path / f"copy-{number}" / "files", opened)
        rows, more = copied.page(purpose=None, after=None, limit=10_000, order="asc")
        assert rows
        assert not more
        for turn, row in enumerate(rows):
            with copied.open(row.id)[1] as file:
                assert file.read() == b"%d\n" % turn * 1000
        counts.add(len(rows))
        opened.close()
    assert len(counts) > 1, "all copies are of one moment"


def load_script() -> ModuleType:
    spec = spec_from_file_location("backup", DEPLOY / "backup.py")
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_folders_that_vanish_meanwhile_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint in the making, between its being listed and its being looked into."""
    live, lasting = tmp_path / "live", tmp_path / "live" / "lasting"
    for folder in (lasting, live / "vanishing"):
        folder.mkdir(parents=True)
        (folder / "file").write_text("content")
        sqlite3.connect(folder / "some.sqlite3").close()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("vanishing"):
            monkeypatch.setattr(os, "scandir", real)
            shutil.rmtree(path)
            monkeypatch.setattr(os, "scandir", scandir)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert load_script().backup(live, tmp_path / "copy") == 1
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["lasting"]
    assert (tmp_path / "copy" / "lasting" / "file").read_text() == "content"


def test_a_folder_that_cannot_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "live" / "closed").mkdir(parents=True)
    real = os.scandir

    def scandir(path: str) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        load_script().backup(tmp_path / "live", tmp_path / "copy")
