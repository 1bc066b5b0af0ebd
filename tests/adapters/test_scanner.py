"""Adapter folders: found, imported once, followed as they change, and never at the cost of another adapter."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loramux_adapters import scanner as scanner_module
from loramux_adapters.access import Access
from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.errors import AdapterConflict, InvalidAdapter, RequestError
from loramux_adapters.registry import AdapterRegistry
from loramux_adapters.scanner import AdapterScanner, find_adapters, fingerprint, import_directory
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.store import GenerationStore
from loramux_adapters.weights import LoraWeights

MakeWeights = Callable[..., LoraWeights]


class House:
    """A data directory, an --adapter-dir, and what happens to both."""

    def __init__(self, home: Path, geometry: BaseGeometry, make: MakeWeights) -> None:
        self.home, self.geometry, self.make = home, geometry, make
        self.folder = home / "adapters"
        self.folder.mkdir()
        self.start()

    def start(self) -> None:
        self.store = GenerationStore(self.home / "store")
        self.registry = AdapterRegistry(self.home / "registry.db", self.store, reserved={"base"})
        self.scanner = AdapterScanner(self.registry, self.store, self.geometry, [self.folder])

    def restart(self) -> None:
        self.registry.close()
        self.start()

    def add(self, name: str, seed: int = 0) -> Path:
        self.make(seed).write(self.folder / name)
        return self.folder / name

    def scan(self) -> dict[str, object]:
        """What a scan changed, without what it did not."""
        report = self.scanner.scan_once()
        failed = {name: str(error) for name, error in report.failed.items()}
        parts = {
            "added": report.added,
            "updated": report.updated,
            "removed": report.removed,
            "failed": failed,
        }
        return {key: value for key, value in parts.items() if value}

    def served(self) -> dict[str, str]:
        return {record.name: record.generation for record in self.registry.list()}


@pytest.fixture
def house(tmp_path: Path, tiny_geometry: BaseGeometry, make_lora_weights: MakeWeights) -> Iterator[House]:
    house = House(tmp_path, tiny_geometry, make_lora_weights)
    yield house
    house.registry.close()


def test_find_adapters(house: House) -> None:
    for name in ["one", "org/two", "org/three", ".hidden", "a/b/too-deep"]:
        house.add(name)
    house.add("one/checkpoint-500")  # inside an adapter: not an adapter of its own
    (house.folder / "empty").mkdir()
    (house.folder / "README.md").write_text("")
    assert find_adapters(house.folder) == {
        name: house.folder / name for name in ["one", "org/three", "org/two"]
    }


def test_first_scan_and_the_next(house: House) -> None:
    house.add("one", 1)
    house.add("org/two", 2)
    assert house.scan() == {"added": ["one", "org/two"]}
    assert house.served() == {"one": house.make(1).generation, "org/two": house.make(2).generation}
    record = house.registry.get("org/two")
    assert (record.source, record.origin) == ("path", str(house.folder / "org/two"))
    assert house.scan() == {}


def test_nothing_is_read_twice_even_after_a_restart(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.add("one")
    house.scan()
    house.restart()
    monkeypatch.setattr(LoraWeights, "read", None)
    assert house.scan() == {}
    assert house.scanner.scan_once().unchanged == 1


def test_changed_files_are_a_new_generation_of_the_name(house: House) -> None:
    house.add("one", 1)
    house.scan()
    house.add("one", 2)
    assert house.scan() == {"updated": ["one"]}
    assert [entry.generation for entry in house.registry.get("one").history] == [
        house.make(2).generation,
        house.make(1).generation,
    ]


def test_touched_files_are_no_change(house: House) -> None:
    folder = house.add("one")
    house.scan()
    os.utime(folder / WEIGHTS_FILE, (1, 1))
    assert house.scan() == {}
    assert len(house.registry.get("one").history) == 1


def test_a_removed_folder_removes_its_name(house: House) -> None:
    folder = house.add("one")
    house.add("two")
    house.scan()
    shutil.rmtree(folder)
    assert house.scan() == {"removed": ["one"]}
    assert list(house.served()) == ["two"]
    assert list(house.registry.scanned()) == [str(house.folder / "two")]
    house.add("one")
    assert house.scan() == {"added": ["one"]}


def test_a_renamed_folder_renames_the_adapter(house: House) -> None:
    house.add("one").rename(house.folder / "other")
    house.scan()
    (house.folder / "other").rename(house.folder / "third")
    assert house.scan() == {"added": ["third"], "removed": ["other"]}


def test_a_bad_adapter_is_reported_once_and_harms_nobody(house: House) -> None:
    house.add("good")
    (house.add("bad") / WEIGHTS_FILE).write_bytes(b"\x80\x04nonsense")
    found = house.scan()
    assert found["added"] == ["good"]
    assert "adapter 'bad' is refused: adapter_model.safetensors: the header claims" in found["failed"]["bad"]
    assert house.scan() == {}
    assert list(house.scanner.failures) == ["bad"]
    house.add("bad", 3)
    assert house.scan() == {"added": ["bad"]}
    assert house.scanner.failures == {}


def test_a_bad_adapter_is_read_once_and_forgotten_when_it_goes(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    (house.add("bad") / CONFIG_FILE).write_text("{")
    house.scan()
    with monkeypatch.context() as patched:
        patched.setattr(LoraWeights, "read", None)
        assert house.scan() == {}
    shutil.rmtree(house.folder / "bad")
    assert house.scan() == {}
    assert house.scanner.failures == {}


def test_a_half_written_file_is_tried_again_when_it_is_whole(house: House) -> None:
    folder = house.add("one")
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    assert "one" in house.scan()["failed"]
    (folder / WEIGHTS_FILE).write_bytes(whole)
    assert house.scan() == {"added": ["one"]}


def test_a_file_written_while_it_is_read_is_not_published(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = house.add("one", 1)
    read = LoraWeights.read

    def slow_read(*args: object, **kwargs: object) -> LoraWeights:
        weights = read(*args, **kwargs)
        house.add("one", 2)
        return weights

    monkeypatch.setattr(LoraWeights, "read", slow_read)
    assert "changed while it was read" in house.scan()["failed"]["one"]
    assert list(house.store) == []
    monkeypatch.undo()
    assert folder.exists()
    assert house.scan() == {"added": ["one"]}
    assert house.served() == {"one": house.make(2).generation}


def test_a_spoiled_adapter_goes_on_being_served(house: House) -> None:
    folder = house.add("one", 1)
    house.scan()
    (folder / CONFIG_FILE).write_text("{")
    assert "is not valid JSON" in house.scan()["failed"]["one"]
    (folder / CONFIG_FILE).unlink()
    assert "adapter_config.json: is missing" in house.scan()["failed"]["one"]
    assert house.served() == {"one": house.make(1).generation}
    house.add("one", 1)
    assert house.scan() == {}
    assert house.scanner.failures == {}


def test_an_uploaded_name_is_not_taken_over(house: House) -> None:
    uploaded = house.store.publish(house.make(7))
    house.registry.put("one", uploaded, source="upload")
    house.add("one", 1)
    assert "name: 'one' is taken by an upload" in house.scan()["failed"]["one"]
    assert house.scan() == {}
    assert house.served() == {"one": uploaded}
    house.registry.delete("one")
    assert house.scan() == {"added": ["one"]}


def test_a_folder_that_somebody_made_his_own_is_not_taken_for_shared(house: House) -> None:
    """A tenant may load a folder by its path: the record says what the scanner's own would, but for the owner."""
    folder = house.add("one", 1)
    generation = house.store.publish(house.make(1))
    tenant = Access("acme")
    house.registry.put("one", generation, source="path", origin=str(folder), access=tenant)
    assert "name: 'one' is taken by" in house.scan()["failed"]["one"]
    shutil.rmtree(folder)
    house.scan()
    assert house.registry.get("one", tenant).generation == generation


def test_an_upload_over_a_scanned_name_stays_when_the_folder_goes(house: House) -> None:
    folder = house.add("one", 1)
    house.scan()
    uploaded = house.store.publish(house.make(7))
    house.registry.put("one", uploaded, source="upload")
    assert house.scan() == {}
    shutil.rmtree(folder)
    assert house.scan() == {}
    assert house.served() == {"one": uploaded}


def test_a_deleted_name_stays_deleted_until_its_folder_changes(house: House) -> None:
    house.add("one", 1)
    house.scan()
    house.registry.delete("one")
    assert house.scan() == {}
    assert house.served() == {}
    house.add("one", 2)
    assert house.scan() == {"added": ["one"]}


def test_a_lost_generation_is_imported_again(house: House) -> None:
    house.add("one", 1)
    house.scan()
    house.store.delete(house.make(1).generation)
    house.scan()
    assert house.make(1).generation in house.store


def test_names_that_cannot_be(house: House) -> None:
    house.add("bad name")
    house.add("base")
    failed = house.scan()["failed"]
    assert "is not an adapter name" in failed["bad name"]
    assert "name: 'base' is the base model's name" in failed["base"]
    assert house.scan() == {}


def test_two_directories_with_one_name(house: House, tmp_path: Path) -> None:
    second = tmp_path / "second"
    house.make(2).write(second / "one")
    house.add("one", 1)
    house.scanner = AdapterScanner(house.registry, house.store, house.geometry, [house.folder, second])
    assert f"'one' is taken by {house.folder / 'one'}" in house.scan()["failed"]["one"]
    assert house.served() == {"one": house.make(1).generation}


def test_a_directory_that_went_away_keeps_its_names(house: House) -> None:
    house.add("one", 1)
    house.add("org/two", 2)
    house.scan()
    house.folder.rename(house.home / "unmounted")
    assert "folder: cannot be listed: No such file or directory" in house.scan()["failed"][str(house.folder)]
    assert len(house.served()) == 2
    (house.home / "unmounted").rename(house.folder)
    assert house.scan() == {}
    assert house.scanner.failures == {}


def test_an_unreadable_group_of_adapters_keeps_its_names(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.add("one", 1)
    house.add("org/two", 2)
    house.scan()
    listed = scanner_module._folders

    def refused(directory: Path) -> list[Path]:
        if directory.name == "org":
            raise PermissionError(13, "Permission denied")
        return listed(directory)

    monkeypatch.setattr(scanner_module, "_folders", refused)
    assert list(house.scan()["failed"]) == ["org"]
    assert sorted(house.served()) == ["one", "org/two"]
    monkeypatch.undo()
    assert house.scan() == {}


def test_a_directory_no_longer_configured_is_left_alone(house: House, tmp_path: Path) -> None:
    house.add("one", 1)
    house.scan()
    house.scanner = AdapterScanner(house.registry, house.store, house.geometry, [])
    shutil.rmtree(house.folder)
    assert house.scan() == {}
    assert len(house.served()) == 1


def test_links_to_folders_are_followed(house: House, tmp_path: Path) -> None:
    house.make(1).write(tmp_path / "elsewhere")
    (house.folder / "one").symlink_to(tmp_path / "elsewhere")
    (house.folder / "dangling").symlink_to(tmp_path / "nothing")
    assert house.scan() == {"added": ["one"]}


def test_fingerprint_sees_replacement_and_absence(house: House) -> None:
    folder = house.add("one", 1)
    marks = [fingerprint(folder)]
    house.add("one", 1)  # the same bytes in new files
    marks.append(fingerprint(folder))
    (folder / WEIGHTS_FILE).unlink()
    marks.append(fingerprint(folder))
    assert len(set(marks)) == 3
    assert fingerprint(folder) == marks[2]


def test_import_directory(house: House, tmp_path: Path) -> None:
    """What --lora-modules name=path does."""
    house.make(1).write(tmp_path / "checkpoint")
    record = import_directory(house.registry, house.geometry, "org/mine", tmp_path / "checkpoint")
    assert (record.name, record.generation) == ("org/mine", house.make(1).generation)
    assert import_directory(house.registry, house.geometry, "org/mine", tmp_path / "checkpoint") == record
    house.make(2).write(tmp_path / "checkpoint")
    record = import_directory(house.registry, house.geometry, "org/mine", tmp_path / "checkpoint")
    assert record.generation == house.make(2).generation
    assert house.scan() == {}  # no scan found it, so no scan removes it
    assert list(house.served()) == ["org/mine"]


def test_import_directory_refuses(house: House, tmp_path: Path) -> None:
    house.make(1).write(tmp_path / "one")
    import_directory(house.registry, house.geometry, "taken", tmp_path / "one")
    with pytest.raises(AdapterConflict, match="'taken' is taken by"):
        import_directory(house.registry, house.geometry, "taken", tmp_path / "two")
    with pytest.raises(RequestError, match="is not an adapter name"):
        import_directory(house.registry, house.geometry, "a@b", tmp_path / "one")
    with pytest.raises(
        InvalidAdapter, match=r"adapter_config.json: is missing; adapter_model.safetensors: is missing"
    ):
        import_directory(house.registry, house.geometry, "two", tmp_path / "nothing")


def test_a_thousand_known_folders_scan_at_once(house: House) -> None:
    """After a restart only stat calls are left; the folders are made without the store's fsyncs."""
    first = house.add("adapter-0")
    for index in range(1, 1000):
        shutil.copytree(first, house.folder / f"adapter-{index}")
    house.registry._database._connection.execute("PRAGMA synchronous = OFF")
    house.scan()
    house.restart()
    start = time.process_time()
    report = house.scanner.scan_once()
    assert report.unchanged == 1000
    assert time.process_time() - start < 2.0
