"""A fine-tuning job that goes on for as long as a benchmark needs it: paused, resumed, and its pace read off its events."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from loadtests import BenchError
from loramux_adapters.errors import LoramuxError
from loramux_server.jobs_client import JobsClient

_ROWS, _ROW_WORDS, _BATCH = 64, 60, 2
_STEPS = 4  # that a pace is read off
_LONGEST_PACE_S = 90.0  # if they take longer, it is read off those that there are
_LONGEST_S = 600.0

T = TypeVar("T")


@dataclass(frozen=True)
class Pace:
    """Of training: tokens a second, and the share of the time in which it computed; 0 if no step began and ended."""

    rate: float
    share: float


class Job:
    """One under training, and when its steps were done, as the stream of its events says it."""

    def __init__(self, client: JobsClient, job_id: str) -> None:
        self.id = job_id
        self._client = client
        self._steps: list[tuple[float, int, float]] = []  # when, its tokens, seconds it computed
        self._stops = 0
        self._ended = ""
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self.wait_for(1)

    def _watch(self) -> None:
        try:
            for event in self._client.events(self.id):
                data = event["data"]
                if event["type"] == "metrics" and "tokens" in data:
                    self._steps.append((time.perf_counter(), data["tokens"], data["seconds"]))
                self._stops += event["message"].startswith("Stopped after step")
        except LoramuxError as error:
            self._ended = error.message
        self._ended = self._ended or str(self._client.show(self.id)["error"] or "it ended")

    def wait_for(self, steps: int) -> None:
        """Until so many more are done."""
        wanted = len(self._steps) + steps
        self._until(lambda: len(self._steps) >= wanted, f"takes no {steps} steps")

    def paused(self, work: Callable[[], T]) -> T:
        stops = self._stops
        self._client.change(self.id, "pause")
        self._until(lambda: self._stops > stops, "does not pause")
        try:
            return work()
        finally:
            self._client.change(self.id, "resume")
            self.wait_for(1)

    def pace(self, ask: Callable[[], object]) -> Pace:
        """While `ask` is called over and over, from the end of a step to the end of a later one; or, if that takes too
        long, until then."""
        stop = threading.Event()
        failures: list[BenchError] = []

        def go_on() -> None:
            try:
                while not stop.is_set():
                    ask()
            except BenchError as error:
                failures.append(error)

        asking = threading.Thread(target=go_on)
        asking.start()
        try:
            began, first = time.perf_counter(), len(self._steps)
            # The first may have begun before.
            while len(self._steps) <= first + _STEPS and time.perf_counter() - began < _LONGEST_PACE_S:
                self._check()
                time.sleep(0.02)
            steps, ended = self._steps[first : first + _STEPS + 1], time.perf_counter()
        finally:
            stop.set()
            asking.join()
        if failures:
            raise failures[0]
        if len(steps) < 2:
            return Pace(0.0, 0.0)
        wall = (steps[-1][0] if len(steps) > _STEPS else ended) - steps[0][0]
        tokens, computed = (sum(step[part] for step in steps[1:]) for part in (1, 2))
        return Pace(tokens / wall, computed / wall)

    def cancel(self) -> None:
        self._client.change(self.id, "cancel")
        self._watcher.join()

    def _check(self) -> None:
        if self._ended:
            raise BenchError(f"the fine-tuning job ended: {self._ended}")

    def _until(self, done: Callable[[], bool], failing: str) -> None:
        began = time.monotonic()
        while not done():
            self._check()
            if time.monotonic() - began > _LONGEST_S:
                raise BenchError(f"the fine-tuning job {failing} in {_LONGEST_S:g} seconds")
            time.sleep(0.02)


@contextmanager
def endless_job(url: str, base: str, directory: Path) -> Iterator[Job]:
    """It goes on for as long as it is needed."""
    path = directory / "training-beside.jsonl"
    words = itertools.cycle(
        ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away"]
    )
    rows = [{"text": " ".join(itertools.islice(words, _ROW_WORDS))} for _ in range(_ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    client = JobsClient(url)
    fields = {"n_epochs": 50, "batch_size": _BATCH, "save_steps": 1_000_000, "learning_rate": 1e-5}
    created = client.create(
        {
            "model": base,
            "training_file": client.upload(path)["id"],
            "method": {"type": "supervised", "supervised": {"hyperparameters": fields}},
        }
    )
    job = Job(client, created["id"])
    try:
        yield job
    finally:
        job.cancel()
