"""The command line: errors are one sentence and exit code 1, wrong usage is exit code 2, nobody sees a traceback.

Most of it calls the entry point in this process; a few real processes show that it also holds from outside.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.main import get_group

from loramux_adapters import __version__
from loramux_adapters.native import library
from loramux_server import cli
from loramux_server.banner import QUESTION, banner


class Outcome:
    def __init__(self, code: object, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def is_one_sentence(self) -> bool:
        return (
            self.code == 1
            and self.out == ""
            and self.err.startswith("loramux: ")
            and self.err.count("\n") == 1
        )


@pytest.fixture
def loramux(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """`loramux(*arguments)` in this process. Logging is left as it was: what a command set up writes to a captured file."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["loramux", *arguments])
        code: object = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code or 0
        return Outcome(code, *capfd.readouterr())

    yield run
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    root.setLevel(level)


def children(parent: int) -> list[str]:
    """Command lines of the living child processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append((stat.parent / "cmdline").read_text())
    return found


def process(*arguments: str, **environment: str) -> Outcome:
    """`loramux` as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "loramux_server", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


# --- real processes ----------------------------------------------------------------------------------------------------


def test_help_from_outside() -> None:
    outcome = process("--help")
    assert outcome.code == 0
    assert outcome.err == ""
    for command in ("serve", "ask", "version"):
        assert f"  {command} " in outcome.out


def test_a_missing_model_from_outside(tmp_path: Path) -> None:
    outcome = process("serve", str(tmp_path / "nothing"), "--port", "0", "--data-dir", str(tmp_path / "data"))
    assert outcome.is_one_sentence(), outcome.err
    assert outcome.err == f"loramux: {tmp_path / 'nothing'} does not exist\n"
    assert not (tmp_path / "data").exists()


def test_the_list_of_commands_imports_none_of_them() -> None:
    heavy = ("pydantic", "fastapi", "torch", "transformers", "httpx", "rich")
    check = f"import sys, loramux_server.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- in this process ---------------------------------------------------------------------------------------------------


def test_version(loramux: Any) -> None:
    outcome = loramux("version")
    assert (outcome.code, outcome.out) == (0, f"loramux {__version__}\n")


@pytest.mark.parametrize("name", ["verify", "train", "plan", "export", "merge", "doctor", "adapters", "jobs"])
def test_the_list_says_of_a_command_what_it_says_itself(loramux: Any, name: str) -> None:
    listed = get_group(cli.app).commands[name]
    summary = " ".join((listed.help or "").split())
    outcome = loramux(name, "--help")
    assert outcome.code == 0
    assert summary
    assert summary in " ".join(outcome.out.split())
    assert listed.hidden == (name == "merge")


@pytest.mark.parametrize(
    ("native", "bf16", "dtype"),
    [
        (SimpleNamespace(products="vectors"), False, "bfloat16"),
        (SimpleNamespace(products=None), False, "float32"),
        (None, False, "float32"),  # no compiler
        (None, True, "bfloat16"),
    ],
)
def test_auto_on_a_cpu_is_bf16_where_something_multiplies_it(
    native: object, bf16: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "load_native", lambda directory: native)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16)
    assert cli._cpu_dtype() == dtype


def test_a_plan_has_the_type_that_a_base_is_loaded_in(
    loramux: Any, tiny_model: Callable[[str], Path]
) -> None:
    model = tiny_model("llama")
    plan = loramux("plan", "--model", str(model), "--device", "cpu")
    loaded = cli._base_to_verify(str(model), "cpu", "auto").model.dtype
    assert f"{str(loaded).removeprefix('torch.')} on cpu" in plan.out


def test_nothing_at_all_shows_the_help(loramux: Any) -> None:
    outcome = loramux()
    assert outcome.code == 2
    assert "serve" in outcome.out + outcome.err


@pytest.mark.parametrize(
    "arguments",
    [("fly",), ("ask",), ("serve", "m", "--wings", "2"), ("version", "--wings")],
)
def test_wrong_usage_is_exit_code_2(loramux: Any, arguments: tuple[str, ...]) -> None:
    outcome = loramux(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert any(word in outcome.err for word in ("fly", "question", "--wings"))


def test_serve_has_its_own_help(loramux: Any) -> None:
    outcome = loramux("serve", "--help")
    assert outcome.code == 0
    assert "--max-loras" in outcome.out
    assert "usage: loramux serve" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "model: name a directory or hub id"),
        (("m", "--port", "70000"), "port: "),
        (("m", "--lora-modules", "acme"), "lora_modules: 'acme' is not name=path"),
        (("m", "--config", "/no/such/file.toml"), "--config /no/such/file.toml: No such file or directory"),
        (("/no/such/model", "--port", "0"), "/no/such/model does not exist"),
        (("m", "--host", "256.1.1.1", "--port", "0"), "cannot listen on 256.1.1.1:0"),
    ],
)
def test_what_is_wrong_is_one_sentence(loramux: Any, arguments: tuple[str, ...], sentence: str) -> None:
    outcome = loramux("serve", *arguments)
    assert outcome.is_one_sentence(), outcome.err
    assert sentence in outcome.err


def test_a_taken_port_is_said_before_anything_is_loaded(loramux: Any) -> None:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = loramux("serve", "demo", "--port", str(port))
    assert outcome.is_one_sentence(), outcome.err
    assert f"port {port} on 127.0.0.1 is in use; choose another with --port" in outcome.err


def test_a_failing_start_leaves_no_worker_and_no_noise(
    loramux: Any, tiny_model: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no tokenizer, which is known before the worker has loaded: it is not waited for, nor heard of."""
    model = str(tiny_model("llama"))
    outcome = loramux("serve", model, "--port", "0", "--data-dir", str(tmp_path))
    assert outcome.is_one_sentence(), outcome.err
    assert f"cannot read the tokenizer of '{model}'" in outcome.err
    assert not [record for record in caplog.records if record.name == "asyncio"]
    assert not [child for child in children(os.getpid()) if "loramux_server.engine" in child]


# --- ask ---------------------------------------------------------------------------------------------------------------


class Answers(BaseHTTPRequestHandler):
    """A server that answers a model once all three have been asked, and knows no model called 'nobody'."""

    together = threading.Barrier(3)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body["model"] == "nobody":
            return self._answer(404, {"error": {"message": "The model 'nobody' does not exist"}})
        if body["model"] == "proxy":
            return self._answer(502, None)
        self.together.wait(10)
        text = f"{body['model']} says {body['messages'][0]['content']} {body['max_tokens']} {body['temperature']}"
        return self._answer(200, {"choices": [{"message": {"content": text}}]})

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode() if body else b"<html>bad gateway</html>"
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_ask_asks_all_at_once_and_answers_in_order(loramux: Any, url: str) -> None:
    outcome = loramux("ask", "--url", f"{url}/", "--max-tokens", "7", "hi", "c", "a", "b")
    assert outcome.code == 0
    assert outcome.out == "".join(f"[{name}] {name} says hi 7 0.0\n" for name in "cab")


def test_ask_says_what_the_server_says(loramux: Any, url: str) -> None:
    outcome = loramux("ask", "--url", url, "hi", "nobody")
    assert outcome.is_one_sentence(), outcome.err
    assert outcome.err == "loramux: The model 'nobody' does not exist\n"


def test_ask_gets_an_answer_that_is_not_ours(loramux: Any, url: str) -> None:
    outcome = loramux("ask", "--url", url, "hi", "proxy")
    assert outcome.is_one_sentence(), outcome.err
    assert "502" in outcome.err


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "localhost:8000", "ftp://127.0.0.1", "nowhere"])
def test_ask_without_a_server(loramux: Any, address: str) -> None:
    outcome = loramux("ask", "--url", address, "hi", "a")
    assert outcome.is_one_sentence(), outcome.err
    assert address in outcome.err


# --- banner ------------------------------------------------------------------------------------------------------------


def test_banner_has_commands_for_what_is_served(capsys: pytest.CaptureFixture[str]) -> None:
    banner("http://127.0.0.1:8000", "demo", ["acme", "beta", "gamma", "delta"])
    out = capsys.readouterr().out
    assert "loramux serves 'demo' at http://127.0.0.1:8000/v1" in out
    assert "adapters: acme, beta, gamma, delta" in out
    assert f"ask --url http://127.0.0.1:8000 '{QUESTION}' acme beta gamma\n" in out
    body = out.partition("-d '")[2].partition("'\n")[0]
    assert json.loads(body)["model"] == "acme"
    code = out.partition('python -c "')[2].partition('"\n')[0]
    compile(code, "banner", "exec")
    assert "model='delta'" in code


def test_banner_without_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    banner("http://127.0.0.1:8000", "demo", [])
    out = capsys.readouterr().out
    assert "none yet" in out
    assert "curl" not in out
