"""Damaged databases and generations: noticed, named, moved out of the way and kept."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from random import Random

import pytest
import torch

from loramux_adapters.errors import StorageDamaged, StorageError
from loramux_adapters.registry import AdapterRegistry
from loramux_adapters.set_aside import database_files, open_or_set_aside, set_aside
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.store import GenerationStore
from loramux_adapters.weights import LoraWeights


def weights(value: float) -> LoraWeights:
    spec = AdapterSpec(r=2, lora_alpha=4, target_modules=("q_proj",))
    pair = (torch.full((2, 64), value), torch.full((64, 2), value))
    return LoraWeights(spec, {"model.layers.0.self_attn.q_proj": pair})


def filled(root: Path, names: int) -> None:
    store = GenerationStore(root / "generations")
    registry = AdapterRegistry(root / "adapters.sqlite3", store)
    for number in range(names):
        generation = store.publish(weights(float(number)))
        registry.put(f"adapter-{number}", generation, source="upload", metadata={"n": number})
    registry.close()


def reopened(root: Path) -> AdapterRegistry:
    database, store = root / "adapters.sqlite3", root / "generations"
    return open_or_set_aside(
        lambda: AdapterRegistry(database, GenerationStore(store)), *database_files(database), store
    )


@pytest.mark.parametrize("damage", ["no database", "page", "cut", "row"])
def test_a_damaged_database_is_kept_with_what_it_named(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, names=60)
    database = tmp_path / "adapters.sqlite3"
    data = bytearray(database.read_bytes())
    if damage == "no database":
        data[:100] = b"x" * 100
    elif damage == "page":
        data[4096 * 2 : 4096 * 3] = Random(0).randbytes(4096)
    elif damage == "cut":
        del data[4096 * 2 :]
    database.write_bytes(data)
    if damage == "row":
        with sqlite3.connect(database) as connection:
            connection.execute("UPDATE adapters SET metadata = '{' WHERE name = 'adapter-7'")
        connection.close()
    registry = reopened(tmp_path)
    assert registry.list() == ()
    generation = registry.store.publish(weights(99.0))
    registry.put("fresh", generation, source="upload")
    registry.sweep(min_age=0)
    registry.close()
    [kept] = tmp_path.glob("adapters.sqlite3.corrupt-*")
    assert kept.read_bytes() == bytes(data) or damage == "row"
    [store] = tmp_path.glob("generations.corrupt-*")
    assert len(list(GenerationStore(store))) == 60, "what the damaged registry named is gone"
    assert "is damaged" in caplog.text or "cannot be read" in caplog.text
    assert kept.name.removeprefix("adapters.sqlite3") in caplog.text
    again = reopened(tmp_path)
    assert [record.name for record in again.list()] == ["fresh"]
    again.close()


def test_other_reasons_not_to_open_it_set_nothing_aside(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "adapters.sqlite3") as connection:
        connection.execute("PRAGMA user_version = 1000")
    connection.close()
    with pytest.raises(StorageError, match="another version of loramux") as error:
        reopened(tmp_path)
    assert not isinstance(error.value, StorageDamaged)
    assert not list(tmp_path.glob("*.corrupt-*"))


def test_a_damaged_generation_is_set_aside_and_the_others_stay(tmp_path: Path) -> None:
    store = GenerationStore(tmp_path)
    good, cut, torn, empty = (store.publish(weights(float(value))) for value in range(4))
    for generation, name, data in (
        (cut, "adapter_model.safetensors", b"short"),
        (torn, "manifest.json", b"{"),
    ):
        path = store.path(generation) / name
        path.chmod(0o644)
        path.write_bytes(data)
    (store.path(empty) / "adapter_config.json").unlink()
    problems = store.set_damaged_aside()
    assert set(problems) == {cut, torn, empty}
    assert "other sizes" in problems[cut]
    assert "no readable manifest" in problems[torn]
    assert "adapter_config.json is missing" in problems[empty]
    assert list(store) == [good]
    assert len(list(tmp_path.glob("??/*.corrupt-*"))) == 3
    assert store.set_damaged_aside() == {}
    store.sweep((), min_age=0)
    assert len(list(tmp_path.glob("??/*.corrupt-*"))) == 3, "what was set aside was swept"
    with pytest.raises(StorageError, match="is not in the adapter store"):
        store.path(cut)
    assert store.publish(weights(1.0)) == cut  # and can come back
    store.verify(cut)


def test_a_name_is_never_used_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    suffixes = set()
    for number in range(3):
        (tmp_path / "jobs").mkdir()
        (tmp_path / "jobs" / str(number)).touch()
        suffixes.add(set_aside(tmp_path / "jobs", tmp_path / "absent"))
    assert len(suffixes) == 3
    assert sorted(path.name for path in tmp_path.glob("jobs.corrupt-*/*")) == ["0", "1", "2"]


def test_what_was_not_moved_in_full_is_moved_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty database beside the old generations would have them all swept away."""
    filled(tmp_path, names=2)
    (tmp_path / "adapters.sqlite3").write_bytes(b"x" * 5000)
    rename, moved = Path.rename, []

    def only_once(self: Path, target: Path) -> Path:
        if moved:
            raise OSError("busy")
        moved.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", only_once)
    with pytest.raises(StorageError):
        reopened(tmp_path)
    monkeypatch.undo()
    reopened(tmp_path).close()
    kept = [path for path in tmp_path.rglob("adapter_model.safetensors") if ".corrupt-" in str(path)]
    assert len(kept) == 2
    assert [path.name for path in tmp_path.glob("adapters.sqlite3.corrupt-*")]
