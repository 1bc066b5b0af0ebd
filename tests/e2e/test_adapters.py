"""The life of adapters on a real server: upload, replace, roll back, pin, delete, attack, kill, while others talk."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import pytest
from safetensors.torch import load_file, save_file

from loramux_adapters.adapter_files import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.demo import demo_adapters
from tests.e2e.conftest import Server, start_server

pytestmark = pytest.mark.e2e

PIRATE, SENTIMENT = demo_adapters()["pirate"], demo_adapters()["sentiment"]
BODY = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}


def upload(
    server: Server, name: str, folder: Path, *, key: str | None = None, **fields: str
) -> httpx.Response:
    files = [
        (file, (file, (folder / file).read_bytes())) for file in ADAPTER_FILES if (folder / file).exists()
    ]
    headers = {"idempotency-key": key} if key else {}
    data = {"name": name, **fields}
    return httpx.post(f"{server.url}/v1/adapters", data=data, files=files, headers=headers, timeout=300)


def published(response: httpx.Response) -> str:
    assert response.status_code == 201, response.text
    generation: str = response.json()["generation"]
    return generation


def answer(server: Server, model: str, count: int = 16) -> tuple[str, str]:
    """The greedy text, and the generation that it is from."""
    body = {**BODY, "model": model, "max_tokens": count}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"], response.headers.get("x-adapter-generation", "")


@dataclass
class Stream:
    """A greedy stream read in the background."""

    server: Server
    model: str
    count: int
    pieces: list[str] = field(default_factory=list)
    generation: str = ""

    def run(self) -> Stream:
        body = {**BODY, "model": self.model, "max_tokens": self.count, "stream": True}
        with httpx.stream("POST", f"{self.server.url}/v1/completions", json=body, timeout=120) as response:
            self.generation = response.headers.get("x-adapter-generation", "")
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.pieces.append(json.loads(line[6:])["choices"][0]["text"])
        return self

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def wait_until_it_talks(self) -> None:
        deadline = time.monotonic() + 60
        while not self.pieces:
            assert time.monotonic() < deadline
            time.sleep(0.002)


def adapters(server: Server, name: str) -> dict[str, object]:
    shown: dict[str, object] = httpx.get(f"{server.url}/v1/adapters/{name}").json()
    return shown


def staged(server: Server) -> list[Path]:
    return list((server.log.parent / "data").glob("bases/*/staging/*"))


def test_an_upload_answers_at_once(server: Server) -> None:
    generation = published(upload(server, "team/pirate:v1", PIRATE, description="talks"))
    assert answer(server, "team/pirate:v1") == (answer(server, "pirate")[0], generation)
    shown = adapters(server, "team/pirate:v1")
    assert (shown["state"], shown["tier"], shown["source"]) == ("ready", "device", "upload")
    assert staged(server) == []


def test_a_replaced_adapter_answers_what_it_began(server: Server) -> None:
    """A stream that runs keeps its generation through replacing, rolling back and deleting; new ones get the new."""
    count, few = 48, 6
    old = published(upload(server, "swap", PIRATE))
    expected = answer(server, "pirate", count)[0]
    first, other = answer(server, "pirate", few)[0], answer(server, "sentiment", few)[0]
    assert first != other
    with ThreadPoolExecutor(1) as pool:
        stream = Stream(server, "swap", count)
        running = pool.submit(stream.run)
        stream.wait_until_it_talks()
        new = published(upload(server, "swap", SENTIMENT, overwrite="true", verify="false"))
        assert len(stream.pieces) < count, "the stream had ended before the adapter was replaced"
        assert answer(server, "swap", few) == (other, new)
        assert (running.result().text, stream.generation) == (expected, old)
        assert answer(server, f"swap@{old[:12]}", few) == (first, old)
        rolled = httpx.post(f"{server.url}/v1/adapters/swap/rollback", json={}).json()
        assert rolled["generation"] == old
        assert answer(server, "swap", few) == (first, old)
        last = Stream(server, "swap", count)
        running = pool.submit(last.run)
        last.wait_until_it_talks()
        gone = httpx.delete(f"{server.url}/v1/adapters/swap", params={"timeout": 0})
        assert (gone.status_code, gone.json()["in_flight"]) == (202, 1)
        with pytest.raises(openai.NotFoundError):
            server.openai.completions.create(model="swap", prompt="x", max_tokens=1)
        assert running.result().text == expected
    assert 'adapter="swap"' not in httpx.get(f"{server.url}/metrics").text


def test_a_pinned_adapter_is_ready_without_a_request(server: Server) -> None:
    generation = published(upload(server, "kept", SENTIMENT, pinned="true"))
    deadline = time.monotonic() + 60
    while adapters(server, "kept")["state"] != "ready":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert answer(server, "kept") == (answer(server, "sentiment")[0], generation)
    httpx.patch(f"{server.url}/v1/adapters/kept", json={"pinned": False}).raise_for_status()
    plan = httpx.post(f"{server.url}/v1/adapters/plan", json={"name": "kept"}).json()
    assert (plan["fits"], plan["device"]["resident"]) == (True, True)


@contextlib.contextmanager
def greedy_streams(server: Server, models: list[str], count: int) -> Iterator[list[Stream]]:
    """Streams that follow one another on each model for as long as the block runs."""
    stop = threading.Event()
    done: list[Stream] = []

    def keep(model: str) -> None:
        while not stop.is_set():
            done.append(Stream(server, model, count).run())

    with ThreadPoolExecutor(len(models)) as pool:
        tasks = [pool.submit(keep, model) for model in models]
        try:
            yield done
        finally:
            stop.set()
        for task in tasks:
            task.result()


def test_an_upload_is_proven(server: Server, tmp_path: Path) -> None:
    """While streams decode: what changes nothing is refused, what does something comes with figures."""
    zeros = tmp_path / "zeros"
    zeros.mkdir()
    (zeros / CONFIG_FILE).write_bytes((PIRATE / CONFIG_FILE).read_bytes())
    tensors = load_file(PIRATE / WEIGHTS_FILE)
    save_file({k: v.zero_() if "lora_B" in k else v for k, v in tensors.items()}, zeros / WEIGHTS_FILE)
    models = ["pirate", "demo"]
    expected = {model: answer(server, model, 24)[0] for model in models}
    with greedy_streams(server, models, 24) as streams:
        refused = upload(server, "idle", zeros)
        proven = upload(server, "proven", PIRATE)
        accepted = upload(server, "idle", zeros, allow_noop="true")
    assert {(stream.model, stream.text) for stream in streams} == set(expected.items())
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_adapter")
    assert "the adapter changes nothing: every lora_B is zero" in refused.json()["error"]["message"]
    published(accepted)
    assert accepted.json()["verification"]["verdict"] == "noop"
    assert answer(server, "idle")[0] == answer(server, "demo")[0]
    published(proven)
    report = adapters(server, "proven")["verification"]["report"]  # type: ignore[index]
    assert (report["verdict"], report["tokens_from"]) == ("ok", "4 built-in texts")
    assert report["shift"]["positions"] == 128
    assert report["shift"]["relative"] > 0.01
    assert report["peft"]["relative_error"] <= report["peft"]["relative_bound"]
    assert report["peft"]["top1_agreement"] == 1.0
    assert adapters(server, "extract")["verification"] is None  # from a folder


def test_equal_parallel_uploads_make_one_adapter(server: Server) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: upload(server, "twin", PIRATE, key="once"), range(6)))
    assert {(one.status_code, one.content) for one in answers} == {(201, answers[0].content)}
    assert len(adapters(server, "twin")["generations"]) == 1  # type: ignore[arg-type]


def test_the_command_line(server: Server) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "loramux_server", "adapters", *arguments, "--url", server.url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    assert run("add", "by/hand", str(PIRATE), "--description", "yo").startswith("by/hand is generation ")
    assert "is taken; set overwrite" in run("add", "by/hand", str(SENTIMENT), code=1)
    [row] = [line for line in run("list").splitlines() if "by/hand" in line.split()]
    assert adapters(server, "by/hand")["generation"][:12] in row  # type: ignore[index]
    assert json.loads(run("show", "by/hand", "--json"))["description"] == "yo"
    assert "has no earlier generation" in run("rollback", "by/hand", code=1)
    assert run("rm", "by/hand") == "by/hand is deleted\n"
    assert "there is no adapter named 'by/hand'" in run("show", "by/hand", code=1)


def test_a_killed_server_has_all_it_acknowledged(tmp_path: Path) -> None:
    """kill -9 in the middle of uploads; what had been answered is there after a restart, and nothing half."""
    arguments = ["demo", "--dtype", "float32", "--no-demo-adapters"]
    server = start_server(tmp_path, arguments)
    acknowledged: dict[str, str] = {"a": published(upload(server, "a", PIRATE, pinned="true"))}
    expected = answer(server, "a")

    def keep_uploading(worker: int) -> None:
        for number in range(1000):
            try:
                response = upload(server, f"w{worker}/{number}", (PIRATE, SENTIMENT)[number % 2])
            except httpx.HTTPError:
                return
            acknowledged[f"w{worker}/{number}"] = published(response)

    with ThreadPoolExecutor(3) as pool:
        tasks = [pool.submit(keep_uploading, worker) for worker in range(3)]
        while len(acknowledged) < 6:
            time.sleep(0.001)
        server.process.kill()
        for task in tasks:
            task.result()
    server.process.wait()
    again = start_server(tmp_path, arguments)
    listed = httpx.get(f"{again.url}/v1/adapters", params={"limit": 1000}).json()["data"]
    found = {card["id"]: card["generation"] for card in listed}
    assert acknowledged.items() <= found.items()
    assert set(found.values()) <= set(acknowledged.values())
    assert staged(again) == []
    assert answer(again, "a") == expected
    assert again.stop() == 0
