"""Staging from directories, archives and the hub: two plain files each time, or a fault and nothing left."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.adapter_files import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE, GateLimits
from loramux_adapters.errors import AdapterUnavailable, InvalidAdapter
from loramux_adapters.sources import (
    HubRevision,
    HuggingFaceHub,
    Staged,
    clean_staging,
    stage_archive,
    stage_directory,
    stage_hub,
)
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.weights import LoraWeights

COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def adapter(adapter_files: Any, tmp_path: Path) -> Path:
    directory = adapter_files.write(tmp_path / "adapters" / "one")
    (directory / "README.md").write_text("# about")
    return directory


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    return tmp_path / "staging"


def assert_staged(staged: Staged, adapter: Path, geometry: BaseGeometry) -> None:
    assert sorted(entry.name for entry in staged.directory.iterdir()) == sorted(ADAPTER_FILES)
    for name in ADAPTER_FILES:
        assert (staged.directory / name).read_bytes() == (adapter / name).read_bytes()
    LoraWeights.read(staged.directory, geometry)
    with staged:
        pass
    assert not staged.directory.exists()


def assert_refused(stage: Callable[[], object], sentence: str, staging: Path) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        stage()
    assert sentence in str(caught.value)
    assert not staging.exists() or not list(staging.iterdir())


def test_directory(adapter: Path, staging: Path, tiny_geometry: BaseGeometry) -> None:
    staged = stage_directory(adapter, staging)
    assert (staged.source, staged.origin) == ("path", str(adapter))
    assert_staged(staged, adapter, tiny_geometry)


def test_directory_with_roots(
    adapter: Path, staging: Path, tiny_geometry: BaseGeometry, tmp_path: Path
) -> None:
    (tmp_path / "alias").symlink_to(tmp_path / "adapters")
    assert_staged(stage_directory(adapter, staging, roots=[tmp_path / "alias"]), adapter, tiny_geometry)


def test_directory_outside_the_roots(adapter: Path, staging: Path, tmp_path: Path) -> None:
    root = tmp_path / "allowed"
    root.mkdir()
    (root / "link").symlink_to(adapter)
    (root / "files").mkdir()
    for name in ADAPTER_FILES:
        (root / "files" / name).symlink_to(adapter / name)
    (root / "loop").symlink_to(root / "loop")
    outside = "lora_path: is outside the folders adapters may be loaded from"
    for path in [adapter, root / "link", root / "files", root / ".." / "adapters" / "one", Path("/etc")]:
        assert_refused(lambda path=path: stage_directory(path, staging, roots=[root]), outside, staging)
    assert_refused(lambda: stage_directory(root / "nothing", staging, roots=[root]), "is missing", staging)
    assert_refused(lambda: stage_directory(root / "loop", staging, roots=[root]), "cannot be copied", staging)
    prefix = tmp_path / "allowed-not"
    prefix.mkdir()
    assert_refused(lambda: stage_directory(prefix, staging, roots=[root]), outside, staging)


def test_directory_faults_come_together(adapter: Path, staging: Path) -> None:
    (adapter / CONFIG_FILE).unlink()
    with pytest.raises(InvalidAdapter) as caught:
        stage_directory(adapter, staging, limits=GateLimits(max_file_bytes=100))
    assert [str(fault) for fault in caught.value.faults] == [
        f"{CONFIG_FILE}: is missing",
        f"{WEIGHTS_FILE}: is larger than the 100 bytes allowed",
    ]
    assert list(staging.iterdir()) == []


def test_archive(adapter: Path, staging: Path, tiny_geometry: BaseGeometry, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "upload", "w:gz") as archive:
        archive.add(adapter, arcname="one")
    staged = stage_archive(tmp_path / "upload", staging)
    assert (staged.source, staged.origin) == ("upload", "")
    assert_staged(staged, adapter, tiny_geometry)


def test_refused_archive_leaves_nothing(staging: Path, tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(b"nonsense")
    assert_refused(lambda: stage_archive(tmp_path / "upload", staging), "is not a .zip", staging)


def test_clean_staging(staging: Path) -> None:
    clean_staging(staging)
    (staging / "left").mkdir(parents=True)
    (staging / "left" / "file").write_text("x")
    clean_staging(staging)
    assert list(staging.iterdir()) == []


@pytest.mark.parametrize(
    "reference",
    [
        "hf://",
        "hf://repo",
        "hf://a/b/c",
        "hf://../b",
        "hf://a/b@",
        "hf://a/b@../x",
        "https://a/b",
        "a/b",
        "hf://a/b@-x",
        "hf://a/b@x/../y",
        "hf://a/b..c",
    ],
)
def test_malformed_hub_references(reference: str, staging: Path) -> None:
    assert_refused(
        lambda: stage_hub(reference, staging, hub=HuggingFaceHub()),
        "is not hf://organisation/repository",
        staging,
    )


class FakeHub:
    def __init__(self, directory: Path, sizes: dict[str, int]) -> None:
        self.directory, self.sizes = directory, sizes
        self.asked: list[tuple[str, ...]] = []

    def resolve(self, repo: str, revision: str) -> HubRevision:
        self.asked.append((repo, revision))
        return HubRevision(COMMIT, self.sizes)

    def download(self, repo: str, commit: str, file: str, directory: Path) -> None:
        self.asked.append((repo, commit, file))
        (directory / file).write_bytes((self.directory / file).read_bytes())


def test_hub_downloads_the_resolved_commit(adapter: Path, staging: Path, tiny_geometry: BaseGeometry) -> None:
    hub = FakeHub(adapter, {CONFIG_FILE: 10, WEIGHTS_FILE: 10, "tokenizer.json": 10**12})
    staged = stage_hub("hf://org/repo@v1.0/x", staging, hub=hub)
    assert (staged.source, staged.origin) == ("hub", f"hf://org/repo@{COMMIT}")
    assert hub.asked == [
        ("org/repo", "v1.0/x"),
        ("org/repo", COMMIT, CONFIG_FILE),
        ("org/repo", COMMIT, WEIGHTS_FILE),
    ]
    assert_staged(staged, adapter, tiny_geometry)
    stage_hub("hf://org/repo", staging, hub=hub).discard()
    assert ("org/repo", "main") in hub.asked


def test_hub_repository_without_an_adapter(adapter: Path, staging: Path) -> None:
    for sizes, sentence in [
        ({}, "adapter_config.json: is not in the repository; adapter_model.safetensors: is not in"),
        (
            {CONFIG_FILE: 1, "adapter_model.bin": 1},
            "is not in the repository, only a .bin, and it is a pickle",
        ),
        ({CONFIG_FILE: 1, WEIGHTS_FILE: 2**40}, f"{2**40} bytes, at most 2147483648 are allowed"),
    ]:
        hub = FakeHub(adapter, sizes)
        assert_refused(lambda hub=hub: stage_hub("hf://org/repo", staging, hub=hub), sentence, staging)
        assert len(hub.asked) == 1


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as its client asks of it for one small repository."""

    files: dict[str, bytes]

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/models/org/repo/revision/main":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            body = {"id": "org/repo", "sha": COMMIT, "siblings": siblings}
            return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        prefix = f"/org/repo/resolve/{COMMIT}/"
        if path.startswith(prefix) and path.removeprefix(prefix) in self.files:
            data = self.files[path.removeprefix(prefix)]
            return self.answer(200, data, ETag=f'"{len(data)}"', X_Repo_Commit=COMMIT)
        return self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def endpoint(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    handler = type(
        "Handler", (HubHandler,), {"files": {n: (adapter / n).read_bytes() for n in ADAPTER_FILES}}
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_hubs_own_client(
    endpoint: str, adapter: Path, staging: Path, tiny_geometry: BaseGeometry
) -> None:
    hub = HuggingFaceHub(endpoint=endpoint)
    staged = stage_hub("hf://org/repo", staging, hub=hub)
    assert staged.origin == f"hf://org/repo@{COMMIT}"
    assert_staged(staged, adapter, tiny_geometry)
    assert_refused(
        lambda: stage_hub("hf://org/other", staging, hub=hub),
        "source: org/other@main does not exist on the hub, or the server's token may not read it",
        staging,
    )


@pytest.mark.parametrize(("offline", "why"), [(True, "OfflineModeIsEnabled"), (False, "ConnectError")])
def test_an_unreachable_hub_is_said_clearly(
    staging: Path, monkeypatch: pytest.MonkeyPatch, offline: bool, why: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with pytest.raises(AdapterUnavailable, match=rf"hub cannot be reached \({why}\)") as caught:
        stage_hub("hf://org/repo", staging, hub=HuggingFaceHub(endpoint="http://127.0.0.1:9"))
    assert (caught.value.param, caught.value.code) == ("source", "source_unavailable")
