"""A library is built once, whole or not at all, and whoever cannot build one is told why."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from loramux_adapters.native import build
from loramux_adapters.native.build import CannotBuild
from loramux_adapters.native.library import Native, load_native


def compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def real() -> str:
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        pytest.skip("no C compiler")
    return found


def test_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    script = f'case "$1" in --version) echo 1;; *) echo called >> {calls};; esac; exec {real()} "$@"'
    monkeypatch.setenv("CC", compiler(tmp_path / "cc", script))
    build.load(tmp_path / "made")
    build.load(tmp_path / "made")
    assert calls.read_text() == "called\n"
    assert [path.suffix for path in (tmp_path / "made").iterdir()] == [".so"]


def test_another_compiler_or_processor_is_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", real())
    build.load(tmp_path)
    monkeypatch.setattr(build, "_processor", lambda: "another")
    build.load(tmp_path)
    monkeypatch.setenv("CC", compiler(tmp_path / "cc", f'exec {real()} "$@"'))
    build.load(tmp_path)
    assert len(list(tmp_path.glob("*.so"))) == 3


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            '[ "$1" = --version ] || { echo "x.c:1: error: no such thing" >&2; exit 1; }',
            "error: no such thing",
        ),
        ("exit 3", "fails: 3"),
        ('[ "$1" = --version ] || touch here', "cannot be kept"),  # says it succeeded, and made nothing
    ],
)
def test_a_compiler_that_fails_leaves_nothing(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CC", compiler(tmp_path / "cc", script))
    with pytest.raises(CannotBuild, match=said):
        build.load(tmp_path / "made")
    made = tmp_path / "made"
    assert not made.exists() or not list(made.iterdir())


def test_half_a_library_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        f'[ "$1" = --version ] && exec {real()} "$@"; '
        'for last; do [ "$before" = -o ] && echo half > "$last"; before=$last; done'
    )
    monkeypatch.setenv("CC", compiler(tmp_path / "cc", script))
    with pytest.raises(CannotBuild, match="cannot be kept or opened"):
        build.load(tmp_path / "made")


def test_a_damaged_library_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", real())
    sources = sorted(build._SOURCES.glob("*.c"))
    path = tmp_path / f"{build._key([*build.compiler(), *build._FLAGS, build._native()], sources)}.so"
    path.write_bytes(b"")
    build.load(tmp_path)
    assert path.stat().st_size > 1000


def test_no_compiler_is_said_and_not_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert load_native(tmp_path) is None
    assert "there is no C compiler" in caplog.text
    monkeypatch.setenv("CC", str(tmp_path / "nowhere"))
    with pytest.raises(CannotBuild, match="does not run"):
        build.load(tmp_path)


def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", real())
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotBuild, match="cannot be kept"):
        build.load(tmp_path / "file" / "kernels")


def test_threads_are_those_of_torch(native: Native) -> None:
    """The library brings no OpenMP runtime of its own."""
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    assert len({path for path in mapped if "libgomp" in path or "libiomp" in path}) == 1
