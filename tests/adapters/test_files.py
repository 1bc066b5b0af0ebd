"""File operations: what is a file, what a copy may cost, what a failed write leaves."""

from __future__ import annotations

import io
import resource
from pathlib import Path

import pytest

from loramux_adapters.errors import StorageError
from loramux_adapters.files import copy_bounded, open_regular, read_into, replace_file, write_file


def test_read_into_stops_at_the_end(tmp_path: Path) -> None:
    write_file(tmp_path / "file", [b"abc", b"def"])
    buffer = bytearray(10)
    with open_regular(tmp_path / "file") as file:
        assert read_into(file, memoryview(buffer)) == 6
    assert buffer == b"abcdef\0\0\0\0"


def test_write_file_never_overwrites(tmp_path: Path) -> None:
    write_file(tmp_path / "file", [b"old"])
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", [b"new"])
    assert (tmp_path / "file").read_bytes() == b"old"


def test_replace_file_is_whole_or_untouched(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, [b"old"])

    def failing() -> object:
        yield b"ne"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        replace_file(path, failing())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_links_are_followed_only_where_allowed(tmp_path: Path) -> None:
    write_file(tmp_path / "file", [b"x"])
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"x"
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "link", follow_links=False)


@pytest.mark.parametrize(("limit", "whole"), [(9, False), (10, True)])
def test_copy_bounded(tmp_path: Path, limit: int, whole: bool) -> None:
    assert copy_bounded(io.BytesIO(b"0123456789"), tmp_path / "copy", limit) is whole


def test_copy_bounded_blames_the_right_side(tmp_path: Path) -> None:
    class Broken:
        def read(self, size: int, /) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        copy_bounded(Broken(), tmp_path / "copy", 10)
    with pytest.raises(StorageError, match="a file cannot be created"):
        copy_bounded(io.BytesIO(b"x"), tmp_path / "missing" / "copy", 10)
    with pytest.raises(StorageError, match="a file cannot be created"):
        copy_bounded(io.BytesIO(b"x"), tmp_path / "copy", 10)


def test_a_copy_that_does_not_fit_is_a_storage_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    try:
        with pytest.raises(StorageError, match="a file cannot be written: File too large"):
            copy_bounded(io.BytesIO(b"0123456789"), tmp_path / "copy", 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
