"""A real server process with the embedded model and the demo adapters, shared by the end-to-end tests of a run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

_START_TIMEOUT_S = 240  # the first start on a machine fetches and converts the embedded model


@dataclass
class Server:
    """A running `loramux serve`."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @cached_property
    def openai(self) -> OpenAI:
        """One client for all requests: a client left to the garbage collector warns about its sockets."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name with labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return {
            name: float(value) for name, _, value in (ln.rpartition(" ") for ln in lines if ln[:1] not in "#")
        }

    def stop(self) -> int:
        """SIGTERM, then the exit code."""
        self.openai.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def start_server(directory: Path, arguments: Sequence[str]) -> Server:
    log = directory / "server.log"
    # Threads that spin at every barrier take the core from whom they wait for when a test computes beside the server.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1" if "PYTEST_XDIST_WORKER" in os.environ else "2",
        "GOMP_SPINCOUNT": "1000",
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("w") as sink:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "loramux_server",
                "serve",
                *arguments,
                "--port",
                "0",
                "--data-dir",
                directory / "data",
            ],
            stdout=sink,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if ready := re.search(r"ready on (http://\S+)", log.read_text()):
            return Server(process, ready[1], log)
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`loramux serve demo` in fp32, where greedy tokens can be compared exactly, and a watched adapter folder."""
    directory = tmp_path_factory.mktemp("server")
    adapters = directory / "adapters"
    adapters.mkdir()
    running = start_server(directory, ["demo", "--dtype", "float32", "--adapter-dir", str(adapters)])
    yield running
    if running.process.poll() is None:
        assert running.stop() == 0
