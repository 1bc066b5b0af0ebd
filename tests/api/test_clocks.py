"""The date may jump: what is timed is timed with a clock that does not."""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.adapters.conftest import adapter_files, make_lora_weights, tiny_geometry
from tests.api.catalog_support import CatalogStand, Files, make_files, roots, stand

__all__ = ["adapter_files", "make_files", "make_lora_weights", "roots", "stand", "tiny_geometry"]  # fixtures

ROOT = Path(__file__).parents[2]
# Who compares dates, and why it must: dates of files, or of others.
ALLOWED = {
    "loramux_adapters/store.py": "the age of a generation is its directory's date; what is in use is held by a claim",
    "loramux_server/base/nf4_cache.py": "the age of what another process left is its file's date",
    "loramux_server/keys/limits.py": "the library of rate limits names the end of a window as a date",
}


def comparisons_of_dates() -> Iterator[str]:
    for package in (ROOT / "adapters", ROOT / "server"):
        for path in sorted(package.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                parts: list[ast.expr] = []
                if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
                    parts = [node.left, node.right]
                elif isinstance(node, ast.Compare):
                    parts = [node.left, *node.comparators]
                if any(ast.unparse(part) == "time.time()" for part in parts):
                    yield str(path.relative_to(package))


def test_durations_are_not_differences_of_dates() -> None:
    assert set(comparisons_of_dates()) <= set(ALLOWED)
    assert "loramux_adapters/store.py" in set(comparisons_of_dates()), "this test looks for nothing"


async def test_a_clock_that_jumps_by_days_loses_nothing(
    stand: CatalogStand, make_files: Callable[[int], Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, jumps = time.time, Random(0)
    monkeypatch.setattr(time, "time", lambda: real() + jumps.uniform(-5e5, 5e5))
    generations = {}
    for number in range(6):
        answer = await stand.upload(f"adapter-{number}", make_files(number))
        assert answer.status_code == 201, answer.text
        generations[f"adapter-{number}"] = answer.json()["generation"]
        stand.catalog.sweep()
    cards = (await stand.client.get("/v1/adapters")).json()["data"]
    assert {card["id"]: card["generation"] for card in cards} == generations
    body = {"model": "adapter-3", "prompt": "x", "max_tokens": 2}
    assert (await stand.client.post("/v1/completions", json=body)).status_code == 200
