"""The GPU benchmark at its smallest, on the CPU: it runs, checks its answers, and judges by its goals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtests import BenchError
from loadtests.adapters import RANK
from loadtests.gpu import __main__ as gpu
from loadtests.gpu import measures, parity, roof
from loadtests.gpu.model import geometry, random_base
from loadtests.gpu.parity import Checked
from loadtests.gpu.report import FAST_MEMORY, Figure, Report
from loadtests.parity import Parity
from loramux_server.engine.messages import AdapterRef
from loramux_server.engine.runner import kv_bytes_per_token

TINY = ["--device", "cpu", "--tiny", "--dtype", "float32", "--geometry"]
RIGHT = Checked(Parity(2, 2, 0, 0.0, [], 0.5), contrast=3.0)


def test_the_whole_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main([*TINY, "llama-3-8b", "--json", str(tmp_path)])
    [file] = tmp_path.glob("*-gpu-llama-3-8b-tiny.json")
    written = json.loads(file.read_text())
    assert written["parity"]["violations"] == 0
    assert written["parity"]["contrast"] > written["parity"]["tolerance"]
    names = [figure["name"] for figure in written["figures"]]
    decodes = [
        "decode 1, base",
        "decode 1, 1 adapter",
        "decode 4, base",
        "decode 4, 1 adapter",
        "decode 4, 2 adapters",
    ]
    assert names == [*decodes, "prefill, base", "prefill, 1 adapter", "cold adapter adds", "training step"]
    for figure in written["figures"]:
        assert len(figure["rounds"]) == 2
        assert figure["unit"] == "ms" or figure["low"] > 0
    assert all(value > 0 for value in written["roofs"].values())
    assert written["goals"] == []  # they are of real geometries
    assert "decode 4, 2 adapters" in capsys.readouterr().out


def test_wrong_answers_end_the_call_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed_up(
        driver: Any, prompts: Any, adapters: list[AdapterRef | None], new_tokens: int
    ) -> list[list[int]]:
        others = adapters[1:] + adapters[:1]
        return measures.answers(driver, prompts, others, new_tokens)

    def timed(*_: Any) -> float:
        raise AssertionError("something was timed")

    monkeypatch.setattr(parity, "answers", mixed_up)
    monkeypatch.setattr(roof, "copy_bandwidth", timed)
    with pytest.raises(BenchError, match=r"^mistral-7b: WRONG"):
        gpu.main([*TINY, "mistral-7b"])


def test_a_check_that_could_not_have_noticed_is_not_right() -> None:
    assert RIGHT.right
    blind = replace(RIGHT, contrast=0.4)
    assert not blind.right
    assert blind.verdict.startswith("NOT CHECKED")


def report(copy_rate: float, **values: float) -> Report:
    """`values` by name; a share of the roof as `share_1`."""
    found = Report(
        "gpu-x", torch.device("cuda"), {"tiny": False}, RIGHT, {"copy_bytes_per_second": copy_rate}
    )
    for streams in (1, 8, 32):
        share = {"share_of_memory_roof": values.get(f"share_{streams}", 1.0)}
        found.figures.append(Figure(f"decode {streams}, base", "tok/s", [values.get("base", 100.0)], share))
    for name in (
        "decode 32, 1 adapter",
        "decode 32, 8 adapters",
        "decode 32, 32 adapters",
        "cold adapter adds",
    ):
        found.figures.append(Figure(name, "tok/s", [values.get(name, 50.0)]))
    return found


@pytest.mark.parametrize(
    ("copy_rate", "values", "missed"),
    [
        (3e12, {"decode 32, 8 adapters": 86.0}, []),
        (3e12, {"decode 32, 8 adapters": 84.0}, ["decode 32, 8 adapters"]),
        (3e12, {"decode 32, 8 adapters": 86.0, "decode 32, 32 adapters": 32.0}, ["decode 32, 32 adapters"]),
        (3e12, {"decode 32, 8 adapters": 86.0, "cold adapter adds": 61.0}, ["cold adapter adds"]),
        (3e12, {"decode 32, 8 adapters": 86.0, "share_1": 0.6, "share_8": 0.36}, []),
        (9e11, {"decode 32, 8 adapters": 86.0, "share_1": 0.6, "share_8": 0.36}, ["decode 1,", "decode 8,"]),
    ],
)
def test_goals(copy_rate: float, values: dict[str, float], missed: list[str]) -> None:
    goals = report(copy_rate, **values).goals
    assert len(goals) == 6
    found = [goal.text for goal in goals if not goal.met]
    assert len(found) == len(missed)
    assert all(text.startswith(name) for text, name in zip(sorted(found), sorted(missed), strict=True))
    assert FAST_MEMORY < 3e12


def test_streams_that_do_not_fit_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = gpu.TINY
    base = random_base("llama-2-7b", geometry("llama-2-7b", tiny=True), torch.device("cpu"), torch.float32)
    one = gpu.sequence_tokens(1, sizes, 2) * kv_bytes_per_token(base)
    rows = 2 * 2 * RANK * gpu.rank_row_bytes(base)  # two adapters, and the graphs' copy of them
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int((rows + 1.5 * one) / 0.85), 0))
    found = report(1e12)
    assert gpu.fitting(replace(base, device=torch.device("cuda")), sizes, 2, found) == [1]
    assert found.left_out[0].startswith("4 streams need")
