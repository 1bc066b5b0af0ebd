"""Killed, cancelled and failed exports: what is left, and that resuming ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.errors import ExportError
from loramux_adapters.export import (
    CANCELLED,
    NOT_PROVEN,
    ExportOptions,
    ExportPlan,
    ExportProgress,
    VerifyOptions,
    WeightedAdapter,
    plan_export,
    run_export,
)
from loramux_adapters.export.journal import JOURNAL
from loramux_adapters.export.sources import ServedSource

SHORT = VerifyOptions(prompts=1, tokens=16)
KILLS = int(os.environ.get("SOAK_EXPORT_KILLS", "5"))
SEED = os.environ.get("SOAK_EXPORT_SEED", "11")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def plan(bases: Callable[[str], Path], adapter: Path, tmp_path: Path) -> ExportPlan:
    options = ExportOptions(
        bases("llama"),
        (WeightedAdapter(adapter),),
        tmp_path / "merged",
        shard_bytes=20_000,
        verify=SHORT,
    )
    return plan_export(options)


@pytest.mark.timeout(300 + 40 * KILLS)
def test_killed_at_random_points(bases: Callable[[str], Path], adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(bases("llama"), tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "adapter")
    driver = Path(__file__).with_name("kill_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path), str(KILLS), SEED],
        capture_output=True,
        text=True,
        timeout=280 + 40 * KILLS,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["different"] == []
    assert result["interrupted"] >= KILLS


def test_a_cancelled_export_goes_on_where_it_stopped(plan: ExportPlan, tmp_path: Path) -> None:
    seen: list[ExportProgress] = []
    with pytest.raises(ExportError) as caught:
        run_export(plan, observer=seen.append, cancelled=lambda: len(seen) > 12)
    assert caught.value.code == CANCELLED
    kept = {path.name: path.stat().st_mtime_ns for path in plan.options.partial.glob("*.safetensors")}
    assert 0 < len(kept) < len(plan.shards)

    again: list[ExportProgress] = []
    out = run_export(plan, resume=True, observer=again.append).out
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept, "not written a second time"
    assert again[0].done > seen[0].done
    assert [p.done for p in again if p.phase == "merge"][-1] == plan.total_bytes
    whole = run_export(plan_export(replaced(plan, tmp_path / "whole"))).out
    assert contents(out) == contents(whole)


def replaced(plan: ExportPlan, out: Path) -> ExportOptions:
    from dataclasses import replace

    return replace(plan.options, out=out)


def test_a_damaged_shard_is_written_again(plan: ExportPlan, tmp_path: Path) -> None:
    whole = run_export(plan_export(replaced(plan, tmp_path / "whole"))).out
    seen: list[Any] = []
    with pytest.raises(ExportError):
        run_export(plan, observer=seen.append, cancelled=lambda: len(seen) > 12)
    partial = plan.options.partial
    victim = sorted(partial.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with open(partial / JOURNAL, "ab") as file:
        file.write(b'{"shard": "torn')
    (partial / "model-00002-of-00099.safetensors.tmp").write_bytes(b"half")
    (partial / ".config.json.0f.partial").write_bytes(b"half")
    assert contents(run_export(plan, resume=True).out) == contents(whole)


def test_an_unproven_export_keeps_its_partial_name(plan: ExportPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(ServedSource, "adapt", lambda self, module, x: None)
        with pytest.raises(ExportError, match="is not equal to the served model: KL") as caught:
            run_export(plan)
    assert caught.value.code == NOT_PROVEN
    assert not plan.options.out.exists()
    report = json.loads((plan.options.partial / "merge_report.json").read_text())
    assert report["verification"]["passed"] is False
    assert report["verification"]["serving_noise"]["kl"] > 0
    assert "NOT PROVEN" in (plan.options.partial / "README.md").read_text()
    assert run_export(plan, resume=True).proof is not None, "the shards were good: only the proof is repeated"
