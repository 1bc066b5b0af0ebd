"""A copy of the data directory that is made while it is written to can be opened, and lacks nothing that it names."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from pathlib import Path

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
    subprocess.run(command, check=True, capture_output=True, timeout=60)


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
