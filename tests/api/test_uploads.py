"""What strangers send to POST /v1/adapters: every fault gets its sentence, and nothing of it stays."""

from __future__ import annotations

import asyncio
import copy
import errno
import gzip
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from loramux_adapters import store
from loramux_adapters.adapter_files import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE, GateLimits
from loramux_server.api.idempotency import Idempotency, OwnedKey
from loramux_server.api.pace import BodyTimeout
from loramux_server.api.uploads import MAX_FIELD_BYTES, max_body_bytes, receive_upload
from tests.adapters.conftest import AdapterFiles, adapter_files, make_lora_weights, tiny_geometry
from tests.adapters.test_gate import CASES, LIMITS
from tests.api.catalog_support import (
    CatalogStand,
    Files,
    contents,
    fault,
    files,
    make_files,
    roots,
    stand,
    tarred,
)
from tests.api.test_metrics import value

__all__ = [
    "adapter_files",
    "files",
    "make_files",
    "make_lora_weights",
    "roots",
    "stand",
    "tiny_geometry",
]  # fixtures

BOUNDARY = "XyZ"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(name: str, data: bytes, *, file: bool = False, more: str = "") -> bytes:
    extra = f'; filename="{name}"' if file else ""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n{more}\r\n'
    return head.encode() + data + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()


async def test_the_hostile_corpus_over_http(
    stand: CatalogStand, adapter_files: AdapterFiles, tmp_path: Path
) -> None:
    stand.catalog.limits = LIMITS
    refused = 0
    for number, case in enumerate(CASES):
        altered = copy.deepcopy(adapter_files)
        case.alter(altered)
        response = await stand.upload("evil", contents(altered, tmp_path / str(number)))
        error = fault(response)
        assert str(tmp_path) not in response.text, case.name
        assert stand.staged == [], case.name
        if response.status_code == 413:  # larger than its kind may be: it was not even received
            assert error["code"] == "request_too_large", case.name
            assert error["param"] in ADAPTER_FILES, case.name
            continue
        refused += 1
        assert (response.status_code, error["code"]) == (400, "invalid_adapter"), case.name
        assert error["message"].startswith("adapter 'evil' is refused: "), case.name
        assert case.sentence in error["message"], case.name
        assert len(error["faults"]) == case.faults, case.name
    assert len(CASES) - refused == 2
    assert list(stand.catalog.registry.store) == []
    assert value(stand.metrics, "adapters_rejected_total") == refused


async def test_all_faults_of_two_files_in_one_answer(stand: CatalogStand, files: Files) -> None:
    config = json.loads(files[CONFIG_FILE]) | {"use_dora": True, "bias": "all"}
    response = await stand.upload(
        "a", {CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: files[WEIGHTS_FILE][:-1]}
    )
    assert [one["where"] for one in fault(response)["faults"]] == ["bias", "use_dora", WEIGHTS_FILE]


BODIES: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 400, "it was cut short"),
    "no parts": (END, 400, "name: Field required"),
    "nonsense": (b"nonsense" * 100, 400, "it is not multipart/form-data"),
    "cut in a part": (part("name", b"a")[:-8], 400, "it was cut short"),
    "cut after a part": (part("name", b"a"), 400, "it was cut short"),
    "no name": (part("archive", b"x", file=True) + END, 400, "name: Field required"),
    "bad name": (part("name", b"../evil") + END, 400, "is not an adapter name"),
    "base name": (part("name", b"tiny") + END, 400, "'tiny' is the base model's name"),
    "no files": (part("name", b"a") + END, 400, f"{CONFIG_FILE}: is missing; {WEIGHTS_FILE}: is missing"),
    "one file": (part("name", b"a") + part(CONFIG_FILE, b"{}", file=True) + END, 400, f"{WEIGHTS_FILE}: is missing"),
    "archive and file": (
        part("name", b"a") + part("archive", b"x", file=True) + part(CONFIG_FILE, b"{}", file=True) + END,
        400,
        "archive: comes beside files",
    ),
    "name twice": (part("name", b"a") + part("name", b"b") + END, 400, "name: is there twice"),
    "file twice": (part(CONFIG_FILE, b"{}") + part(CONFIG_FILE, b"[]") + END, 400, f"{CONFIG_FILE}: is there twice"),
    "unknown part": (part("overwrte", b"true") + END, 400, "'overwrte' is no part of an upload"),
    "climbing part": (part("../../etc/cron.d/x", b"x", file=True) + END, 400, "is no part of an upload"),
    "pickle part": (part("adapter_model.bin", b"x", file=True) + END, 400, "is no part of an upload"),
    "no disposition": (f"--{BOUNDARY}\r\nX: y\r\n\r\nz\r\n".encode() + END, 400, "is no part of an upload"),
    "many headers": (part("name", b"a", more="A: b\r\n" * 20) + END, 400, "it is not multipart/form-data"),
    "long header": (part("name", b"a", more="A: " + "b" * 9000 + "\r\n") + END, 400, "it is not multipart/form-data"),
    "field too long": (part("name", b"a" * (MAX_FIELD_BYTES + 1)) + END, 413, "name: is larger than"),
    "not UTF-8": (part("description", b"\xff") + END, 400, "description: is not valid UTF-8"),
    "bad flag": (part("name", b"a") + part("pinned", b"maybe") + END, 400, "pinned: Input should be a valid boolean"),
    "bad JSON": (part("name", b"a") + part("metadata", b"{") + END, 400, "metadata: cannot be read as JSON"),
    "JSON list": (part("name", b"a") + part("metadata", b"[]") + END, 400, "it must be a JSON object"),
    "NaN": (part("name", b"a") + part("metadata", b'{"x": NaN}') + END, 400, "NaN and Infinity are not JSON numbers"),
    "config too large": (part(CONFIG_FILE, bytes(8193)) + END, 413, f"{CONFIG_FILE}: is larger than the 8192 bytes"),
    "weights too large": (part(WEIGHTS_FILE, bytes(65537)) + END, 413, "is larger than the 65536 bytes allowed"),
    "not an archive": (part("name", b"a") + part("archive", b"x") + END, 400, "is not a .zip, .tar, .tar.gz"),
    "archive climbs": (
        part("name", b"a") + part("archive", tarred({"../x": b""})) + END,
        400,
        '"../x": is not a path inside the archive',
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "status", "sentence"), BODIES.values(), ids=BODIES)
async def test_malformed_uploads(stand: CatalogStand, body: bytes, status: int, sentence: str) -> None:
    stand.catalog.limits = LIMITS
    response = await stand.client.post("/v1/adapters", content=body, headers=FORM)
    assert response.status_code == status, response.text
    assert sentence in fault(response)["message"]
    assert len(stand.catalog.registry) == 0


HEADERS: dict[str, tuple[dict[str, str], int, str]] = {
    "text": ({"content-type": "text/plain"}, 415, "Content-Type: application/json"),
    "no boundary": ({"content-type": "multipart/form-data"}, 400, "the Content-Type has no boundary"),
    "long boundary": (
        {"content-type": "multipart/form-data; boundary=" + "x" * 300}, 400, "the boundary is too long"),
    "compressed": (FORM | {"content-encoding": "gzip"}, 415, "compressed request bodies are not accepted"),
    "another site": (FORM | {"origin": "https://evil.example"}, 403, "another site's pages"),
    "a sandboxed page": (FORM | {"origin": "null"}, 403, "another site's pages"),
    "claims 1 TiB": (FORM | {"content-length": str(2**40)}, 413, "the upload is larger than"),
    "key with a space": (FORM | {"idempotency-key": "a b"}, 400, "Idempotency-Key must be"),
}  # fmt: skip


@pytest.mark.parametrize(("headers", "status", "sentence"), HEADERS.values(), ids=HEADERS)
async def test_wrong_headers(
    stand: CatalogStand, headers: dict[str, str], status: int, sentence: str
) -> None:
    response = await stand.client.post("/v1/adapters", content=part("name", b"a") + END, headers=headers)
    assert (response.status_code, sentence in fault(response)["message"]) == (status, True), response.text


async def test_a_page_of_this_server_may_upload(stand: CatalogStand, files: Files) -> None:
    body = part("name", b"a") + b"".join(part(name, data, file=True) for name, data in files.items()) + END
    response = await stand.client.post("/v1/adapters", content=body, headers=FORM | {"origin": "http://test"})
    assert response.status_code == 201


async def test_an_endless_upload_ends_at_the_limit(stand: CatalogStand) -> None:
    """No Content-Length: the body is cut off when no upload can be that long."""
    stand.catalog.limits = LIMITS
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 65536
            yield b"\r\n" * 32768  # a preamble, which the parser skips

    response = await stand.client.post("/v1/adapters", content=endless(), headers=FORM)
    assert (response.status_code, fault(response)["code"]) == (413, "request_too_large")
    assert sent <= max_body_bytes(LIMITS) + 2 * 65536


def scope() -> dict[str, Any]:
    headers = [(name.encode(), text.encode()) for name, text in FORM.items()]
    return {"type": "http", "method": "POST", "headers": headers}


def request(chunks: AsyncIterator[bytes]) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": await anext(chunks), "more_body": True}

    return Request(scope(), receive)


async def test_a_stalled_upload_ends(tmp_path: Path) -> None:
    async def stalls() -> AsyncIterator[bytes]:
        yield part("name", b"a")
        await asyncio.sleep(60)

    with pytest.raises(BodyTimeout):
        async with receive_upload(request(stalls()), tmp_path, GateLimits(), idle_s=0.05):
            pytest.fail("it has not ended")
    assert list(tmp_path.iterdir()) == []


async def test_an_upload_is_streamed_to_disk(tmp_path: Path) -> None:
    """20 MB in pieces: the file grows while they come, and no more than a piece is held."""
    seen = []
    total, piece = 20_000_000, 100_000

    async def pieces() -> AsyncIterator[bytes]:
        yield part(WEIGHTS_FILE, b"", file=True).removesuffix(b"\r\n")
        for _ in range(total // piece):
            seen.append(sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")))
            yield bytes(piece)
        yield b"\r\n" + END
        yield b""

    async def whole() -> AsyncIterator[dict[str, Any]]:
        async for chunk in pieces():
            yield {"type": "http.request", "body": chunk, "more_body": bool(chunk)}

    messages = whole()
    receiving = Request(scope(), messages.__anext__)
    async with receive_upload(receiving, tmp_path, GateLimits()) as upload:
        assert (upload.directory / WEIGHTS_FILE).stat().st_size == total
    behind = [number * piece - size for number, size in enumerate(seen)]
    assert max(behind) < 2_000_000
    assert list(tmp_path.iterdir()) == []


async def test_the_loop_goes_on_while_an_adapter_is_checked(stand: CatalogStand, files: Files) -> None:
    read = stand.catalog._publisher._store

    def slow(*arguments: Any) -> Any:
        time.sleep(0.3)
        return read(*arguments)

    stand.catalog._publisher._store = slow  # type: ignore[method-assign]
    uploading = asyncio.create_task(stand.upload("a", files))
    gaps = []
    while not uploading.done():
        before = asyncio.get_running_loop().time()
        await asyncio.sleep(0.01)
        gaps.append(asyncio.get_running_loop().time() - before)
    assert (await uploading).status_code == 201
    assert max(gaps) < 0.25


async def test_a_full_disk_is_507(stand: CatalogStand, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/secret/place")

    monkeypatch.setattr(store, "write_file", full)
    response = await stand.upload("a", files)
    assert (response.status_code, fault(response)["code"]) == (507, "storage_full")
    assert response.headers["x-should-retry"] == "false"
    assert "/secret" not in response.text
    assert "a" not in stand.catalog.registry
    monkeypatch.undo()
    assert (await stand.upload("a", files)).status_code == 201


async def test_a_broken_data_directory_tells_nothing(
    stand: CatalogStand, files: Files, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    stand.catalog.staging = tmp_path / "file" / "staging"
    response = await stand.upload("a", files)
    assert (response.status_code, fault(response)["code"]) == (500, "internal_error")
    assert str(tmp_path) not in response.text
    stand.catalog.staging = tmp_path / "elsewhere"


async def test_equal_parallel_uploads_with_a_key_are_one(stand: CatalogStand, files: Files) -> None:
    published = []
    publish = stand.catalog._publisher._store
    stand.catalog._publisher._store = lambda *a: published.append(a[0]) or publish(*a)  # type: ignore[method-assign, func-returns-value]
    answers = await asyncio.gather(*(stand.upload("a", files, key="k-1", overwrite="true") for _ in range(8)))
    assert {(answer.status_code, answer.content) for answer in answers} == {(201, answers[0].content)}
    assert published == ["a"]
    assert (await stand.upload("a", files, key="k-1", overwrite="true")).content == answers[0].content
    assert len(list(stand.catalog.registry.store)) == 1
    for other in (
        await stand.upload("b", files, key="k-1", overwrite="true"),
        await stand.upload("a", files | {CONFIG_FILE: b"{}"}, key="k-1", overwrite="true"),
        await stand.upload("a", files, key="k-1"),
    ):
        assert (other.status_code, fault(other)["code"]) == (400, "idempotency_key_reused")
        assert other.headers["x-should-retry"] == "false"
    assert "b" not in stand.catalog.registry


async def test_equal_parallel_uploads_without_a_key_are_one_generation(
    stand: CatalogStand, files: Files
) -> None:
    answers = await asyncio.gather(*(stand.upload("a", files) for _ in range(6)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["generation"] for answer in answers}) == 1
    assert len(list(stand.catalog.registry.store)) == 1
    assert len((await stand.show("a"))["generations"]) == 1


async def test_unequal_parallel_uploads_have_one_winner(
    stand: CatalogStand, make_files: Callable[[int], Files]
) -> None:
    answers = await asyncio.gather(*(stand.upload("a", make_files(number)) for number in range(5)))
    [winner] = [answer for answer in answers if answer.status_code == 201]
    assert {fault(answer)["code"] for answer in answers if answer is not winner} == {"adapter_conflict"}
    assert (await stand.show("a"))["generation"] == winner.json()["generation"]


async def test_a_failed_upload_frees_its_key(stand: CatalogStand, files: Files) -> None:
    bad = files | {CONFIG_FILE: b"[]"}
    answers = await asyncio.gather(*(stand.upload("a", bad, key="k") for _ in range(3)))
    assert {(answer.status_code, fault(answer)["code"]) for answer in answers} == {(400, "invalid_adapter")}
    assert (await stand.upload("a", files, key="k")).status_code == 201


async def test_uploads_at_once_are_bounded(
    stand: CatalogStand, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux_server.api.routes.adapters.MAX_UPLOADS", 2)
    answers = await asyncio.gather(*(stand.upload("a", files) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [201, 201, 429, 429, 429]
    assert {answer.headers["retry-after"] for answer in answers if answer.status_code == 429} == {"1"}


async def test_old_keys_are_forgotten() -> None:
    keys = Idempotency(max_keys=3)
    done = []

    async def once(key: str, owner: str = "acme") -> bytes:
        async def work() -> bytes:
            done.append(f"{owner} {key}")
            return key.encode()

        return await keys.once(OwnedKey(owner, key), "same", work)

    for key in ("a", "b", "c", "a", "d", "b", "a"):
        assert await once(key) == key.encode()
    assert done == ["acme a", "acme b", "acme c", "acme d", "acme a"]
    for number in range(10):
        await once(f"{number}", "other")
    done.clear()
    for key in ("d", "b", "a"):
        await once(key)
    assert done == ["acme b"], "what another tenant sends makes nobody forget"


async def test_a_client_that_leaves_leaves_nothing(tmp_path: Path, files: Files) -> None:
    messages = iter(
        [
            {"type": "http.request", "body": part(CONFIG_FILE, files[CONFIG_FILE]), "more_body": True},
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> dict[str, Any]:
        return next(messages)

    staging = tmp_path / "staging"
    with pytest.raises(ClientDisconnect):
        async with receive_upload(Request(scope(), receive), staging, GateLimits()):
            pytest.fail("it has not ended")
    assert list(staging.iterdir()) == []


async def test_a_compressed_bomb_ends_early(stand: CatalogStand, files: Files) -> None:
    stand.catalog.limits = LIMITS
    bomb = gzip.compress(tarred(files | {"README.md": bytes(30_000_000)}))
    response = await stand.upload("a", {"archive": bomb})
    assert (response.status_code, fault(response)["code"]) == (400, "invalid_adapter")
