"""Parts of export jobs without a child: what disk space is asked for, which base is named, how progress adds up."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file
from starlette.requests import ClientDisconnect
from typer.testing import CliRunner

from loramux_adapters.errors import ExportError
from loramux_adapters.export import ExportOptions, Format, VerifyOptions, WeightedAdapter, plan_export
from loramux_server import cli
from loramux_server.api.export_download import ExportDownload
from loramux_server.engine.messages import Ready
from loramux_server.exports.base import SPARE_BYTES, ExportBase, served_base
from loramux_server.exports.jobs import ExportJob, ExportRequest, JobFolder, MergedAdapter
from loramux_server.exports.progress import ExportProgress
from tests.adapters.export.conftest import Recipe, make_adapter, make_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"
READY: dict[str, Any] = {
    "base_name": "tiny", "base_identity": "a" * 64, "architecture": "LlamaForCausalLM", "max_model_len": 1,
    "vocab_size": 1, "device": "cpu", "dtype": "bfloat16", "quantization": "nf4", "eos_token_ids": [],
    "linear_shapes": {}, "weight_bytes": 1, "kv_blocks_total": 1, "kv_block_size": 16, "max_loras": 1,
    "max_cpu_loras": 1, "lora_rows": 1,
}  # fmt: skip


def ready(**fields: object) -> Ready:
    return Ready(**(READY | fields))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("parts") / "base", "llama")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_adapter(base.parent / "adapter", base, Recipe())


@pytest.mark.parametrize("format", [Format.BF16, Format.FP16, Format.FP32])
def test_needed_bytes_are_those_of_the_plan(base: Path, adapter: Path, format: Format) -> None:
    served = served_base(str(base), None, ready(), is_demo=False)
    none = VerifyOptions(prompts=0)
    options = ExportOptions(
        base, (WeightedAdapter(adapter),), base.parent / "out", format=format, verify=none
    )
    assert served.needed_bytes(format) == plan_export(options).total_bytes + SPARE_BYTES


def test_a_base_that_went_away_is_one_sentence(base: Path) -> None:
    lost = ExportBase(("--model", "org/x"), None, "bfloat16", "nf4", "cpu", "a")
    with pytest.raises(ExportError, match="not in the hub's cache"):
        lost.needed_bytes("bf16")


def test_arguments_say_how_the_server_holds_the_base(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    on_gpu = ready(device="cuda:0", dtype="float16", quantization="none")
    served = served_base("base", None, on_gpu, is_demo=False)
    assert list(served.arguments) == [
        *("--model", str(base), "--served-dtype", "fp16", "--quantization", "none", "--device", "cuda"),
        *("--base-identity", "a" * 64),
    ]
    assert served_base(str(base), None, ready(), is_demo=True).arguments[:2] == ("--model", "demo")


def test_a_hub_base_is_pinned_to_the_commit_that_was_loaded(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / COMMIT).symlink_to(base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    served = served_base("org/tiny", None, ready(), is_demo=False)
    assert served.model == ("--model", "org/tiny", "--revision", COMMIT)
    (repository / "refs" / "main").write_text("f" * 40)  # the branch moved; the server still has the old one
    arguments = [*served.arguments[:4], "--adapter", str(adapter), "--out", str(tmp_path / "x"), "--dry-run"]
    planned = CliRunner().invoke(cli.app, ["export", *arguments])
    assert planned.exit_code == 0, planned.output
    assert "base       org/tiny" in planned.stdout
    assert served_base("org/other", None, ready(), is_demo=False).directory is None


def test_progress_adds_the_phases_up() -> None:
    now = [0.0]
    progress = ExportProgress(lambda: now[0])
    assert (progress.fraction, progress.eta_seconds) == (0.0, None)
    progress.plan({"merge": 100, "verify": 300})
    began = [progress.advance({"phase": "merge", "done": done, "total": 100}) for done in (40, 60)]
    now[0] = 2.0
    assert began == [True, False]
    assert (progress.done, progress.total, progress.fraction) == (60, 400, 0.15)
    assert progress.eta_seconds == 340 / 10, "40 were there before, so 20 took two seconds"
    progress.advance({"phase": "verify", "done": 300, "total": 300})
    assert (progress.phase, progress.fraction) == ("verify", 1.0)
    progress.advance({"phase": "noise", "done": 0, "total": 100})
    assert (progress.done, progress.total) == (400, 500)


def make_job(folder: JobFolder) -> ExportJob:
    request = ExportRequest("bf16", "dequantized", 1, None, 160, False, False)
    merged = [MergedAdapter("a/b", "0" * 64, 1.0)]
    return ExportJob(id=folder.path.name, adapter="a/b", adapters=merged, request=request, created=1.0)


async def test_a_download_ends_when_the_client_leaves(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "export-0")
    folder.out.mkdir(parents=True)
    with open(folder.out / "model.safetensors", "wb") as file:
        file.truncate(200 * 2**20)  # sparse
    released, sent, left = [], [], asyncio.Event()

    class Held:
        def __enter__(self) -> None: ...

        def __exit__(self, *exc: object) -> None:
            released.append(True)

    async def receive() -> dict[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(len(message.get("body", b"")))
        if len(sent) == 4:
            left.set()
        await asyncio.sleep(0)

    response = ExportDownload(make_job(folder), folder.files(), Held())  # type: ignore[arg-type]
    with pytest.raises(ClientDisconnect):
        await response({"type": "http"}, receive, send)
    assert released == [True]
    assert len(sent) < 20, "the rest was not read"
    assert max(sent) <= 2**20


def test_a_record_survives_and_knows_its_events(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "export-1")
    folder.path.mkdir()
    job = make_job(folder).saying("created").saying("started", status="running")
    folder.save(job)
    read = msgspec.json.decode((folder.path / "job.json").read_bytes(), type=ExportJob)
    assert read == job
    assert [event.id for event in read.events] == ["export-1-event-1", "export-1-event-2"]
    assert not read.ended


def test_the_jobs_adapter_is_the_generations_bytes(tmp_path: Path, adapter: Path) -> None:
    folder, merged = JobFolder(tmp_path / "export-2"), MergedAdapter("a/b", "0" * 64, 1.0)
    folder.keep(0, merged, adapter)
    kept = folder.adapter(0, merged)
    assert kept.name == "a-b"
    one, other = (load_file(directory / "adapter_model.safetensors") for directory in (kept, adapter))
    assert one.keys() == other.keys()
    assert (kept / "adapter_model.safetensors").stat().st_nlink == 2
