"""The main job with real parts: server process, embedded model, demo adapters, the official OpenAI client."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from loramux_adapters.demo import demo_adapters
from tests.e2e.conftest import Server, start_server

pytestmark = pytest.mark.e2e

QUESTION = [{"role": "user", "content": "How are you today?"}]
NAMES = sorted(demo_adapters())


def ask(server: Server, model: str, count: int = 24) -> str:
    answer = server.openai.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=count, temperature=0
    )
    return answer.choices[0].message.content or ""


def test_models_lists_the_base_and_its_adapters(server: Server) -> None:
    cards = {card.id: card.model_dump() for card in server.openai.models.list()}
    assert set(cards) >= {"demo", *NAMES}
    assert cards["demo"]["parent"] is None
    assert all(cards[name]["parent"] == "demo" for name in NAMES)


def test_three_adapters_and_the_base_in_one_batch_answer_as_alone(server: Server) -> None:
    models = ["demo", *NAMES]
    alone = {model: ask(server, model) for model in models}
    assert len(set(alone.values())) == len(models), alone
    before = server.metrics()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda model: (model, ask(server, model)), models * 2))
    assert together == [(model, alone[model]) for model in models * 2]
    after = server.metrics()
    mixed = 'loramux_batch_adapters_bucket{le="1.0"}'
    total = "loramux_batch_adapters_count"
    assert after[total] - before[total] > after[mixed] - before[mixed], "no step held two adapters"


def test_streaming_gives_the_same_text_and_usage(server: Server) -> None:
    stream = server.openai.chat.completions.create(
        model=NAMES[0],
        messages=QUESTION,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ask(server, NAMES[0])
    usage = chunks[-1].usage
    assert usage is not None
    assert not chunks[-1].choices
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_completions_and_stop_strings(server: Server) -> None:
    plain = server.openai.completions.create(model="demo", prompt="1, 2, 3, 4,", max_tokens=24, temperature=0)
    text = plain.choices[0].text
    stop = text[9:12]  # crosses token boundaries wherever they are
    stopped = server.openai.completions.create(
        model="demo", prompt="1, 2, 3, 4,", max_tokens=24, temperature=0, stop=[stop]
    )
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_unknown_adapter_is_404_and_overflow_is_400(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(server, "no-such-adapter")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as overflow:
        server.openai.completions.create(model="demo", prompt="word " * 9000, max_tokens=5)
    assert overflow.value.code == "context_length_exceeded"


def test_disconnect_frees_the_slot(server: Server) -> None:
    body = {"model": NAMES[0], "prompt": "Once", "max_tokens": 2000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    for _ in range(100):
        if server.metrics()["loramux_num_requests_running"] == 0:
            break
        # The gauge is written by a step; one short request makes sure there is one.
        server.openai.completions.create(model="demo", prompt="a", max_tokens=1)
    generated = server.metrics()[f'loramux_generation_tokens_total{{adapter="{NAMES[0]}"}}']
    time.sleep(0.5)
    assert server.metrics()[f'loramux_generation_tokens_total{{adapter="{NAMES[0]}"}}'] == generated


def test_a_folder_that_appears_is_served_and_a_corrupt_one_harms_nobody(server: Server) -> None:
    folder = Path(server.log.parent) / "adapters"
    before = ask(server, NAMES[0])
    corrupt = folder / "corrupt"
    shutil.copytree(demo_adapters()[NAMES[0]], corrupt)
    weights = corrupt / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    staged = folder.parent / "staged"
    shutil.copytree(demo_adapters()[NAMES[1]], staged)
    staged.rename(folder / "fresh")
    for _ in range(200):
        if "fresh" in {card.id for card in server.openai.models.list()}:
            break
        time.sleep(0.1)
    assert ask(server, "fresh") == ask(server, NAMES[1])
    assert ask(server, NAMES[0]) == before
    assert "corrupt" not in {card.id for card in server.openai.models.list()}
    assert server.metrics()["loramux_adapters_rejected_total"] >= 1
    assert "adapter 'corrupt' is refused" in server.log.read_text()


def test_sigterm_drains(tmp_path: Path) -> None:
    server = start_server(tmp_path, ["demo", "--dtype", "float32"])
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            server.openai.completions.create, model=NAMES[0], prompt="Once upon", max_tokens=60,
            temperature=0, extra_body={"ignore_eos": True},
        )  # fmt: skip
        while server.metrics().get("loramux_num_requests_running", 0) == 0:
            time.sleep(0.02)
        server.process.terminate()
        while "draining" not in server.log.read_text():
            time.sleep(0.02)
        with pytest.raises(openai.InternalServerError) as refused:
            ask(server, "demo")
        assert refused.value.status_code == 503
        assert "retry-after" in refused.value.response.headers
        assert running.result().usage.completion_tokens == 60  # type: ignore[union-attr]
    server.openai.close()
    assert server.process.wait(timeout=60) == 0
    assert "Traceback" not in server.log.read_text()


def test_ask_prints_every_answer(server: Server) -> None:
    command = [sys.executable, "-m", "loramux_server", "ask", "--url", server.url, "--max-tokens", "24"]
    done = subprocess.run(
        [*command, "How are you today?", *NAMES], capture_output=True, text=True, check=True
    )
    for name in NAMES:
        assert f"[{name}] {ask(server, name)}" in done.stdout
    unknown = subprocess.run([*command, "hello", "nobody"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 1
    assert "nobody" in unknown.stderr
    assert "Traceback" not in unknown.stderr


def test_generation_is_named_and_can_be_pinned(server: Server) -> None:
    body = {"model": NAMES[0], "prompt": "Hi", "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    generation = answer.headers["x-adapter-generation"]
    pinned = httpx.post(
        f"{server.url}/v1/completions", json={**body, "model": f"{NAMES[0]}@{generation[:12]}"}, timeout=60
    )
    assert json.loads(pinned.text)["choices"] == json.loads(answer.text)["choices"]
    assert pinned.headers["x-adapter-generation"] == generation
