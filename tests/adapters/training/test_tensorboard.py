"""TensorBoard files of a run, read back; and what is said where nothing is installed that writes them."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from tests.adapters.training.support import chat, load_tiny, write_jsonl
from tests.adapters.training.test_cli import train

CURVES = {
    *("train/loss", "train/mean_token_accuracy", "train/learning_rate", "train/grad_norm"),
    *("train/tokens_per_second", "valid/loss", "valid/mean_token_accuracy"),
}


def read_events(directory: Path) -> Iterator[Any]:
    """Every event of every file, oldest file first, as TensorBoard reads them."""
    for path in sorted(directory.glob("events.out.tfevents.*"), key=lambda one: one.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4  # a checksum behind the length and one behind the event


def curves(directory: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for event in read_events(directory):
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_the_curves_of_a_run_and_of_one_that_goes_on(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loramux_adapters.cli_train_output import Display

    base = load_tiny(tiny_model("llama"))
    data = write_jsonl(tmp_path / "data.jsonl", [chat(f"say {i}", "yes") for i in range(12)])
    out, logs = tmp_path / "out", tmp_path / "logs"
    arguments = [
        "--data", str(data), "--validation", str(data), "--out", str(out), "--tensorboard", str(logs),
        "--max-steps", "4", "--batch-size", "2", "--eval-steps", "2", "--save-steps", "2", "--json",
    ]  # fmt: skip

    class _Broken(Exception):
        pass

    show = Display.show

    def break_off(self: Any, event: object) -> None:
        show(self, event)
        if getattr(event, "train_loss", None) is not None and getattr(event, "step", 0) == 3:
            raise _Broken

    with monkeypatch.context() as patched:
        patched.setattr(Display, "show", break_off)
        assert isinstance(train(base, *arguments).exception, _Broken)
    assert set(curves(logs)["train/loss"]) == {1, 2}
    result = train(base, *arguments, "--resume")
    assert result.exit_code == 0, result.output
    found, curve = curves(logs), json.loads(result.stdout)["loss_curve"]
    assert set(found) == CURVES
    assert found["train/loss"] == pytest.approx(
        {e["step"]: e["train_loss"] for e in curve if "train_loss" in e}
    )
    assert found["valid/loss"] == pytest.approx(
        {e["step"]: e["valid_loss"] for e in curve if "valid_loss" in e}
    )
    assert all(rate > 0 for rate in found["train/tokens_per_second"].values())
    starts = [event.step for event in read_events(logs) if event.session_log.status == 1]
    assert starts == [3], "what came after the checkpoint of step 2 is hidden"


def test_without_a_writer_the_extra_is_named(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    base = load_tiny(tiny_model("llama"))
    result = train(
        base, "--data", "none", "--out", str(tmp_path / "out"), "--tensorboard", str(tmp_path), "--json"
    )
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["param"] == "tensorboard"
    assert "pip install 'loramux[tensorboard]'" in error["message"]
