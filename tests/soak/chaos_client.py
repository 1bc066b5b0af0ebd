"""A client of the server under chaos: what it asks, uploads and waits for, and how a stream ended.

Greedy answers are compared with those that the server gave in peace, so it has to compute in fp32.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random

import httpx

from loramux_adapters.adapter_files import ADAPTER_FILES
from loramux_adapters.demo import demo_adapters

PATIENCE_S = 180.0  # without a byte: what takes longer is a client that hangs
PROMPTS = ("Once upon a time", "The capital of France is", "1, 2, 3, 4,")
TOKENS = 24


@dataclass(frozen=True)
class Ended:
    """How a stream ended: `finished`, `error` (told in an event), `refused` (another status), `cut` or `hung`."""

    how: str
    text: str
    accepted: bool
    detail: str = ""


@dataclass
class Tally:
    """What many streams came to."""

    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, end: Ended, expected: str, *, cut_is_wrong: bool = True) -> None:
        self.ends[end.how] += 1
        if end.how == "finished" and end.text != expected:
            self.faults.append(f"{end.text!r} is not {expected!r}")
        if end.how == "hung" or (end.how == "cut" and cut_is_wrong):
            self.faults.append(f"a stream {end.how} after {end.text!r}: {end.detail}")

    def check(self) -> None:
        assert not self.faults, self.faults[:3]


class ChaosClient:
    """Asks one server, which is at peace while this is made."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.random = Random(seed)
        models = ["demo", *sorted(demo_adapters())]
        self.questions = list(itertools.product(models, PROMPTS))
        self.expected = {question: self.ask(*question) for question in self.questions}
        assert len(set(self.expected.values())) > len(models), "the adapters answer alike"

    def stream(
        self,
        model: str,
        prompt: str,
        *,
        client: httpx.Client | None = None,
    ) -> Ended:
        body = _body(model, prompt) | {"stream": True}
        text, accepted, finished = "", False, False
        with ExitStack() as stack:
            http = client or stack.enter_context(httpx.Client(timeout=PATIENCE_S))
            try:
                with http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                    if answer.status_code != 200:
                        answer.read()
                        return Ended("refused", "", False, str(answer.status_code))
                    for line in answer.iter_lines():
                        said = line.removeprefix("data: ")
                        if not said or said == "[DONE]":
                            continue
                        accepted = True
                        event = json.loads(said)
                        if "error" in event:
                            return Ended("error", text, True, event["error"]["message"])
                        text += event["choices"][0]["text"]
                        finished = finished or event["choices"][0]["finish_reason"] is not None
            except httpx.TimeoutException as error:
                return Ended("hung", text, accepted, repr(error))
            except httpx.TransportError as error:
                return Ended("cut", text, accepted, repr(error))
        if finished:
            return Ended("finished", text, True)
        return Ended("cut", text, accepted, "the stream ended without a finish or an error")

    def ask(self, model: str, prompt: str) -> str:
        answer = httpx.post(f"{self.url}/v1/completions", json=_body(model, prompt), timeout=PATIENCE_S)
        text: str = answer.raise_for_status().json()["choices"][0]["text"]
        return text

    def upload(self, name: str, status: int) -> None:
        source = demo_adapters()["pirate"]
        files = [(file, (file, (source / file).read_bytes())) for file in ADAPTER_FILES]
        answer = httpx.post(f"{self.url}/v1/adapters", data={"name": name}, files=files, timeout=120)
        assert answer.status_code == status, answer.text[:500]

    def upload_rows(self, rows: list[dict[str, str]]) -> httpx.Response:
        parts = {"file": ("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())}
        url = f"{self.url}/v1/files"
        return httpx.post(url, data={"purpose": "fine-tune"}, files=parts, timeout=60)

    def create_job(self, file: str) -> str:
        """Of two steps, with a checkpoint after each."""
        chosen = {"n_epochs": 1, "max_steps": 2, "save_steps": 1, "batch_size": 2, "r": 4}
        method = {"type": "supervised", "supervised": {"hyperparameters": chosen}}
        body = {"model": "demo", "training_file": file, "method": method}
        answer = httpx.post(f"{self.url}/v1/fine_tuning/jobs", json=body, timeout=60)
        job: str = answer.raise_for_status().json()["id"]
        return job

    def until_job(self, job: str, status: str) -> None:
        def reached() -> bool:
            answer = httpx.get(f"{self.url}/v1/fine_tuning/jobs/{job}", timeout=60).raise_for_status()
            shown = answer.json()
            assert shown["status"] != "failed", shown
            return bool(shown["status"] == status)

        until(reached, f"the job is not {status}", 2 * PATIENCE_S)

    def answers(self) -> None:
        question = self.random.choice(self.questions)
        answer = self.stream(*question)
        assert (answer.how, answer.text) == ("finished", self.expected[question])

    def counted(self, tally: Tally, number: int, client: httpx.Client | None = None) -> str:
        """One stream and how it ended."""
        question = self.questions[number % len(self.questions)]
        end = self.stream(*question, client=client)
        assert end.how != "refused" or end.detail in ("429", "503"), end
        tally.add(end, self.expected[question])
        return end.how


def until(condition: Callable[[], bool], complaint: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.1)


def status_of(url: str) -> int:
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.TransportError:
        return 0


def _body(model: str, prompt: str) -> dict[str, object]:
    return {
        "model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
