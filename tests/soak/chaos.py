"""What happens to a real server, and what must be true of it meanwhile: every request ends, answers that finish are right.

Each method is one kind of trouble over the same running server; it raises AssertionError for what may not happen and returns
figures to be printed.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import httpx
import psutil

from tests.e2e.conftest import Server
from tests.soak.chaos_client import PATIENCE_S, ChaosClient, Tally, status_of, until

RESTART_S = 120.0
ROOM_WITHOUT_CHECKPOINT = 512 * 1024  # a job's rows and events find room, its checkpoint does not


class Chaos:
    """One running server. Methods may be called in any order; `terminated` is the last."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self._client = ChaosClient(server.url, seed)
        self._names = itertools.count()

    # --- the troubles ----------------------------------------------------------------------------------------------

    def workers_killed(self, kills: int, streams: int = 16) -> dict[str, object]:
        """kill -9 of the worker every few seconds under `streams` clients that ask again and again."""
        tally, enough = Tally(), threading.Event()
        began = time.monotonic()
        with ThreadPoolExecutor(streams) as pool:
            asking = [pool.submit(self._keep_asking, tally, enough, number) for number in range(streams)]
            try:
                for _ in range(kills):
                    self.until_ready()
                    time.sleep(self._client.random.uniform(0.5, 3.0))
                    os.kill(self.worker_pid(), signal.SIGKILL)
                    # A process with much memory takes a while to go, and until then the front is ready.
                    until(lambda: status_of(f"{self.server.url}/ready") != 200, "nobody noticed", 30)
                self.until_ready()
                deadline = time.monotonic() + PATIENCE_S
                while not tally.ends["finished"] and time.monotonic() < deadline:
                    time.sleep(0.2)
            finally:
                enough.set()
            for one in asking:
                one.result()
        tally.check()
        assert tally.ends["finished"], "nothing was answered between the kills"
        assert tally.ends["error"] + tally.ends["refused"], "nobody noticed the kills"
        return {"kills": kills, "seconds": round(time.monotonic() - began), **tally.ends}

    def overload(self, capacity: int) -> dict[str, object]:
        """Twice as many requests as the server takes: those it took finish, the others are told at once.

        First all in the same instant, then half of them spread over the answers to the other half: what is timed is how
        long a full server takes to say so, which in an instant would be how long the clients here take to ask.
        """
        front = psutil.Process(self.server.process.pid)
        before = front.memory_info().rss
        tally = Tally()
        together = threading.Barrier(2 * capacity)

        def one(number: int) -> None:
            with httpx.Client(timeout=PATIENCE_S) as client:
                together.wait()
                self._client.counted(tally, number, client)

        with ThreadPoolExecutor(2 * capacity) as pool:
            for task in [pool.submit(one, number) for number in range(2 * capacity)]:
                task.result()
            assert tally.ends["finished"] >= capacity, tally.ends
            asking = [pool.submit(self._client.counted, tally, number) for number in range(capacity)]
            until(lambda: self._accepted() >= capacity, "not all streams were accepted", 30)
            refused = []
            with httpx.Client(timeout=PATIENCE_S) as client:
                for number in range(capacity):
                    began = time.monotonic()
                    if self._client.counted(tally, number, client) == "refused":
                        refused.append(1000 * (time.monotonic() - began))
            for counted in asking:
                counted.result()
        tally.check()
        assert refused, "the server was never full"
        assert tally.ends["finished"] + tally.ends["refused"] == 4 * capacity, tally.ends
        grown = (front.memory_info().rss - before) / 2**20
        assert grown < 64, f"the front grew by {grown:.0f} MiB"
        told = f"{statistics.median(refused):.0f}, {max(refused):.0f}"
        return {**tally.ends, "refused after ms (median, most)": told, "front grew by MiB": round(grown, 1)}

    def slow_clients(self, each: int, wait_s: float) -> dict[str, object]:
        """Half a header, half a body, half a connection: others are answered; in `wait_s` the server has let them go."""
        descriptors = self._descriptors()
        address = urlsplit(self.server.url)
        question = self._client.questions[0]
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        halves = [head, head + b"content-length: 1000\r\n\r\n{", head + b"content-length: 2\r\n\r\n{}"]
        with ExitStack() as held:
            connections = []
            for number in range(each * len(halves)):
                connection = socket.create_connection((address.hostname or "", address.port or 0), timeout=10)
                connections.append(held.enter_context(connection))
                connection.sendall(halves[number % len(halves)])
                if number % len(halves) == 2:
                    connection.shutdown(socket.SHUT_WR)
            began = time.monotonic()
            answer = self._client.stream(*question)
            assert (answer.how, answer.text) == ("finished", self._client.expected[question])
            seconds = time.monotonic() - began
            deadline = time.monotonic() + wait_s
            while wait_s and self._descriptors() > descriptors + 4:
                assert time.monotonic() < deadline, "slow clients still hold their connections"
                time.sleep(1)
        until(lambda: self._descriptors() <= descriptors + 4, "descriptors leak", 30)
        return {"connections": each * len(halves), "others answered after s": round(seconds, 2)}

    def disk_full(self, data: Path) -> dict[str, object]:
        """Uploads and exports are refused with 507 while there is no room; requests go on; then all is well again."""
        self._client.upload(f"room-{next(self._names)}", 201)
        with _filled(data):
            self._client.upload(f"no-room-{next(self._names)}", 507)
            full = self._client.upload_rows([{"prompt": "x" * 60_000, "completion": "y"}])
            assert full.status_code == 507, full.text
            export = httpx.post(f"{self.server.url}/v1/adapters/pirate/exports", json={}, timeout=60)
            assert export.status_code == 507, export.text
            self._client.answers()
        self._client.upload(f"room-{next(self._names)}", 201)
        return {"upload, file, export": 507, "requests meanwhile": "answered"}

    def checkpoint_without_room(self, data: Path) -> dict[str, object]:
        """A job that cannot write its checkpoint is paused and says why; requests go on; resumed, it comes to its end."""
        file = self._client.upload_rows([{"prompt": "one, two,", "completion": " three"}] * 4)
        with _filled(data, room=ROOM_WITHOUT_CHECKPOINT):
            job = self._client.create_job(file.raise_for_status().json()["id"])
            self._client.until_job(job, "paused")
            last = httpx.get(f"{self.server.url}/v1/fine_tuning/jobs/{job}/events").json()["data"][0]
            assert "the job is paused, resume it" in last["message"], last
            self._client.answers()
        httpx.post(f"{self.server.url}/v1/fine_tuning/jobs/{job}/resume", timeout=60).raise_for_status()
        self._client.until_job(job, "succeeded")
        return {"job": "paused", "requests meanwhile": "answered", "job with room": "succeeded"}

    def nothing_left(self) -> dict[str, object]:
        """Once nobody asks: no sequence, no block, no slot is held."""
        self._client.ask(*self._client.questions[0])
        left = {}
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
            "http_requests_in_flight",
        ):
            left[name] = self.server.metrics()[f"loramux_{name}"]
        left["http_requests_in_flight"] -= 1  # the scrape itself
        assert not any(left.values()), left
        return {**left, "descriptors": self._descriptors()}

    def terminated(self, streams: int = 12) -> dict[str, object]:
        """SIGTERM under load: what was accepted is answered in full, the rest refused; exit code 0."""
        tally = Tally()
        with ThreadPoolExecutor(streams) as pool:
            tasks = []
            for number in range(streams):
                question = self._client.questions[number % len(self._client.questions)]
                tasks.append((question, pool.submit(self._client.stream, *question)))
            until(lambda: self._accepted() >= streams, "not all streams were accepted", 30)
            self.server.process.send_signal(signal.SIGTERM)
            until(lambda: status_of(f"{self.server.url}/ready") != 200, "SIGTERM changed nothing", 30)
            late = self._client.stream(*self._client.questions[0])
            assert late.how == "refused" or not late.accepted, late
            for question, task in tasks:
                tally.add(task.result(), self._client.expected[question])
        tally.check()
        assert tally.ends == {"finished": streams}, tally.ends
        code = self.server.process.wait(timeout=120)
        assert code == 0, code
        return {"accepted": streams, **tally.ends, "exit code": code}

    # --- below -----------------------------------------------------------------------------------------------------

    def until_ready(self) -> None:
        until(lambda: status_of(f"{self.server.url}/ready") == 200, "the worker did not come back", RESTART_S)

    def worker_pid(self) -> int:
        children = psutil.Process(self.server.process.pid).children()
        [worker] = [child for child in children if "loramux_server.engine" in child.cmdline()]
        return worker.pid

    def _keep_asking(self, tally: Tally, enough: threading.Event, number: int) -> None:
        questions = Random(number)
        with httpx.Client(timeout=PATIENCE_S) as client:
            while not enough.is_set():
                question = questions.choice(self._client.questions)
                end = self._client.stream(*question, client=client)
                tally.add(end, self._client.expected[question])
                if end.how == "refused":
                    enough.wait(0.3)

    def _accepted(self) -> float:
        """Requests that the engine has, as of its latest step."""
        metrics = self.server.metrics()
        return metrics["loramux_num_requests_running"] + metrics["loramux_num_requests_waiting"]

    def _descriptors(self) -> int:
        return psutil.Process(self.server.process.pid).num_fds()


@contextmanager
def _filled(directory: Path, room: int = 0) -> Iterator[None]:
    """No byte of its file system is free, but for `room`."""
    filler = directory / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            for size in (2**20, 4096, 1):
                while True:
                    try:
                        file.write(b"\0" * size)
                    except OSError:
                        break
            file.truncate(max(0, file.tell() - room))
            yield
        finally:
            filler.unlink()
