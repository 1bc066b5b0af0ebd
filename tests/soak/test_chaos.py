"""Chaos over a whole server: a minute of it for every run, and as much as is asked for with `make chaos`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Server, start_server
from tests.soak.chaos import Chaos
from tests.soak.front_kills import FrontKills

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CAPACITY = 16
FLAGS = ("demo", "--dtype", "float32", "--max-queued", str(CAPACITY), "--max-num-seqs", "8", "--grace", "60")
FILE_SYSTEM = "384m"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """The data directory on a file system that can be filled; None where none can be mounted."""
    data = tmp_path / "data"
    data.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={FILE_SYSTEM}", "tmpfs", str(data)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    yield data if mounted else None
    if mounted:
        subprocess.run(["umount", str(data)], check=True)


@pytest.fixture
def server(tmp_path: Path, small_disk: Path | None) -> Iterator[Server]:
    running = start_server(tmp_path, FLAGS)
    yield running
    running.openai.close()
    if running.process.poll() is None:
        running.process.kill()
        running.process.wait()


def told(request: pytest.FixtureRequest, what: str, figures: dict[str, object]) -> None:
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n  {what}: {', '.join(f'{name} {value}' for name, value in figures.items())}", flush=True)


def run(
    request: pytest.FixtureRequest,
    chaos: Chaos,
    data: Path | None,
    *,
    kills: int,
    slow_s: float,
    trains: bool,
) -> None:
    told(request, "worker killed", chaos.workers_killed(kills))
    told(request, "twice the load it takes", chaos.overload(CAPACITY))
    told(request, "slow clients", chaos.slow_clients(20, slow_s))
    if data is not None:
        told(request, "disk full", chaos.disk_full(data))
        if trains:
            told(request, "no room for a checkpoint", chaos.checkpoint_without_room(data))
    told(request, "left over", chaos.nothing_left())
    told(request, "SIGTERM under load", chaos.terminated())
    log = chaos.server.log.read_text()
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]


def test_a_minute_of_chaos(request: pytest.FixtureRequest, server: Server, small_disk: Path | None) -> None:
    run(request, Chaos(server, seed=0), small_disk, kills=1, slow_s=0, trains=False)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_chaos_for_long(
    request: pytest.FixtureRequest, soak_seed: int, server: Server, small_disk: Path | None
) -> None:
    kills: int = request.config.getoption("--kills")
    run(request, Chaos(server, soak_seed), small_disk, kills=kills, slow_s=150, trains=True)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_kills_of_the_front(request: pytest.FixtureRequest, soak_seed: int, tmp_path: Path) -> None:
    kills: int = request.config.getoption("--kills")
    trouble = FrontKills(tmp_path, ("demo", "--dtype", "float32"), soak_seed)
    told(request, "front killed", trouble.run(kills))
