"""Exports of the embedded model: as a job of the running server, and by hand to be served again as a base."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loramux_adapters.demo import demo_adapters
from tests.e2e.conftest import Server, start_server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

PROMPTS = (
    "What is the capital of France?",
    "How do I boil an egg?",
    "My train is late again.",
    "Write one sentence about rain.",
)
TOKENS = 16
NEAR_TIE = 0.1  # nats between the best two tokens


def ended(url: str) -> dict[str, Any]:
    deadline = time.monotonic() + 900
    while (job := httpx.get(url, timeout=60).json())["status"] in ("queued", "running"):
        assert time.monotonic() < deadline, job
        time.sleep(0.5)
    return job


def test_a_job_of_the_running_server(server: Server, tmp_path: Path) -> None:
    """fp32, because this server computes in fp32 and a bf16 checkpoint could not be proven equal to that."""
    every = f"{server.url}/v1/adapters/pirate/exports"
    body = {"format": "fp32", "verify": 2, "verify_tokens": 64, "shard_size": "200MB"}
    job = httpx.post(every, json=body, timeout=60).raise_for_status().json()
    url = f"{every}/{job['id']}"
    fractions, messages = [], []
    with httpx.stream("GET", f"{url}/events", params={"stream": True}, timeout=900) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    for said in map(json.loads, lines):
        if said["object"] == "adapter.export.progress":
            fractions.append(said["fraction"])
        else:
            messages.append(said["message"])
    assert messages[0] == "created"
    assert messages[-1] == "succeeded"
    assert fractions[-1] == 1.0
    assert len({fraction for fraction in fractions if 0 < fraction < 1}) >= 2, "progress is told"
    report = httpx.get(url).json()["report"]
    assert report["verification"]["export"]["kl"] < 1e-8
    assert report["base"]["name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert report["adapters"][0]["generation"] == job["adapters"][0]["generation"]

    with httpx.stream("GET", f"{url}/download", timeout=300) as download:
        with open(tmp_path / "merged.tar", "wb") as file:
            for piece in download.iter_bytes():
                file.write(piece)
        assert int(download.headers["content-length"]) == (tmp_path / "merged.tar").stat().st_size
    with tarfile.open(tmp_path / "merged.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    assert len(report["shards"]) > 1
    for name, shard in report["shards"].items():
        data = (tmp_path / "pirate-fp32" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]

    second = httpx.post(every, json=body, timeout=60).json()
    assert httpx.post(f"{every}/{second['id']}/cancel", timeout=60).json()["status"] == "cancelled"
    for one in (job, second):
        assert httpx.delete(f"{every}/{one['id']}", timeout=60).status_code == 200
    assert httpx.get(every).json()["data"] == []
    assert "Traceback" not in server.log.read_text()


@dataclass
class Greedy:
    """A greedy answer, token by token, with the gap in nats between the best two tokens at each place."""

    tokens: list[str]
    gaps: list[float]

    @classmethod
    def of(cls, server: Server, model: str, prompt: str) -> Greedy:
        answer = server.openai.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=TOKENS,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content
        gaps = [place.top_logprobs[0].logprob - place.top_logprobs[1].logprob for place in logprobs.content]
        return cls([place.token for place in logprobs.content], gaps)

    def difference(self, other: Greedy) -> tuple[int, float] | None:
        """The first place where another token was taken, and how near the two best were here."""
        for place, (mine, theirs) in enumerate(zip(self.tokens, other.tokens, strict=False)):
            if mine != theirs:
                return place, self.gaps[place]
        return None


def test_an_export_served_as_a_base_answers_as_the_adapter_did(server: Server, tmp_path: Path) -> None:
    """bf16 weights differ from the served ones by one rounding, so a tie may fall the other way, and nothing else."""
    arguments = [
        "--model",
        "demo",
        "--adapter",
        str(demo_adapters()["pirate"]),
        "--out",
        str(tmp_path / "merged"),
    ]
    command = [sys.executable, "-m", "loramux_server", "export", *arguments, "--verify", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["report"]["verification"]["passed"] is True

    plain = ["--quantization", "none", "--dtype", "float32", "--served-model-name", "merged"]
    exported = start_server(tmp_path, [str(tmp_path / "merged"), *plain])
    try:
        differences = []
        base = Greedy.of(server, "demo", PROMPTS[0])
        assert base.difference(Greedy.of(server, "pirate", PROMPTS[0])), "the adapter must matter"
        for prompt in PROMPTS:
            served = Greedy.of(server, "pirate", prompt)
            found = served.difference(Greedy.of(exported, "merged", prompt))
            if found is not None:
                differences.append((prompt, *found))
    finally:
        assert exported.stop() == 0
    print(f"{len(PROMPTS) - len(differences)} of {len(PROMPTS)} answers are equal; near ties: {differences}")  # noqa: T201
    assert all(gap < NEAR_TIE for *_, gap in differences), differences
    assert len(differences) <= len(PROMPTS) // 2
