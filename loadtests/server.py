"""The server under test: a process of our own, or one that already runs.

An own server gets a free port, the benchmark's adapters and an empty data directory, and is stopped at the end. Promises
that whichever answers serves exactly the benchmark's adapters (by generation), because the reference computes with those.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import httpx

from loadtests import BenchError
from loadtests.adapters import BenchAdapter

_READY = re.compile(r"ready on (http://\S+)")
_START_TIMEOUT_S = 300
_STOP_TIMEOUT_S = 40
LORAMUX = Path(sys.executable).with_name("loramux")


class ServerProcess:
    """`loramux serve`, started at once; `wait_ready` gives its address."""

    def __init__(
        self,
        model: str,
        directory: Path,
        *,
        adapters: Sequence[BenchAdapter] = (),
        threads: int,
        arguments: Sequence[str] = (),
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._log = directory / "server.log"
        command = [
            str(LORAMUX), "serve", model,
            "--port", "0",
            "--threads", str(threads),
            "--data-dir", str(directory / "data"),
            "--no-demo-adapters",
            *arguments,
        ]  # fmt: skip
        if adapters:
            command += ["--lora-modules", *(f"{adapter.name}={adapter.path}" for adapter in adapters)]
        self._started = time.perf_counter()
        with self._log.open("w") as sink:
            self._process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_ready(self) -> tuple[str, float]:
        """Its URL, and the seconds from the start of the process until it said that it is ready."""
        while (seconds := time.perf_counter() - self._started) < _START_TIMEOUT_S:
            if found := _READY.search(self._log.read_text(errors="replace")):
                return found[1], seconds
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        raise BenchError(f"the server did not start:\n{self._log.read_text(errors='replace')[-2000:]}")

    def resident_bytes(self) -> int:
        """Of the process and those it started, as Linux counts them."""
        return sum(int(text.split()[1]) for text in self._read("statm")) * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self) -> float:
        """What the process and those it started have used of all cores so far, as Linux counts it."""
        fields = [text.rpartition(")")[2].split() for text in self._read("stat")]  # a name may have spaces
        return sum(int(user) + int(system) for *_, user, system in (one[:13] for one in fields)) / os.sysconf(
            "SC_CLK_TCK"
        )

    def _read(self, name: str) -> list[str]:
        """A file of /proc, of each process."""
        pid = self._process.pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [Path(f"/proc/{one}/{name}").read_text() for one in (pid, *children)]
        except OSError as error:
            raise BenchError(f"what the server uses cannot be read here: {error}") from error

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def base_name(url: str, adapters: Sequence[BenchAdapter]) -> str:
    """The base's name at a running server. Raises BenchError unless it serves `adapters`, byte for byte."""
    try:
        response = httpx.get(f"{url}/v1/models", timeout=10, trust_env=False)
        cards = response.raise_for_status().json()["data"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise BenchError(f"no server answers at {url}/v1/models: {error}") from error
    served = {card["id"]: card.get("generation") for card in cards}
    missing = [adapter.name for adapter in adapters if served.get(adapter.name) != adapter.generation]
    if missing:
        raise BenchError(
            f"{url} does not serve the benchmark's adapter {missing[0]}; write the adapters with "
            "`python -m loadtests.adapters DIRECTORY` and start the server as it prints"
        )
    return next(str(card["id"]) for card in cards if card.get("parent") is None)
