"""Other servers as contestants, against scripted ones: what is sent to them, what is read from them, which are chosen."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from loadtests import BenchError, bench_peers, export_readers
from loadtests.adapters import BenchAdapter
from loadtests.client import Request, body_of
from loadtests.parity import Tokens, summarize
from loadtests.peers import servers
from loadtests.peers.http_peer import HttpPeer
from loadtests.peers.servers import LLAMA_CPP, VLLM, Launch, PeerServer, Room, ServerKind
from loadtests.scenarios import zipf_draws

ADAPTERS = [BenchAdapter(f"bench-{number}", Path(f"/adapters/{number}"), "aa") for number in range(2)]
REQUESTS = [Request([1, 2, 3], "bench-1", 2), Request([4], None, 2)]


class Scripted(BaseHTTPRequestHandler):
    """Answers as llama.cpp's and vLLM's servers do: two tokens, 7 and 8, with the text "xy"."""

    seen: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    text: ClassVar[str] = "x"  # of the first streamed piece

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append((self.path, body))
        if self.path == "/completion":
            self._answer(json.dumps({"tokens": [7, 8], "content": "xy"}).encode())
        elif not body["stream"]:
            self._answer(json.dumps({"choices": [{"token_ids": [7, 8], "text": "xy"}]}).encode())
        else:
            pieces = [{"text": self.text, "finish_reason": None}, {"text": "y", "finish_reason": "length"}]
            events: list[dict[str, Any]] = [{"choices": [piece]} for piece in pieces]
            events.append({"choices": [], "usage": {"completion_tokens": 2}})
            self._answer(b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events))

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[str]:
    Scripted.seen.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def contestant(kind: ServerKind, url: str) -> HttpPeer:
    names = [adapter.name for adapter in ADAPTERS]
    return HttpPeer(kind, url, names, REQUESTS, "generated", cast(Tokens, SimpleNamespace(special=[0])))


@pytest.mark.parametrize("kind", [LLAMA_CPP, VLLM], ids=lambda kind: kind.name)
def test_a_server_takes_part(kind: ServerKind, scripted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = contestant(kind, scripted)
    peer.prepare()
    assert peer.answers() == [(request, [7, 8]) for request in REQUESTS]
    assert peer.turn().rate > 0
    assert peer.repeats == (2, 0)
    assert list(peer.without) == ([0] if kind is LLAMA_CPP else []), (
        "what it is never to take is not its fault"
    )
    monkeypatch.setattr(Scripted, "text", "z")
    peer.turn()
    assert peer.repeats == (4, 2), "two streams whose text is not the checked one's"
    streamed = [body for _, body in Scripted.seen if body["stream"]]
    assert all(body["temperature"] == 0 and body["ignore_eos"] for body in streamed)
    assert {tuple(body["prompt"]): body["model"] for body in streamed} == {(1, 2, 3): "bench-1", (4,): "base"}


def test_llama_cpp_is_told_which_adapter_by_number(scripted: str) -> None:
    contestant(LLAMA_CPP, scripted).prepare()
    for path, body in Scripted.seen:
        assert path == "/completion"
        assert body["lora"] == (
            [{"id": 1, "scale": 1.0}] if body["model"] == "bench-1" else [{"id": 0, "scale": 0.0}]
        )
        assert body["cache_prompt"] is False
        assert body["return_tokens"] is True
        assert body["n_predict"] == 2


def test_a_shared_prefix_is_cached_and_nothing_else_is() -> None:
    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    shared = bench_peers.KNOWN["shared-prefix"].requests([], encode)
    prompts = [request.prompt for request in shared]
    assert {len(prompt) for prompt in prompts} == {1039}
    assert len({tuple(prompt[:1024]) for prompt in prompts}) == 1
    assert len({tuple(prompt) for prompt in prompts}) == 8
    assert {body_of("base", request, {})["cache_salt"] for request in shared} == {"shared"}
    assert all(LLAMA_CPP.fields(request, [])["cache_prompt"] for request in shared)
    other = bench_peers.KNOWN["prefill"].requests([], encode)
    assert len({body_of("base", request, {})["cache_salt"] for request in other}) == len(other)


def test_adapters_are_drawn_by_zipfs_law() -> None:
    places = zipf_draws(5000, 1000)
    assert places == zipf_draws(5000, 1000)
    assert set(places) == set(range(max(places) + 1)), "places among those that were drawn"
    counts = sorted((places.count(place) for place in set(places)), reverse=True)
    assert 1.4 < counts[0] / counts[1] < 2.8, "the first is asked for twice as often as the second"
    scenario = bench_peers.KNOWN["zipf"]
    names = [f"bench-{number}" for number in range(scenario.adapters)]
    asked = [request.adapter for request in scenario.requests(names, lambda text: [1] * len(text))]
    assert set(asked) == set(names)
    assert len(asked) == scenario.streams > scenario.adapters


def test_how_the_servers_are_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[Path] = []
    monkeypatch.setattr(servers, "convert_model", lambda checkpoint, file: converted.append(file))
    monkeypatch.setattr(servers, "convert_adapter", lambda checkpoint, adapter, file: converted.append(file))
    base = tmp_path / "base"
    command = " ".join(map(str, LLAMA_CPP.launch(base, tmp_path, ADAPTERS, Room(4, 100), 2).command))
    assert converted == [tmp_path / name for name in ("model.gguf", "bench-0.gguf", "bench-1.gguf")]
    for words in ("--threads 2", "--parallel 4", "--ctx-size 528", "--lora-init-without-apply"):
        assert words in command
    launch = VLLM.launch(base, tmp_path, ADAPTERS, Room(4, 100), 1)
    command = " ".join(map(str, launch.command))
    assert (
        f"--enable-lora --max-lora-rank 16 --max-loras 2 --lora-modules bench-0={ADAPTERS[0].path}" in command
    )
    assert launch.environment["OMP_NUM_THREADS"] == "1"
    assert "--enable-lora" not in VLLM.launch(base, tmp_path, [], Room(4, 100), 1).command


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    launch = Launch([sys.executable, "-c", "raise SystemExit('no {port}')"], {})
    with (
        PeerServer(launch, tmp_path / "log") as server,
        pytest.raises(BenchError, match=r"a peer did not start:\nno \d+"),
    ):
        server.wait_ready()


def _chosen(arguments: Sequence[str]) -> list[str]:
    return [scenario.name for scenario in bench_peers.chosen_scenarios(bench_peers.parse(arguments))]


def test_scenarios_and_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _chosen([])[0] == "peers-single"
    [mixed] = bench_peers.chosen_scenarios(bench_peers.parse(["mixed"]))
    assert {goal.over for goal in mixed.goals} >= {"vllm", "llama.cpp", "peft-set-adapter"}
    with pytest.raises(BenchError, match="zipf-1000 is no scenario here"):
        _chosen(["zipf-1000"])
    absent = [replace(kind, program=tmp_path / kind.name) for kind in (LLAMA_CPP, VLLM)]
    monkeypatch.setattr(bench_peers, "KINDS", absent)
    with pytest.raises(BenchError, match="run `make peers`"):
        bench_peers.chosen_kinds([])
    (tmp_path / "vllm").touch()
    assert [kind.name for kind in bench_peers.chosen_kinds([])] == ["vllm"]
    with pytest.raises(BenchError, match=r"--peer llama\.cpp: is not installed"):
        bench_peers.chosen_kinds(["llama.cpp"])
    with pytest.raises(BenchError, match="choose from llama"):
        bench_peers.chosen_kinds(["ollama"])


def test_what_a_reader_of_an_export_may_get_wrong() -> None:
    here: dict[str, Any] = {"ids": [[1, 2]], "loss": 2.5, "chat": "Hi", "tokens": []}
    right = summarize([], 0.5)
    assert export_readers.faults(here, here, right) == []
    assert export_readers.faults({"ids": [[1, 2]]}, here, right) == []
    wrong = {"ids": [[1, 3]], "loss": 2.6, "chat": "Ho"}
    assert len(export_readers.faults(wrong, here, right)) == 3
    unread = summarize([None], 0.5)
    assert export_readers.faults(here, here, unread) == [unread.verdict]
