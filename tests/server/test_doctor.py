"""`loramux doctor`: what is wrong is found, said with advice, and is the exit code. Nothing is made."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loramux_adapters.spec import AdapterSpec
from loramux_adapters.weights import LoraWeights
from loramux_server import cli
from loramux_server.doctor import environment, gpu, model, service
from loramux_server.doctor.finding import Finding


def states(findings: Any) -> dict[str, str]:
    return {one.check: one.state for one in findings}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """`doctor(*arguments)`: exit code and standard output."""

    def run(*arguments: str) -> tuple[object, str]:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("LORAMUX_DATA_DIR", str(tmp_path / "data"))
        monkeypatch.setattr(sys, "argv", ["loramux", "doctor", "--device", "cpu", *arguments])
        code: object = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code or 0
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    spec = AdapterSpec(r=2, lora_alpha=4, target_modules=("q_proj",))
    pair = (torch.ones(2, 64), torch.ones(64, 2))
    LoraWeights(spec, {f"model.layers.{i}.self_attn.q_proj": pair for i in range(3)}).write(tmp_path / "mine")
    return tmp_path / "mine"


# --- the command -------------------------------------------------------------------------------------------------------


def test_a_healthy_machine(doctor: Any, tmp_path: Path) -> None:
    code, out = doctor("--port", str(free_port()), "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (0, True), found
    checks = {one["check"] for one in found["findings"]}
    assert {"python", "system", "memory", "libraries", "bitsandbytes", "data directory", "port"} <= checks
    assert not (tmp_path / "data").exists()  # looking makes nothing


def test_the_data_directory_is_the_one_serve_would_use(doctor: Any, tmp_path: Path) -> None:
    def looked_at(*arguments: str) -> str:
        _, out = doctor("--port", str(free_port()), "--json", *arguments)
        (finding,) = [one for one in json.loads(out)["findings"] if one["check"] == "data directory"]
        return str(finding["detail"])

    assert looked_at().startswith(f"{tmp_path / 'data'} (made at start)")
    assert looked_at("--data-dir", str(tmp_path / "other")).startswith(
        f"{tmp_path / 'other'} (made at start)"
    )


def test_faults_are_the_exit_code_and_have_advice(doctor: Any, tmp_path: Path, adapter: Path) -> None:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        arguments = ("--model", str(tmp_path / "nothing"), "--adapter", str(adapter), "--port", port)
        code, out = doctor(*arguments)
        assert code == 1
        assert "2 faults" in out
        assert "does not exist" in out
        assert "→ stop what listens there" in out
        code, out = doctor(*arguments, "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (1, False)
    faults = [one for one in found["findings"] if one["state"] == "fault"]
    assert {one["check"] for one in faults} == {"model", "port"}
    assert all(one["advice"] for one in faults)


# --- its parts ---------------------------------------------------------------------------------------------------------


def test_libraries_against_the_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=1", "peft>=999", "no-such-library>=2", "never; extra == 'dev'"]
    monkeypatch.setattr(environment, "requires", lambda name: wanted)
    found = {one.check: one for one in environment.libraries()}
    assert states(found.values()) == {
        "library peft": "fault",
        "library no-such-library": "fault",
        "libraries": "ok",
    }
    assert "loramux needs >=999" in found["library peft"].detail
    assert found["library no-such-library"].advice == "pip install 'no-such-library>=2'"
    assert found["libraries"].detail.startswith("1 as asked for")


def test_loramux_itself_may_be_missing() -> None:
    assert [one.state for one in environment.libraries("no-such-distribution")] == ["fault"]


@pytest.mark.parametrize(
    ("device", "expected"), [("auto", {"gpu": "note"}), ("cpu", {}), ("cuda", {"gpu": "fault"})]
)
def test_no_gpu_is_a_fault_only_if_one_is_asked_for(
    device: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert states(gpu.gpu(device)) == {**expected, "bitsandbytes": "ok"}


@pytest.mark.parametrize(
    ("capability", "free", "expected"),
    [((8, 0), 70, ["ok"]), ((8, 0), 10, ["ok", "note"]), ((6, 1), 70, ["fault"])],
)
def test_what_is_said_of_a_gpu(
    capability: tuple[int, int], free: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = torch.cuda
    properties = SimpleNamespace(name="Some GPU", major=capability[0], minor=capability[1])
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(cuda, "mem_get_info", lambda index: (free * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    monkeypatch.setattr(gpu, "bitsandbytes", lambda device: Finding("bitsandbytes", "ok", device))
    found = list(gpu.gpu("auto"))
    assert [one.state for one in found[:-1]] == expected
    assert f"compute capability {capability[0]}.{capability[1]}" in found[0].detail
    assert "driver for CUDA 12.8" in found[0].detail
    assert found[-1].detail == "cuda"


def test_bitsandbytes_that_computes_nonsense_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    monkeypatch.setattr(functional, "dequantize_4bit", lambda packed, state: torch.zeros(64, 64))
    assert gpu.bitsandbytes("cpu").state == "fault"

    def broken(*arguments: object, **more: object) -> None:
        raise RuntimeError("undefined symbol: x\nmore")

    monkeypatch.setattr(functional, "quantize_4bit", broken)
    found = gpu.bitsandbytes("cpu")
    assert (found.state, found.detail) == ("fault", "does not compute on cpu: undefined symbol: x")


def test_a_model_and_its_adapter(tiny_model: Callable[[str], Path], tmp_path: Path, adapter: Path) -> None:
    good = tiny_model("llama")
    found = model.model(str(good), [adapter])
    assert states(found) == {"model": "ok", "tokenizer": "fault", "adapter mine": "ok"}
    assert "21 linears" in found[0].detail
    torn = tmp_path / "torn"
    shutil.copytree(good, torn)
    with (torn / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    assert states(model.model(str(torn), []))["model"] == "fault"
    wider = tmp_path / "wider"
    shutil.copytree(good, wider)
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    (found_wider,) = [one for one in model.model(str(wider), []) if one.check == "model"]
    assert found_wider.state == "fault"
    assert "tensors do not fit the config" in found_wider.detail


@pytest.mark.parametrize("name", ["/no/such/model", "a/b/c"])
def test_a_model_that_cannot_be_one(name: str) -> None:
    (found,) = model.model(name, [])
    assert (found.check, found.state) == ("model", "fault")


def test_a_hub_model_that_is_not_here_yet_is_no_fault() -> None:
    (found,) = model.model("nobody/no-such-model", [])
    assert found.state == "note"
    assert "not on this machine yet" in found.detail


def test_an_adapter_that_does_not_pass_the_gate(tiny_model: Callable[[str], Path], adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "bias": "all"}')
    found = {one.check: one for one in model.model(str(tiny_model("llama")), [adapter])}
    assert found["adapter mine"].state == "fault"
    assert "target_modules" in found["adapter mine"].detail
    assert states(model.adapters_alone([adapter])) == {"adapter mine": "fault"}


def test_an_adapter_alone_is_checked_as_far_as_it_goes(adapter: Path) -> None:
    (found,) = model.adapters_alone([adapter])
    assert found.state == "note"
    assert "not compared with the base" in found.detail


def test_the_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [one.state for one in service.data_dir(tmp_path / "new")] == ["ok"]
    (tmp_path / "file").write_text("")
    assert [one.state for one in service.data_dir(tmp_path / "file")] == ["fault"]
    (tmp_path / "bases" / "abc").mkdir(parents=True)
    with (tmp_path / "bases" / "abc" / "lock").open("ab") as held:
        assert [one.state for one in service.data_dir(tmp_path)] == ["ok"]
        fcntl.flock(held, fcntl.LOCK_EX)
        found = list(service.data_dir(tmp_path))
    assert [one.state for one in found] == ["ok", "note"]
    assert "a running server has abc" in found[1].detail
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    assert [one.state for one in service.data_dir(tmp_path)] == ["fault"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in next(iter(service.data_dir(tmp_path))).detail


def test_a_host_that_is_not_ours() -> None:
    found = service.port("256.1.1.1", 8000)
    assert (found.check, found.state) == ("port", "fault")
