"""What may still be taken of host memory: page cache counts, a container's limit holds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from loramux_adapters.host_memory import available_bytes

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 GiB could be handed out, though page cache leaves next to nothing unused."""
    memory = SimpleNamespace(available=8 * GIB, free=GIB // 100)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def cgroup(directory: Path, limit: str, current: int = 0, inactive_file: int = 0) -> Path:
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{current}\n")
    (directory / "memory.stat").write_text(f"anon 1\ninactive_file {inactive_file}\nactive_file 5\n")
    return directory


def test_page_cache_is_memory_that_can_be_taken(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) == 8 * GIB
    assert available_bytes(cgroup(tmp_path, "max")) == 8 * GIB


def test_a_containers_limit_holds(tmp_path: Path) -> None:
    assert available_bytes(cgroup(tmp_path, str(4 * GIB), current=3 * GIB)) == GIB
    assert available_bytes(cgroup(tmp_path, str(4 * GIB), current=3 * GIB, inactive_file=GIB)) == 2 * GIB
    assert available_bytes(cgroup(tmp_path, str(4 * GIB), current=5 * GIB)) == 0
    assert available_bytes(cgroup(tmp_path, str(64 * GIB), current=GIB)) == 8 * GIB


def test_files_that_make_no_sense_leave_the_machines_figure(tmp_path: Path) -> None:
    assert available_bytes(cgroup(tmp_path, "plenty")) == 8 * GIB
