"""kill -9 in the middle of uploads: ten times a small front for every run, and for `make soak` often, servers too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loadtests.adapters import read_geometry
from loramux_adapters.errors import StorageError
from loramux_adapters.spec import BaseGeometry
from tests.server.conftest import model_with_tokenizer
from tests.soak import front
from tests.soak.kills import ForkedFront, Front, Killer, WholeServer

__all__ = ["model_with_tokenizer"]  # a fixture

KILLS = 10


def test_ten_kills_of_the_front(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    killer = Killer(ForkedFront(tmp_path / "root"), front.GEOMETRY, tmp_path / "scratch", seed=0)
    killer.run(KILLS)
    assert len(killer.ledger.acknowledged) >= KILLS
    assert killer.ledger.cut > KILLS / 2, "the uploads were over before the end came"


@pytest.mark.parametrize(
    ("damage", "sign"),
    [
        ("*.sqlite3*", "acknowledged and is gone"),
        ("generations/??/*/adapter_config.json", "was set aside"),
    ],
)
def test_a_loss_is_noticed(damage: str, sign: str, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    killer = Killer(ForkedFront(tmp_path / "root"), front.GEOMETRY, tmp_path / "scratch", seed=0)
    killer.run(1)
    for path in (tmp_path / "root").glob(f"data/bases/*/{damage}"):
        path.unlink()
    with pytest.raises((AssertionError, StorageError), match=sign):
        killer.run(0)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_many_kills_of_the_front(
    request: pytest.FixtureRequest, soak_seed: int, shard: int, tmp_path: Path
) -> None:
    _kill(request, ForkedFront(tmp_path / "root"), front.GEOMETRY, "--kills", soak_seed, shard)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_many_kills_of_the_whole_server(
    request: pytest.FixtureRequest, soak_seed: int, shard: int, model_with_tokenizer: Path, tmp_path: Path
) -> None:
    """Of a tiny base: what is killed is the same, and up again sooner."""
    server = WholeServer(tmp_path / "root", model_with_tokenizer)
    _kill(request, server, read_geometry(model_with_tokenizer), "--server-kills", soak_seed, shard)


def _kill(
    request: pytest.FixtureRequest, victim: Front, geometry: BaseGeometry, option: str, seed: int, shard: int
) -> None:
    """This shard's part of as many kills as `option` says."""
    shards: int = request.config.getoption("--shards")
    kills, seed = request.config.getoption(option) // shards, seed * shards + shard
    victim.root.mkdir()
    killer = Killer(victim, geometry, victim.root.with_name("scratch"), seed)
    title = f"{type(victim).__name__} {shard}"

    def said(number: int) -> None:
        if number % 10 == 0:
            ledger = killer.ledger
            _say(f"  {title}: {number} kills, {len(ledger.acknowledged)} acknowledged, {ledger.cut} cut")

    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        _say(f"\n{title}: {kills} kills, seed {seed}")
        killer.run(kills, said)
    assert killer.ledger.cut > kills / 2


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # the output of a process of pytest-xdist is lost
