"""Archives from strangers: every format a client may send, and every trick, without a byte outside the folder."""

from __future__ import annotations

import gzip
import io
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramux_adapters.adapter_files import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE, GateLimits
from loramux_adapters.archives import unpack
from loramux_adapters.errors import InvalidAdapter, StorageError

LIMITS = GateLimits(max_config_bytes=1000, max_file_bytes=100_000)
GOOD = {CONFIG_FILE: b'{"r": 4}', WEIGHTS_FILE: b"weights" * 100}
Members = dict[str, bytes] | list[tuple[tarfile.TarInfo, bytes]]


def tar(members: Members, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def unpacked(data: bytes, tmp_path: Path, limits: GateLimits = LIMITS) -> dict[str, bytes]:
    (tmp_path / "upload").write_bytes(data)
    target = tmp_path / "staged"
    target.mkdir()
    unpack(tmp_path / "upload", target, limits)
    return {entry.name: entry.read_bytes() for entry in target.iterdir()}


def refusal(data: bytes, tmp_path: Path, limits: GateLimits = LIMITS) -> InvalidAdapter:
    with pytest.raises(InvalidAdapter) as caught:
        unpacked(data, tmp_path, limits)
    assert str(caught.value).isprintable()
    assert str(tmp_path) not in str(caught.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"upload", "staged"}
    assert {entry.name for entry in (tmp_path / "staged").iterdir()} <= set(ADAPTER_FILES)
    return caught.value


FORMATS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "tar": tar,
    "gnu tar": lambda members: tar(members, tarfile.GNU_FORMAT),
    "ustar": lambda members: tar(members, tarfile.USTAR_FORMAT),
    "tar.gz": lambda members: gzip.compress(tar(members)),
    "tar.zst": lambda members: zstandard.compress(tar(members)),
    "zip": zipped,
    "stored zip": lambda members: zipped(members, zipfile.ZIP_STORED),
}
COMPRESSED = {name: FORMATS[name] for name in ("tar", "tar.gz", "tar.zst", "zip")}


@pytest.mark.parametrize("pack", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("prefix", ["", "./", "my-adapter/", "./my-adapter/"])
@pytest.mark.parametrize(
    "beside",
    [{}, {"README.md": b"# about", "training_manifest.json": bytes(2**20 + 1)}],
    ids=["plain", "beside"],
)
def test_good_archives(
    pack: Callable[[dict[str, bytes]], bytes], prefix: str, beside: dict[str, bytes], tmp_path: Path
) -> None:
    members = {prefix + name: data for name, data in (beside | GOOD).items()}
    assert unpacked(pack(members), tmp_path) == GOOD


def test_folder_entries_and_extended_headers(tmp_path: Path) -> None:
    """What `tar czf` and Python's tarfile write around the files."""
    folder, config = tarfile.TarInfo("my-adapter/"), tarfile.TarInfo(f"my-adapter/{CONFIG_FILE}")
    folder.type = tarfile.DIRTYPE
    config.mtime = 1.5  # a fraction of a second needs an extended header
    weights = tarfile.TarInfo(f"my-adapter/{WEIGHTS_FILE}")
    data = tar(
        [
            (special(".", tarfile.DIRTYPE)),
            (folder, b""),
            (config, GOOD[CONFIG_FILE]),
            (weights, GOOD[WEIGHTS_FILE]),
        ]
    )
    assert unpacked(data, tmp_path) == GOOD


def test_zip_with_folder_entry_and_comment(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.mkdir("a")
        archive.comment = b"made by hand"
        for name, data in GOOD.items():
            archive.writestr(f"a/{name}", data)
    assert unpacked(buffer.getvalue(), tmp_path) == GOOD


@pytest.mark.parametrize("pack", COMPRESSED.values(), ids=COMPRESSED)
@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ({"../evil": b""}, '"../evil": is not a path inside the archive'),
        ({"a/../../evil": b""}, '"a/../../evil": is not a path inside the archive'),
        ({"/etc/passwd": b""}, '"/etc/passwd": is not a path inside the archive'),
        ({"..\\evil": b""}, '"..\\\\evil": is not a path inside the archive'),
        ({"C:/evil": b""}, '"C:/evil": is not a path inside the archive'),
        ({"a//b": b""}, '"a//b": is not a path inside the archive'),
        (
            {"adapter_model.bin": b"\x80\x04"},
            '"adapter_model.bin": does not belong in an adapter archive, it is a pickle',
        ),
        ({"rng_state.pth": b""}, "it is a pickle, which can run code and is never read"),
        (
            {"tokenizer.json": b"{}"},
            '"tokenizer.json": does not belong in an adapter archive, remove all but',
        ),
        ({"chat_template.jinja": b"{{ x }}"}, '"chat_template.jinja": does not belong'),
        ({"._" + CONFIG_FILE: b""}, f'"._{CONFIG_FILE}": does not belong'),
        ({"new\nline": b""}, '"new\\nline": does not belong'),
        ({"deep/er/README.md": b""}, '"deep/er/README.md": does not lie beside the other files'),
        ({"other/README.md": b""}, '"other/README.md": does not lie beside the other files'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_members_that_do_not_belong(
    pack: Callable[[dict[str, bytes]], bytes], members: dict[str, bytes], fault: str, tmp_path: Path
) -> None:
    error = refusal(pack(GOOD | members), tmp_path)
    assert fault in str(error)
    assert len(error.faults) == 1


@pytest.mark.parametrize("pack", COMPRESSED.values(), ids=COMPRESSED)
def test_only_one_common_folder(pack: Callable[[dict[str, bytes]], bytes], tmp_path: Path) -> None:
    error = refusal(pack({f"a/b/{name}": data for name, data in GOOD.items()}), tmp_path)
    assert f'"a/b/{CONFIG_FILE}": does not lie beside the other files, at the top or in one' in str(error)


@pytest.mark.parametrize("pack", COMPRESSED.values(), ids=COMPRESSED)
def test_all_faults_of_a_listing_at_once(pack: Callable[[dict[str, bytes]], bytes], tmp_path: Path) -> None:
    error = refusal(pack({"../a": b"", "b.bin": b"", CONFIG_FILE: b"{}"}), tmp_path)
    assert [fault.where for fault in error.faults] == ['"../a"', '"b.bin"', WEIGHTS_FILE]


@pytest.mark.parametrize("pack", COMPRESSED.values(), ids=COMPRESSED)
@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        (
            GOOD | {CONFIG_FILE: b" " * 1001},
            "1001 bytes are more than allowed|larger than the 1000 bytes allowed",
        ),
        (GOOD | {WEIGHTS_FILE: bytes(100_001)}, "100001 bytes are more|larger than the 100000 bytes allowed"),
        ({f"{index}": b"" for index in range(17)}, "archive: has more than 16 members"),
        ({"README.md": b""}, "adapter_config.json: is not in the archive"),
    ],
    ids=["config", "weights", "count", "nothing"],
)
def test_sizes_and_counts_are_bounded(
    pack: Callable[[dict[str, bytes]], bytes], members: dict[str, bytes], sentence: str, tmp_path: Path
) -> None:
    message = str(refusal(pack(members), tmp_path))
    assert any(part in message for part in sentence.split("|"))


@pytest.mark.parametrize("pack", COMPRESSED.values(), ids=COMPRESSED)
def test_a_bomb_ends_early(pack: Callable[[dict[str, bytes]], bytes], tmp_path: Path) -> None:
    """50 MB of zeros in a small file: refused without being unpacked."""
    bomb = bytes(50_000_000)
    data = pack(GOOD | {WEIGHTS_FILE: bomb} if pack is zipped else {"README.md": bomb, **GOOD})
    start = time.process_time()
    refusal(data, tmp_path)
    assert time.process_time() - start < 0.3
    assert sum(entry.stat().st_size for entry in (tmp_path / "staged").iterdir()) <= 101_000


def test_many_members_share_one_budget(tmp_path: Path) -> None:
    members = GOOD | {f"extra-{index}": bytes(900_000) for index in range(13)}
    assert "archive: unpacks to more than an adapter may have" in str(
        refusal(gzip.compress(tar(members), 1), tmp_path)
    )


LINKS = {
    "symbolic link": (special(CONFIG_FILE, tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
    "hard link": (special(CONFIG_FILE, tarfile.LNKTYPE, WEIGHTS_FILE), "is a link"),
    "fifo": (special(CONFIG_FILE, tarfile.FIFOTYPE), "is not a regular file"),
    "device": (special(CONFIG_FILE, tarfile.CHRTYPE), "is not a regular file"),
    "sparse": (special(CONFIG_FILE, tarfile.GNUTYPE_SPARSE), "is not a regular file"),
    "long name": (special(CONFIG_FILE, tarfile.GNUTYPE_LONGNAME), "is not a regular file"),
    "a file's name": (special(CONFIG_FILE, tarfile.DIRTYPE), "is a folder, not a file"),
    "deep folder": (special("a/b", tarfile.DIRTYPE), "is a folder inside a folder"),
    "climbing folder": (special("..", tarfile.DIRTYPE), "is not a path inside the archive"),
}


@pytest.mark.parametrize(("member", "fault"), LINKS.values(), ids=LINKS)
def test_tar_members_that_are_no_files(
    member: tuple[tarfile.TarInfo, bytes], fault: str, tmp_path: Path
) -> None:
    assert fault in str(refusal(tar([member], tarfile.GNU_FORMAT), tmp_path))


@pytest.mark.parametrize("pack", [tar, lambda members: gzip.compress(tar(members))], ids=["tar", "tar.gz"])
def test_a_file_twice_in_a_tar(pack: Callable[[Members], bytes], tmp_path: Path) -> None:
    twice = [(tarfile.TarInfo(CONFIG_FILE), b"{}"), (tarfile.TarInfo(f"./{CONFIG_FILE}"), b"[]")]
    assert f'"./{CONFIG_FILE}": is there twice' in str(refusal(pack(twice), tmp_path))


def test_a_file_twice_in_a_zip(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for _ in range(2):
            with (
                pytest.warns(UserWarning, match="Duplicate")
                if CONFIG_FILE in archive.namelist()
                else no_warning()
            ):
                archive.writestr(CONFIG_FILE, b"{}")
    assert f'"{CONFIG_FILE}": is there twice' in str(refusal(buffer.getvalue(), tmp_path))


class no_warning:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def pax(**records: str) -> bytes:
    info = tarfile.TarInfo(CONFIG_FILE)
    info.pax_headers = records
    return tar([(info, b"{}")])


@pytest.mark.parametrize("key", ["path", "linkpath", "size", "GNU.sparse.name"])
def test_extended_headers_change_nothing_that_counts(key: str, tmp_path: Path) -> None:
    assert f'an extended header changes "{key}"' in str(refusal(pax(**{key: "x" * 200}), tmp_path))


def test_extended_headers_are_bounded(tmp_path: Path) -> None:
    assert "an extended header that is too long" in str(refusal(pax(comment="x" * 100_000), tmp_path))


@pytest.mark.parametrize(
    "records", [b"nonsense", b"99 a=b\n", b"2 a=b\n", b"-5 a=b\n", b"9" * 6000 + b" a=b\n"]
)
def test_malformed_extended_headers(records: bytes, tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    data = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0")
    assert "archive: cannot be read to its end" in str(refusal(data + tar(GOOD), tmp_path))


def test_a_negative_size(tmp_path: Path) -> None:
    info = tarfile.TarInfo(CONFIG_FILE)
    info.size = -512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    assert header[124] == 0xFF
    assert "has a negative size" in str(refusal(bytes(header) + bytes(1024), tmp_path))


def test_a_size_beyond_the_limits_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo(WEIGHTS_FILE)
    info.size = 2**40
    error = refusal(info.tobuf(tarfile.GNU_FORMAT), tmp_path)
    assert [str(fault) for fault in error.faults] == [
        f'"{WEIGHTS_FILE}": {2**40} bytes are more than allowed'
    ]


def edited_zip(change: Callable[[bytearray], object]) -> bytes:
    data = bytearray(zipped(GOOD))
    change(data)
    return bytes(data)


def test_zip_tricks(tmp_path: Path) -> None:
    central = zipped(GOOD).index(b"PK\x01\x02")
    end = zipped(GOOD).rindex(b"PK\x05\x06")
    link = zipfile.ZipInfo(CONFIG_FILE)
    link.external_attr = 0o120777 << 16
    linked = io.BytesIO()
    with zipfile.ZipFile(linked, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    nameless = zipfile.ZipInfo("x")
    nameless.filename = nameless.orig_filename = ""
    unnamed = io.BytesIO()
    with zipfile.ZipFile(unnamed, "w") as archive:
        archive.writestr(nameless, b"{}")
    wrong_crc = edited_zip(lambda data: data.__setitem__(central + 16, data[central + 16] ^ 1))
    for number, (data, sentence) in enumerate(
        [
            (linked.getvalue(), "is a link"),
            (unnamed.getvalue(), '"": is not a path inside the archive'),
            (edited_zip(lambda data: data.__setitem__(central + 8, 1)), "is encrypted"),
            (zipped(GOOD, zipfile.ZIP_BZIP2), "is compressed by another method than deflate"),
            (zipped(GOOD, zipfile.ZIP_LZMA), "is compressed by another method than deflate"),
            (wrong_crc, "archive: cannot be read to its end"),
            (zipped(GOOD)[:-10], "is a .zip without an end"),
            (
                edited_zip(lambda data: data.__setitem__(slice(end + 12, end + 16), b"\xff\xff\xff\x7f")),
                "more than 16",
            ),
            (
                edited_zip(lambda data: data.__setitem__(slice(end, end), b"PK\x06\x07" + bytes(16))),
                "is a zip64 file",
            ),
            (b"PK\x03\x04" + bytes(100), "is a .zip without an end"),
        ]
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        assert sentence in str(refusal(data, directory))


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04K\x01.", b"BZh9" + bytes(100), b"\xfd7zXZ\0" + bytes(100), bytes(10_000)]
)
def test_other_formats(data: bytes, tmp_path: Path) -> None:
    assert "archive: is not a .zip, .tar, .tar.gz or .tar.zst file" in str(refusal(data, tmp_path))


@pytest.mark.parametrize("pack", COMPRESSED.values(), ids=COMPRESSED)
def test_a_cut_archive(pack: Callable[[dict[str, bytes]], bytes], tmp_path: Path) -> None:
    data = pack(GOOD)
    keep = len(data) // 2 if pack is not tar else 2048  # a tar ends in a long run of zeros
    refusal(data[:keep], tmp_path)


def test_a_full_disk_is_not_the_archives_fault(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(tar(GOOD))
    with pytest.raises(StorageError, match="a file cannot be created"):
        unpack(tmp_path / "upload", tmp_path / "missing", LIMITS)


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=5),
)
def test_mutated_archives_are_refused_or_whole(
    tmp_path_factory: pytest.TempPathFactory, kind: str, flips: list[tuple[float, int]]
) -> None:
    data = bytearray(FORMATS[kind](GOOD))
    for share, value in flips:
        data[int(share * len(data))] ^= value
    directory = tmp_path_factory.mktemp("fuzz")
    try:
        assert unpacked(bytes(data), directory).keys() == GOOD.keys()
    except InvalidAdapter as error:
        assert str(error).isprintable()
