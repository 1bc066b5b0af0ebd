"""The generation store: idempotent, immutable, and whole after a crash at any step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from loramux_adapters.errors import StorageError
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.store import MANIFEST_FILE, GenerationStore
from loramux_adapters.weights import WEIGHTS_FILE, LoraWeights

MakeWeights = Callable[..., LoraWeights]


@pytest.fixture
def store(tmp_path: Path) -> GenerationStore:
    return GenerationStore(tmp_path / "store")


def test_publish_and_read_back(
    store: GenerationStore, make_lora_weights: MakeWeights, tiny_geometry: BaseGeometry
) -> None:
    weights = make_lora_weights(base_identity="nf4:1234", base_model_name_or_path="org/tiny")
    generation = store.publish(weights, {"source": "upload"})
    assert generation == weights.generation
    assert generation in store
    assert store.path(generation) == store.root / generation[:2] / generation
    assert LoraWeights.read(store.path(generation), tiny_geometry).generation == generation
    manifest = store.manifest(generation)
    assert manifest.num_bytes == weights.num_bytes
    assert (manifest.rank, manifest.dtype, manifest.target_modules) == (4, "F32", ("q_proj", "v_proj"))
    assert (manifest.base_identity, manifest.base_model_name_or_path) == ("nf4:1234", "org/tiny")
    assert manifest.info == {"source": "upload"}
    store.verify(generation)


def test_publishing_again_changes_nothing(store: GenerationStore, make_lora_weights: MakeWeights) -> None:
    generation = store.publish(make_lora_weights(), {"source": "first"})
    inode = (store.path(generation) / WEIGHTS_FILE).stat().st_ino
    assert store.publish(make_lora_weights(), {"source": "second"}) == generation
    assert (store.path(generation) / WEIGHTS_FILE).stat().st_ino == inode
    assert store.manifest(generation).info == {"source": "first"}
    assert list(store) == [generation]
    assert not list((store.root / ".partial").iterdir())


def test_files_are_read_only(store: GenerationStore, make_lora_weights: MakeWeights) -> None:
    directory = store.path(store.publish(make_lora_weights()))
    assert {entry.stat().st_mode & 0o777 for entry in directory.iterdir()} == {0o444}


def test_many_threads_publish_one_generation(store: GenerationStore, make_lora_weights: MakeWeights) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(store.publish(make_lora_weights()))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert [*store] == [*{*found}]
    store.verify(found[0])
    assert not list((store.root / ".partial").iterdir())


@pytest.mark.parametrize("generation", ["", "..", "a" * 63, "A" * 64, "../" + "a" * 61, "a" * 64 + "\n"])
def test_only_hashes_are_looked_up(store: GenerationStore, generation: str) -> None:
    with pytest.raises(StorageError, match="is not a generation"):
        store.path(generation)
    assert generation not in store


def test_absent_generation(store: GenerationStore) -> None:
    with pytest.raises(StorageError, match="generation aaaaaaaaaaaa is not in the adapter store"):
        store.path("a" * 64)
    assert not store.delete("a" * 64)


def test_a_cut_file_is_noticed_and_published_anew(
    store: GenerationStore, make_lora_weights: MakeWeights
) -> None:
    generation = store.publish(make_lora_weights())
    path = store.path(generation) / WEIGHTS_FILE
    path.chmod(0o644)
    os.truncate(path, 100)
    assert generation not in store
    with pytest.raises(StorageError, match="is damaged: its files have other sizes"):
        store.path(generation)
    assert store.publish(make_lora_weights()) == generation
    store.verify(generation)


@pytest.mark.parametrize("manifest", [b"", b"{}", b"[]", b"\xff", b'{"generation": 1}'])
def test_a_damaged_manifest_is_noticed(
    store: GenerationStore, make_lora_weights: MakeWeights, manifest: bytes
) -> None:
    generation = store.publish(make_lora_weights())
    path = store.path(generation) / MANIFEST_FILE
    path.chmod(0o644)
    path.write_bytes(manifest)
    with pytest.raises(StorageError, match="has no readable manifest"):
        store.path(generation)
    store.publish(make_lora_weights())
    store.verify(generation)


@pytest.mark.parametrize("offset", [-1, 40], ids=["in the data", "in the header"])
def test_verify_notices_one_flipped_bit(
    store: GenerationStore, make_lora_weights: MakeWeights, offset: int
) -> None:
    generation = store.publish(make_lora_weights())
    path = store.path(generation) / WEIGHTS_FILE
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    assert generation in store  # sizes are right: only reading it tells
    with pytest.raises(StorageError, match="is damaged"):
        store.verify(generation)


def test_verify_notices_another_generations_content(
    store: GenerationStore, make_lora_weights: MakeWeights
) -> None:
    one, other = store.publish(make_lora_weights(1)), store.publish(make_lora_weights(2))
    data = (store.path(other) / WEIGHTS_FILE).read_bytes()
    path = store.path(one) / WEIGHTS_FILE
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(StorageError, match="its content has another hash"):
        store.verify(one)


def test_delete(store: GenerationStore, make_lora_weights: MakeWeights) -> None:
    generation = store.publish(make_lora_weights())
    assert store.delete(generation)
    assert generation not in store
    assert list(store) == []
    assert not store.delete(generation)


def test_what_cannot_be_deleted_is_said(
    store: GenerationStore, make_lora_weights: MakeWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = store.publish(make_lora_weights())

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", read_only)
    with pytest.raises(StorageError, match="cannot be deleted: Read-only file system"):
        store.delete(generation)
    assert generation in store


def test_sweep_keeps_what_is_named_and_what_is_new(
    store: GenerationStore, make_lora_weights: MakeWeights
) -> None:
    one, two, three = (store.publish(make_lora_weights(seed)) for seed in range(3))
    assert store.sweep({one}) == ()
    os.utime(store.path(two), (0, 0))
    os.utime(store.path(three), (0, 0))
    store.publish(make_lora_weights(2))  # published again a moment ago
    assert store.sweep({one}) == (two,)
    assert sorted(store) == sorted([one, three])
    assert store.sweep({one}, min_age=0) == (three,)


def test_sweep_and_cleanup_leave_a_publisher_alone(
    store: GenerationStore, make_lora_weights: MakeWeights
) -> None:
    generation = store.publish(make_lora_weights())
    with store._locked(exclusive=False):  # as while another process publishes
        leftover = store.root / ".partial" / "in-progress"
        leftover.mkdir()
        GenerationStore(store.root)
        assert leftover.exists()
        assert store.sweep(set(), min_age=0) == ()
    GenerationStore(store.root)
    assert not leftover.exists()
    assert store.sweep(set(), min_age=0) == (generation,)


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(
    store: GenerationStore, make_lora_weights: MakeWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="cannot be stored: No space left on device"):
            store.publish(make_lora_weights())
    assert list(store) == []
    assert not list((store.root / ".partial").iterdir())


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="the adapter store cannot be opened: Not a directory"):
        GenerationStore(tmp_path / "file" / "store")


CRASHES = """
    # Publishes in forked children that are killed before their n-th change to the disk, for n = 1, 2, ...
    import json, os, sys
    from pathlib import Path
    import torch
    from loramux_adapters.spec import AdapterSpec
    from loramux_adapters.store import GenerationStore
    from loramux_adapters.weights import LoraWeights

    root = Path(sys.argv[1])
    spec = AdapterSpec(r=2, lora_alpha=2, target_modules=("q",))
    weights = LoraWeights(spec, {"m.q": (torch.ones(2, 3), torch.ones(4, 2))})
    weights.generation
    outcomes = []
    for crash_at in range(1, 100):
        pid = os.fork()
        if pid == 0:
            steps = 0
            def counted(function):
                def call(*args, **kwargs):
                    global steps
                    steps += 1
                    if steps == crash_at:
                        os.kill(os.getpid(), 9)
                    return function(*args, **kwargs)
                return call
            for name in ("fsync", "mkdir", "rename", "replace", "unlink", "chmod", "rmdir"):
                setattr(os, name, counted(getattr(os, name)))
            store = GenerationStore(root / str(crash_at))
            store.publish(weights)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        store = GenerationStore(root / str(crash_at))  # what a restart does
        present = list(store)
        for generation in present:
            store.verify(generation)
        leftovers = len(list((store.root / ".partial").iterdir()))
        again = store.publish(weights)
        store.verify(again)
        outcomes.append({"killed": os.WIFSIGNALED(status), "present": len(present), "leftovers": leftovers})
        if not os.WIFSIGNALED(status):
            break
    print(json.dumps(outcomes))
"""


def test_killed_at_every_step(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CRASHES), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    outcomes = json.loads(result.stdout)
    assert len(outcomes) > 12
    assert [outcome["killed"] for outcome in outcomes] == [True] * (len(outcomes) - 1) + [False]
    assert not any(outcome["leftovers"] for outcome in outcomes)
    present = [outcome["present"] for outcome in outcomes]
    assert present == sorted(present)  # from some step on it is there, and never half
    assert present[0] == 0
    assert present[-1] == 1
