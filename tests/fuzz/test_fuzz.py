"""The short form of `make fuzz`, and that a campaign would notice each thing it looks for."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters import archives, gate, sources
from loramux_adapters.errors import Fault, InvalidAdapter
from loramux_adapters.weights import LoraWeights
from tests.fuzz import campaign
from tests.fuzz.mutations import BYTES, CONTENT, FILE, MEMBER
from tests.fuzz.trial import Sandbox, Violation, bounded_memory, open_sandbox

CASES = 2000
SEED = 0


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with open_sandbox() as sandbox:
        yield sandbox


def test_two_thousand_uploads(sandbox: Sandbox, tmp_path: Path) -> None:
    tally = campaign.run(SEED, CASES, sandbox, tmp_path)
    assert tally.cases == CASES
    assert 0.1 < tally.accepted / CASES < 0.5, "both sides of the gate must be seen"
    assert len(tally.sentences) > 120
    assert set(tally.mutations) == {mutation.__name__ for mutation in (*CONTENT, *FILE, *MEMBER, *BYTES)}


def test_a_case_is_the_same_wherever_it_runs() -> None:
    first = [campaign.upload(SEED, number) for number in range(40)]
    assert [campaign.upload(SEED, number) for number in reversed(range(40))] == first[::-1]
    assert [campaign.upload(SEED + 1, number) for number in range(40)] != first


def careless_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_is_finite", lambda tensor: True)


def careless_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every member is written under its own name."""
    monkeypatch.setattr(archives._Unpacker, "wanted", lambda self, name, mode: name.rpartition("\\")[2])
    monkeypatch.setattr(archives._Unpacker, "finish", lambda self: None)


def careless_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_entry_problem", lambda entry, shapes, found: "")


def careless_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_BROKEN", (EOFError,))


def careless_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.Staged, "discard", lambda self: None)


def careless_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(directory: Path, *_: Any, **__: Any) -> LoraWeights:
        raise InvalidAdapter([Fault(str(directory), "is refused")])

    monkeypatch.setattr(LoraWeights, "read", read)


@pytest.mark.parametrize(
    ("fault", "sign"),
    [
        (careless_finite, "not finite"),
        (careless_names, "outside the data directory|left behind|StorageError"),
        (careless_shapes, "the file has tensors that were not read"),
        (careless_exceptions, "BadZipFile"),
        (careless_staging, "left behind"),
        (careless_message, "names this machine's folders"),
    ],
)
def test_a_fault_is_found_within_the_short_form(
    fault: Callable[[pytest.MonkeyPatch], None],
    sign: str,
    sandbox: Sandbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    with pytest.raises(campaign.Failed, match=sign) as caught:
        campaign.run(SEED, CASES, sandbox, tmp_path)
    monkeypatch.undo()
    [reproducer] = tmp_path.iterdir()
    number = int(reproducer.stem.rpartition("-")[2])
    assert f"--seed {SEED} --first {number} --cases 1" in str(caught.value)
    with tarfile.open(reproducer) as archive:
        said = json.load(archive.extractfile("case.json"))  # type: ignore[arg-type]
        assert (said["seed"], said["case"]) == (SEED, number)
        parts, done = campaign.upload(SEED, number)
        assert said["mutations"] == done
        assert {f"parts/{name}" for name in parts} == set(archive.getnames()) - {"case.json"}


def test_a_reproducer_is_run_again(sandbox: Sandbox, tmp_path: Path) -> None:
    parts, _ = campaign.upload(SEED, 0)
    campaign._write(tmp_path / "one.tar", parts, {})
    assert campaign.replay(tmp_path / "one.tar", sandbox) == sandbox.judge(parts)


@pytest.mark.parametrize(
    "touch",
    [
        lambda outside: (outside / "new").write_bytes(b""),
        lambda outside: (outside / "folder").mkdir(),
        lambda outside: (outside / "secret").read_bytes(),
        lambda outside: os.rename(outside / "secret", outside / "moved"),
        lambda outside: os.symlink("/etc", outside / "link"),
        lambda outside: __import__("pickle").loads(b"cos\ngetcwd\n."),
        lambda outside: __import__("subprocess").run(["true"], check=True),
    ],
    ids=["write", "folder", "read", "rename", "link", "pickle", "process"],
)
def test_the_trip_wire(touch: Callable[[Path], object], sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    with pytest.raises(Violation, match="outside the data directory"), sandbox._trip_wire:
        touch(tmp_path)
    with sandbox._trip_wire:
        (sandbox.data / "inside").mkdir()
        (sandbox.data / "inside" / "file").write_bytes(b"x")


def test_memory_is_bounded() -> None:
    with bounded_memory(64 * 1024**2), pytest.raises(RuntimeError, match="allocate"):
        torch.empty(2**32, dtype=torch.uint8)
    assert torch.empty(2**32, dtype=torch.uint8).numel() == 2**32
