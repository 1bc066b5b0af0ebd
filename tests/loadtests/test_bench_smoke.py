"""The benchmark's arithmetic, its client against a scripted server, and its smallest scenario for real."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loadtests import BenchError, bench
from loadtests.adapters import write_adapters
from loadtests.client import Load, Request, Stream, run_load
from loadtests.contestants import Turn
from loadtests.lifecycle import MEASURES
from loadtests.parity import TOLERANCES, StreamCheck, Tokens, summarize
from loadtests.peers.loader import OurLoader, PeftLoader, timed
from loadtests.peers.peft_peer import PeftPeer
from loadtests.report import Figure, Result, Spread, print_result, ratio, save
from loadtests.scenarios import (
    BESIDE_PROMPTS,
    CACHED,
    COLD,
    DIFFERENCE,
    OURS,
    SCENARIOS,
    UNCACHED,
    WARM,
    Goal,
    Scenario,
    drafts_kind,
)
from loadtests.server import base_name

CARDS = [{"id": "tiny", "parent": None}, {"id": "bench-0", "parent": "tiny", "generation": "aa"}]


class ScriptedServer(BaseHTTPRequestHandler):
    """Streams `max_tokens` pieces "x" (fewer if the prompt begins with 13); model "broken" fails in the middle."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self._answer(200, json.dumps({"data": CARDS}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append(body)
        if body["model"] == "nobody":
            self._answer(404, b'{"error": {"message": "The model \'nobody\' does not exist"}}')
            return
        count = body["max_tokens"] - (body["prompt"][0] == 13)
        events = [self._piece(f"t{i}", "logprobs" in body, last=i == count - 1) for i in range(count)]
        details = {"cached_tokens": len(body["prompt"]) - 1}
        usage = {"completion_tokens": count, "prompt_tokens_details": details}
        events.append({"choices": [], "usage": usage})
        if body["model"] == "broken":
            events = [events[0], {"error": {"message": "the engine stopped"}}]
        stream = b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) + b"data: [DONE]\n\n"
        self._answer(200, stream)

    def _piece(self, name: str, scored: bool, *, last: bool) -> dict[str, Any]:
        choice = {"text": "x", "finish_reason": "length" if last else None, "logprobs": None}
        return {"choices": [{**choice, "logprobs": {"tokens": [name]}} if scored else choice]}

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        middle = len(content) // 2  # in two writes: events are torn anywhere
        self.wfile.write(content[:middle])
        self.wfile.flush()
        self.wfile.write(content[middle:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[str]:
    ScriptedServer.seen.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), ScriptedServer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_client_sends_fixed_greedy_requests_and_reads_every_token(scripted: str) -> None:
    load = run_load(scripted, "tiny", [Request([1, 2], None, 5), Request([3, 4, 5], "bench-0", 5)])
    assert [stream.tokens for stream in load.streams] == [5, 5]
    assert [stream.text for stream in load.streams] == ["xxxxx", "xxxxx"]
    assert load.prompt_tokens == 5
    assert load.seconds >= max(stream.arrivals[-1] for stream in load.streams)
    by_model = {body["model"]: body for body in ScriptedServer.seen}
    assert set(by_model) == {"tiny", "bench-0"}
    for body in by_model.values():
        assert (body["temperature"], body["ignore_eos"], body["max_tokens"]) == (0, True, 5)
        assert "logprobs" not in body


def test_client_keeps_out_of_the_prefix_cache_unless_told_otherwise(scripted: str) -> None:
    requests = [Request([1, 2], None, 2)] * 2
    fresh = run_load(scripted, "tiny", requests)
    run_load(scripted, "tiny", requests, extra={"cache_salt": "ours"})
    salts = [body["cache_salt"] for body in ScriptedServer.seen]
    assert len(set(salts[:2])) == 2
    assert salts[2:] == ["ours", "ours"]
    assert [stream.cached_tokens for stream in fresh.streams] == [1, 1]


def test_client_reads_token_names_when_asked(scripted: str) -> None:
    load = run_load(scripted, "tiny", [Request([1], None, 3)], token_names=True)
    assert load.streams[0].token_names == ["t0", "t1", "t2"]


def test_client_sends_what_a_scenario_adds(scripted: str) -> None:
    load = run_load(scripted, "tiny", [Request([1], None, 4)], extra={"logprobs": 5, "ignore_eos": False})
    assert load.streams[0].tokens == 4
    body = ScriptedServer.seen[-1]
    assert (body["logprobs"], body["ignore_eos"], body["max_tokens"]) == (5, False, 4)
    with pytest.raises(BenchError, match="asked for 8 tokens, got 4"):  # this server gives one answer
        run_load(scripted, "tiny", [Request([1], None, 4)], extra={"n": 2})


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request([13], None, 4), "asked for 4 tokens, got 3"),
        (Request([1], "nobody", 4), "HTTP 404: The model 'nobody' does not exist"),
        (Request([1], "broken", 4), "the engine stopped"),
    ],
)
def test_client_refuses_answers_that_are_not_what_was_asked(
    scripted: str, request_: Request, sentence: str
) -> None:
    with pytest.raises(BenchError, match=sentence):
        run_load(scripted, "tiny", [request_])


def test_no_server() -> None:
    with pytest.raises(BenchError, match="http://127.0.0.1:9"):
        run_load("http://127.0.0.1:9", "tiny", [Request([1], None, 1)])


def test_a_running_server_must_serve_our_adapters(
    scripted: str, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    assert base_name(scripted, []) == "tiny"
    with pytest.raises(BenchError, match="does not serve the benchmark's adapter bench-0"):
        base_name(scripted, write_adapters(tiny_model("llama"), tmp_path, count=1))


def test_rates_are_read_off_the_arrivals() -> None:
    # two streams of 4 tokens: all decode from 2.0, when the second has its first token, to 5.0, when the first ends
    early = Stream(0.0, [1.0, 2.0, 3.0, 5.0], 5.0, "abcd", 4, [])
    late = Stream(0.5, [2.0, 4.0, 5.0, 8.0], 8.0, "abcd", 4, [])
    load = Load([early, late], prompt_tokens=100)
    assert load.seconds == 8.0
    assert load.generated_per_s == 1.0
    assert load.prompt_per_s == 50.0
    assert load.decode_per_s == pytest.approx((2 + 2) / 3)
    assert late.ttft == 1.5
    assert early.gaps == [1.0, 1.0, 2.0]
    assert load.gaps == [1.0, 2.0, 2.0, 1.0, 3.0]
    one_token = Load([Stream(0.0, [1.0], 1.0, "a", 1, [])], prompt_tokens=10)
    assert one_token.decode_per_s is None


def test_ratios_and_goals() -> None:
    ours = Figure(OURS, "tok/s", [30.0, 20.0, 40.0])
    peer = Figure("peer", "tok/s", [10.0, 10.0, 5.0])
    assert ours.spread == Spread(20.0, 30.0, 40.0)
    assert ratio(ours, peer) == Spread(2.0, 3.0, 8.0)
    goals = (
        Goal(OURS, 2.5, over="peer"),
        Goal(OURS, 31),
        Goal(OURS, 31, at_most=True),
        Goal(OURS, 1, over="absent"),
    )
    result = Result(Scenario("s", "a scenario", streams=1, goals=goals), {"threads": 1}, [ours, peer])
    assert [(goal.value, goal.met) for goal in result.goals] == [(3.0, True), (30.0, False), (30.0, True)]


def test_a_contestant_that_did_nothing_has_no_ratio() -> None:
    figures = [
        Figure(OURS, "tok/s", [3.0, 2.0]),
        Figure("starved", "tok/s", [1.0, 0.0]),
        Figure("b", "tok/s", [1.0, 2.0]),
    ]
    result = Result(Scenario("s", "a scenario", streams=1), {}, figures)
    assert result.ratios == {"b": Spread(1.0, 2.5 / 1.5, 3.0)}
    print_result(result, Console())


def test_parity_counts_streams() -> None:
    checks = [
        StreamCheck(None, None, 0.0),
        StreamCheck(3, 0.0625, 0.125),  # a near-tie
        StreamCheck(5, 0.5, 1.5),  # wrong
        None,
    ]
    parity = summarize(checks, tolerance=0.25, texts=(8, 1))
    assert (parity.streams, parity.identical, parity.violations, parity.unreadable) == (4, 1, 1, 1)
    assert parity.margins == [0.0625, 0.5]
    assert not parity.right
    assert parity.verdict == "WRONG: 1 of 4 streams, off by 1.50"
    assert summarize(checks[:2], 0.25).right
    assert summarize(checks[:2], 0.25).verdict == "1/2 identical, near-ties within 0.12"


def test_report_is_printed_and_saved_without_naming_the_machine(tmp_path: Path) -> None:
    parity = summarize([StreamCheck(None, None, 0.0)], 0.25)
    figures = [
        Figure(OURS, "tok/s", [300.0], "over HTTP", {"ttft_p50_s": 0.25}, parity),
        Figure("peer", "tok/s", [100.0]),
    ]
    result = Result(Scenario("s", "a scenario", streams=1, goals=(Goal(OURS, 400),)), {"threads": 2}, figures)
    console = Console(record=True, width=140)
    print_result(result, console)
    text = console.export_text()
    for part in ("3.00x", "1/1 identical", "TTFT p50 250 ms", "NOT MET", "over HTTP"):
        assert part in text
    path = save(result, tmp_path)
    assert path.name.endswith("-s.json")
    saved = json.loads(path.read_text())
    assert saved["figures"][0]["median"] == 300.0
    assert saved["ratios"]["peer"] == {"low": 3.0, "median": 3.0, "high": 3.0}
    assert set(saved["machine"]) == {"cpu", "cores", "system"}
    assert "torch" in saved["versions"]


def test_contestants_take_turns() -> None:
    order: list[str] = []

    class Fake:
        note = ""
        repeats = (0, 0)

        def __init__(self, name: str) -> None:
            self.name = name

        def prepare(self) -> None:
            order.append(f"prepare {self.name}")

        def turn(self) -> Turn:
            order.append(self.name)
            return Turn(1.0, 2.0)

        def answers(self) -> list[Any]:
            return []

    turns = bench.play([Fake("a"), Fake("b")], rounds=2)
    assert order == ["prepare a", "prepare b", "a", "b", "a", "b"]
    assert {name: len(items) for name, items in turns.items()} == {"a": 2, "b": 2}


def test_requests_are_fixed_by_the_scenario() -> None:
    def encode(text: str) -> list[int]:
        return list(text.encode())

    mixed = SCENARIOS["mixed"]
    names = [f"bench-{i}" for i in range(8)]
    requests = mixed.requests(names, encode)
    assert len(requests) == 32
    assert {request.adapter for request in requests[:8]} == set(names)
    assert {len(request.prompt) for request in requests} == {128}
    assert len({tuple(request.prompt) for request in requests}) == 32
    assert requests == mixed.requests(names, encode)
    assert [r.prompt for r in SCENARIOS["base-32"].requests(names, encode)] == [r.prompt for r in requests]
    assert all(request.adapter is None for request in SCENARIOS["base-32"].requests(names, encode))


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--list"]) == 0
    assert "one-adapter-32" in capsys.readouterr().out
    assert bench.main(["no-such"]) == 1
    assert "no-such is no scenario" in capsys.readouterr().err
    for own_server in ("start", "zipf-1000"):
        assert bench.main([own_server, "--url", "http://127.0.0.1:9"]) == 1
        assert f"{own_server} measures a server of its own" in capsys.readouterr().err
    for_any_server = {
        one.name for one in bench.chosen_scenarios(bench.parse(["--url", "http://127.0.0.1:9"]))
    }
    assert for_any_server == SCENARIOS.keys() - {"start", *MEASURES}
    chosen = bench.chosen_scenarios(bench.parse(["prefill", "mixed", "--new-tokens", "4", "--streams", "2"]))
    assert [(scenario.streams, scenario.new_tokens) for scenario in chosen] == [(2, 1), (2, 4)]
    assert [scenario.goals for scenario in chosen] == [(), ()], "goals are for the scenario's own sizes"
    assert bench.chosen_scenarios(bench.parse(["mixed", "--streams", "32"])) == [SCENARIOS["mixed"]]


def add_tokenizer(model: Path, directory: Path) -> Path:
    """A copy of the tiny model with one distinct token for each of its 320 ids."""
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).symlink_to(file)
    vocabulary = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"filler{index}": index for index in range(len(vocabulary), 320)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(directory)
    return directory


def test_token_names_lead_back_to_ids(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    names = Tokens(add_tokenizer(tiny_model("llama"), tmp_path / "model"))
    assert names.ids(["filler300", "filler319"]) == [300, 319]
    assert names.ids(["filler300", "unknown"]) is None


def test_the_check_tells_a_wrong_adapter(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    adapters = write_adapters(tiny_model("llama"), tmp_path, count=2)
    peer = PeftPeer(tiny_model("llama"), {adapter.name: str(adapter.path) for adapter in adapters}, threads=1)
    tolerance = TOLERANCES[str(peer.dtype).removeprefix("torch.")]
    prompts = [list(range(20 + i, 40 + i)) for i in range(4)]
    names = ["bench-0", "bench-1", None, "bench-0"]
    requests = [
        {"prompt": prompt, "adapter": name, "new_tokens": 8}
        for prompt, name in zip(prompts, names, strict=True)
    ]
    for mode in ("each", "batch"):
        _, answers = peer.generate(mode, requests)
        streams = [{**request, "tokens": tokens} for request, tokens in zip(requests, answers, strict=True)]
        assert all(check["deficit"] <= tolerance for check in peer.check(streams))
        swapped = [{**stream, "adapter": None if stream["adapter"] else "bench-1"} for stream in streams]
        assert all(check["deficit"] > tolerance for check in peer.check(swapped))


@pytest.mark.e2e
def test_smallest_scenario(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """A real server and a real reference: every figure comes with its answers checked."""
    model = add_tokenizer(tiny_model("llama"), tmp_path / "model")
    file = tmp_path / "result.json"
    sizes = ["--streams", "2", "--new-tokens", "4", "--prompt-tokens", "8", "--rounds", "1", "--threads", "1"]
    assert bench.main(["mixed", "--model", str(model), *sizes, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    names = [figure["name"] for figure in result["figures"]]
    assert names == ["loramux", "loramux, base only", "peft-set-adapter", "peft-adapter-names"]
    for figure in result["figures"]:
        assert figure["median"] > 0
        assert (figure["parity"]["violations"], figure["parity"]["unreadable"]) == (0, 0), figure["name"]
    assert set(result["ratios"]) == set(names[1:])


def test_both_loaders_load_what_they_are_given(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Again and again, each time another adapter; and both answer with it."""
    adapters = write_adapters(tiny_model("llama"), tmp_path, count=2)
    paths = {adapter.name: str(adapter.path) for adapter in adapters}
    prompt = list(range(20, 40))
    answers = []
    for loader in (OurLoader(tiny_model("llama"), threads=1), PeftLoader(tiny_model("llama"), threads=1)):
        assert timed(loader, paths) > 0
        assert timed(loader, paths) > 0
        answers.append([loader.answer(path, prompt, 4) for path in paths.values()])
        loader.close()
    peer = PeftPeer(tiny_model("llama"), paths, threads=1)
    tolerance = TOLERANCES[str(peer.dtype).removeprefix("torch.")]
    for given in answers:
        streams = [
            {"prompt": prompt, "adapter": name, "tokens": tokens}
            for name, tokens in zip(paths, given, strict=True)
        ]
        assert all(check["deficit"] <= tolerance for check in peer.check(streams))


@pytest.mark.e2e
@pytest.mark.soak
def test_smallest_scenario_of_adapters_that_come_and_go(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """A server over registered adapters, asked cold and warm."""
    model = add_tokenizer(tiny_model("llama"), tmp_path / "model")
    file = tmp_path / "result.json"
    sizes = ["--streams", "1", "--new-tokens", "4", "--prompt-tokens", "8", "--rounds", "1", "--threads", "1"]
    assert bench.main(["cold-adapter", "--model", str(model), *sizes, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())["figures"]
    assert [figure["name"] for figure in figures] == [COLD, WARM, DIFFERENCE]
    for figure in figures[:2]:
        parity = figure["parity"]
        assert (parity["streams"], parity["violations"], parity["unreadable"]) == (1, 0, 0)


@pytest.mark.e2e
@pytest.mark.soak
@pytest.mark.parametrize("name", ["shared-prefix", "long-prompts-beside"])
def test_smallest_scenarios_of_long_prompts(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = add_tokenizer(tiny_model("llama"), tmp_path / "model")
    file = tmp_path / "result.json"
    sizes = [
        "--streams",
        "2",
        "--new-tokens",
        "8",
        "--prompt-tokens",
        "64",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    assert bench.main([name, "--model", str(model), *sizes, "--json", str(file)]) == 0
    first, second = json.loads(file.read_text())["figures"]
    for figure in (first, second):
        parity = figure["parity"]
        assert (parity["streams"], parity["violations"], parity["unreadable"]) == (2, 0, 0)
    if name == "shared-prefix":
        assert (first["name"], second["name"]) == (UNCACHED, CACHED)
        assert first["note"].startswith("0 of 96")
        assert second["note"].startswith("64 of 96")
    else:
        assert (first["note"], second["name"]) == ("0 prompts beside", BESIDE_PROMPTS)
        assert int(second["note"].split()[0]) > 0


@pytest.mark.e2e
@pytest.mark.soak
def test_smallest_scenario_of_drafts(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Two servers, with and without; the one with has made some."""
    model = add_tokenizer(tiny_model("llama"), tmp_path / "model")
    file = tmp_path / "result.json"
    sizes = [
        "--streams",
        "2",
        "--new-tokens",
        "32",
        "--prompt-tokens",
        "64",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    assert bench.main(["speculation", "--model", str(model), *sizes, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())["figures"]
    assert [figure["name"] for figure in figures] == [
        drafts_kind(count, drafts=drafts) for count in (1, 2) for drafts in (True, False)
    ]
    for figure in figures:
        parity = figure["parity"]
        assert (parity["violations"], parity["unreadable"]) == (0, 0)
        assert figure["note"].endswith("drafts right") == figure["name"].endswith("drafts")
