"""`loramux train`: flags, words, and a process killed at the worst moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from loramux_adapters.cli_train import register
from loramux_adapters.cli_train_output import Display
from loramux_adapters.cli_verify import VerifyBase
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.verify import verify_adapter
from loramux_adapters.weights import WEIGHTS_FILE, LoraWeights
from loramux_server.base.loading import ResidentBase
from tests.adapters.training.support import byte_tokenizer, chat, load_tiny, write_jsonl


@pytest.fixture(scope="module")
def base(tiny_model: Callable[[str], Path]) -> ResidentBase:
    return load_tiny(tiny_model("llama"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", [chat(f"say {i}", "yes" * (1 + i % 3)) for i in range(12)])


def train(base: ResidentBase, *arguments: str, tokenizer: Any = True) -> Result:
    app = typer.Typer()
    made = byte_tokenizer() if tokenizer else None
    register(app, lambda *_: VerifyBase(base.model, base.geometry, made))
    app.command("other")(lambda: None)  # one command alone would lose its name
    return CliRunner().invoke(app, ["train", "--model", "tiny", *arguments], env={"COLUMNS": "200"})


def test_every_field_of_a_recipe_is_a_flag(base: ResidentBase) -> None:
    shown = train(base, "--help").stdout
    for name, field in Recipe.model_fields.items():
        assert f"--{name.replace('_', '-')} " in shown
        assert str(field.description) in shown


def test_what_is_trained_passes_verification(base: ResidentBase, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = train(
        base, "--data", str(data), "--out", str(out), "--validation", str(data), "--max-steps", "3", "--r", "4",
        "--target-modules", "q_proj, up_proj", "--learning-rate", "1e-2", "--packing", "--max-seq-length", "128", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["recipe"]["target_modules"] == ["q_proj", "up_proj"]
    assert told["recipe"]["packing"] is True
    assert told["recipe"]["learning_rate"] == 1e-2
    for words in ("tokens are trained on", "auto      n_epochs", "validation loss", "step 3/3 loss"):
        assert words in result.stderr
    weights = LoraWeights.read(out, base.geometry)
    assert weights.generation == told["generation"]
    assert verify_adapter(base.model, base.geometry, weights, prompts=2, tokens=16).verdict == "ok"


def test_a_dry_run_writes_nothing(base: ResidentBase, data: Path, tmp_path: Path) -> None:
    result = train(base, "--data", str(data), "--out", str(tmp_path / "out"), "--dry-run", "--json")
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    assert plan["data"]["rows"] == 12
    assert plan["recipe"]["total_steps"] == 48
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "param", "words"),
    [
        (["--lora-dropout", "1.5"], "lora_dropout", "lora_dropout should be less than 1"),
        (["--target-modules", "w9"], "target_modules", "no linear"),
        (["--optimizer", "adamw_8bit"], "optimizer", "needs a CUDA device"),
        (["--init-from", "/nowhere"], "init_from", "is not an adapter directory"),
        (["--max-seq-length", "4096"], "max_seq_length", "context of 512"),
        (["--validation", "/nowhere"], "validation", "cannot be read"),
    ],
)
def test_refusals_name_the_flag(
    arguments: list[str], param: str, words: str, base: ResidentBase, data: Path, tmp_path: Path
) -> None:
    result = train(base, "--data", str(data), "--out", str(tmp_path / "out"), *arguments, "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["param"] == param
    assert words in error["message"]
    spoken = train(base, "--data", str(data), "--out", str(tmp_path / "out"), *arguments)
    assert spoken.exit_code == 1
    assert words in spoken.stderr


def test_a_base_without_a_tokenizer_is_refused(base: ResidentBase, data: Path, tmp_path: Path) -> None:
    result = train(base, "--data", str(data), "--out", str(tmp_path / "out"), tokenizer=False)
    assert result.exit_code == 1
    assert "no tokenizer" in result.stderr


def test_ctrl_c_leaves_a_checkpoint(
    base: ResidentBase, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show, out = Display.show, tmp_path / "out"

    def interrupted(self: Any, event: object) -> None:
        show(self, event)
        if event is not None and getattr(event, "step", 0) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "show", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    arguments = ["--data", str(data), "--out", str(out), "--max-steps", "6", "--batch-size", "2"]
    result = train(base, *arguments)
    assert result.exit_code == 130
    assert "stopped after step 2" in result.stderr
    assert "continue with --resume" in result.stderr
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    again = train(base, *arguments, "--resume")
    assert again.exit_code == 0, again.output
    assert "from step 2" in again.stderr


def test_kill_and_resume_give_the_same_bytes(
    tiny_model: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    """kill -9 of the real command, somewhere after a checkpoint, against a run nobody touched."""
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model("llama").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    byte_tokenizer().save_pretrained(model)
    command = [
        *(
            sys.executable,
            "-m",
            "loramux_server",
            "train",
            "--model",
            str(model),
            "--data",
            str(data),
            "--quiet",
        ),
        *(
            "--n-epochs",
            "25",
            "--batch-size",
            "1",
            "--save-steps",
            "5",
            "--lora-dropout",
            "0.2",
            "--device",
            "cpu",
        ),
    ]
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run([*command, "--out", str(whole)], check=True, timeout=300)
    process = subprocess.Popen([*command, "--out", str(out)])
    try:
        deadline = time.monotonic() + 300
        while not (out / "checkpoints" / "step-10").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert not (out / WEIGHTS_FILE).exists()
    subprocess.run([*command, "--out", str(out), "--resume"], check=True, timeout=300)
    assert (out / WEIGHTS_FILE).read_bytes() == (whole / WEIGHTS_FILE).read_bytes()
