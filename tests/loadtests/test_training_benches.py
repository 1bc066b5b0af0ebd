"""The benchmarks of training at their smallest: they run, and their curves and answers are the peers'."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loadtests import bench, quality_bench, train_bench
from loadtests.adapters import model_directory
from loadtests.quality_bench import METHODS, Score, Trained
from tests.adapters.training.support import byte_tokenizer


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """One with a tokenizer."""
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.filterwarnings("ignore")  # of the peer's libraries, about each other
def test_the_loss_curve_beside_hugging_face_and_peft(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = train_bench.Case(str(model), tokens=64, steps=3, threads=torch.get_num_threads())
    runs = {name: contestant(case) for name, contestant in train_bench.CONTESTANTS.items()}
    found = train_bench.compared(case, runs)
    assert found["parity"], found
    assert found["tok/s"] > 0
    assert runs[train_bench.OURS].losses[0] != runs[train_bench.OURS].losses[-1]
    train_bench.show([found])
    assert "loss curve as the peer's" in capsys.readouterr().out


@pytest.mark.e2e
def test_a_qlora_learns_a_task_as_well_as_a_lora(capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model on a few rows of a shipped data set."""
    directory = str(model_directory("demo"))
    runs = {
        method: quality_bench.train(
            quality_bench.Case(
                directory, "sentiment", method, epochs=1, rows=30, threads=torch.get_num_threads()
            )
        )
        for method in METHODS
    }
    for run in runs.values():
        assert (run.rows, run.held_out) == (24, 6)
        assert run.adapter.loss < 0.5 * run.base.loss
        assert run.adapter.token_accuracy > run.base.token_accuracy
    # So few rows say little about a ratio of small losses, which the benchmark holds to 1 %.
    lora, qlora = (runs[method].adapter.loss for method in METHODS)
    assert abs(qlora - lora) < 0.1 * min(run.base.loss for run in runs.values())
    quality_bench.show({"sentiment": runs})
    assert "sentiment: QLoRA's loss is" in capsys.readouterr().out


def test_the_goal_of_quality_is_over_all_tasks() -> None:
    def run(loss: float) -> Trained:
        return Trained(Score(3.0, 0.1, 0.0), Score(loss, 0.9, 0.5), 80, 20, 10)

    def tasks(one: float, other: float) -> dict[str, dict[quality_bench.Method, Trained]]:
        return {"a": {"LoRA": run(1.0), "QLoRA": run(one)}, "b": {"LoRA": run(1.0), "QLoRA": run(other)}}

    assert quality_bench.compared(tasks(1.03, 0.98))["met"]
    assert not quality_bench.compared(tasks(1.03, 1.0))["met"]


@pytest.mark.e2e
@pytest.mark.soak
def test_smallest_scenario_of_a_job_beside_streams(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    sizes = [
        "--streams",
        "2",
        "--new-tokens",
        "16",
        "--prompt-tokens",
        "8",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    assert bench.main(["training-beside", "--model", str(model), *sizes, "--json", str(file)]) == 0
    figures = {figure["name"]: figure for figure in json.loads(file.read_text())["figures"]}
    assert all(figure["median"] > 0 for figure in figures.values())
    for budget in ("default budget", "budget 100 ms"):
        beside = figures[f"{budget}: p99 gap beside"]
        assert beside["note"] == "2 of 2 answers are those without the job"
        assert (beside["parity"]["violations"], beside["parity"]["unreadable"]) == (0, 0)
