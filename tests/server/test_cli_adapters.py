"""`loramux adapters` against the real application over a real catalogue; only the engine is a fake."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.spec import BaseGeometry
from loramux_server import cli
from tests.adapters.conftest import AdapterFiles, adapter_files, make_lora_weights, tiny_geometry
from tests.api.catalog_support import CatalogStand, make_stand, variant
from tests.api.conftest import CHATML, byte_level_tokenizer, listening
from tests.api.test_adapters_api import FakeHub

__all__ = ["adapter_files", "make_lora_weights", "tiny_geometry"]  # fixtures

Run = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(chat_template=CHATML)


@pytest.fixture
def stand(
    tmp_path: Path, tiny_geometry: BaseGeometry, tokenizer: PreTrainedTokenizerFast
) -> Iterator[CatalogStand]:
    made = make_stand(tmp_path, tiny_geometry, tokenizer)
    yield made
    assert made.staged == []
    made.catalog.close()


@pytest.fixture
def adapters(
    stand: CatalogStand, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """`adapters(*arguments)` gives what `loramux adapters ...` says, which must end with exit code `code`."""
    with listening(stand.app) as url:

        def run(*arguments: object, code: int = 0) -> str:
            command = ["loramux", "adapters", *map(str, arguments), "--url", url]
            monkeypatch.setattr(sys, "argv", command)
            ended: object = 0
            try:
                cli.main()
            except SystemExit as exit:
                ended = exit.code or 0
            out, err = capsys.readouterr()
            assert ended == code, out + err
            return out if code == 0 and not err else err

        yield run


@pytest.fixture
def folder(adapter_files: AdapterFiles, tmp_path: Path) -> Path:
    return adapter_files.write(tmp_path / "adapter")


@pytest.fixture
def other(adapter_files: AdapterFiles, tmp_path: Path) -> Path:
    return variant(adapter_files, 1).write(tmp_path / "other")


@pytest.fixture
def zeros(adapter_files: AdapterFiles, tmp_path: Path) -> Path:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in adapter_files.tensors.items()}
    return replace(adapter_files, tensors=tensors).write(tmp_path / "zeros")


def test_from_add_to_rm(adapters: Run, stand: CatalogStand, folder: Path, other: Path) -> None:
    said = adapters("add", "team/sql", folder, "--pin", "--description", "writes SQL")
    first = stand.catalog.registry.get("team/sql")
    assert said == f"team/sql is generation {first.generation[:12]}\n"
    assert (first.pinned, first.description) == (True, "writes SQL")
    assert "is taken; set overwrite" in adapters("add", "team/sql", other, code=1)
    adapters("add", "team/sql", other, "--overwrite")
    second = stand.catalog.registry.get("team/sql")
    assert second.generation != first.generation
    assert adapters("rollback", "team/sql") == f"team/sql is back at generation {first.generation[:12]}\n"
    adapters("rollback", "team/sql", second.generation[:10])
    assert stand.catalog.registry.get("team/sql").generation == second.generation
    said = adapters("unpin", "team/sql")
    assert said == f"team/sql is no longer pinned at generation {second.generation[:12]}\n"
    assert not stand.catalog.registry.get("team/sql").pinned
    adapters("pin", "team/sql")
    assert stand.catalog.registry.get("team/sql").pinned
    assert adapters("rm", "team/sql") == "team/sql is deleted\n"
    assert "there is no adapter named 'team/sql'" in adapters("rm", "team/sql", code=1)
    assert len(stand.catalog.registry) == 0


def test_archives_and_json_answers(adapters: Run, folder: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    card = json.loads(adapters("add", "a", archive, "--json"))
    assert (card["object"], card["id"], card["verification"]["verdict"]) == ("adapter", "a", "ok")
    assert json.loads(adapters("show", "a", "--json"))["generation"] == card["generation"]
    assert [one["id"] for one in json.loads(adapters("list", "--json"))] == ["a"]
    assert json.loads(adapters("rm", "a", "--json"))["deleted"] is True


def test_what_changes_nothing_needs_a_flag(adapters: Run, stand: CatalogStand, zeros: Path) -> None:
    refused = adapters("add", "a", zeros, code=1)
    assert refused.startswith("loramux: adapter 'a' is refused: ")
    assert "it is zero; allow_noop accepts it as it is" in refused
    assert len(stand.catalog.registry) == 0
    adapters("add", "a", zeros, "--allow-noop")
    assert stand.catalog.registry.verifications.outcome(stand.catalog.registry.get("a").generation) == "noop"


def test_no_verify(adapters: Run, stand: CatalogStand, zeros: Path) -> None:
    adapters("add", "a", zeros, "--no-verify")
    assert stand.engine.verified == []
    shown = adapters("show", "a").splitlines()
    assert "verification     skipped" in shown
    [row] = [line for line in adapters("list").splitlines() if line.split()[:1] == ["a"]]
    assert row.split()[3] == "skipped"


def test_show_prints_the_report_as_a_table(adapters: Run, stand: CatalogStand, folder: Path) -> None:
    adapters("add", "a", folder)
    shown = adapters("show", "a")
    assert stand.catalog.registry.get("a").generation in shown
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row][:3] for row in rows] == [
        ["q_proj", "2", "4"],
        ["v_proj", "2", "4"],
    ]
    assert shown.splitlines()[-1] == "ok: it is not zero"
    assert "{" not in shown.partition("verification")[2]  # nothing raw
    first, last = stand.catalog.registry.get("a").generation[:8], shown.splitlines()[-1]
    assert adapters("show", f"a@{first}").splitlines()[-1] == last


def test_list_has_every_column(adapters: Run, folder: Path) -> None:
    adapters("add", "a", folder)
    head, row = adapters("list").splitlines()
    for title in (
        "name",
        "generation",
        "state",
        "verified",
        "tier",
        "rank",
        "size",
        "in use",
        "pinned",
        "source",
    ):
        assert title in head
    assert row.split()[2:] == ["available", "ok", "disk", "4", "1.8", "KiB", "0", "upload"]


def test_pull(
    adapters: Run, stand: CatalogStand, zeros: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hub_holds(directory: Path) -> None:
        content = {path.name: path.read_bytes() for path in directory.iterdir()}
        monkeypatch.setattr(FakeHub, "files", content, raising=False)

    monkeypatch.setattr("loramux_server.api.routes.adapters.HuggingFaceHub", FakeHub)
    hub_holds(folder)
    adapters("pull", "a", "hf://org/repo@main", "--description", "from afar")
    record = stand.catalog.registry.get("a")
    assert (record.source, record.origin, record.description) == ("hub", "hf://org/repo@c0ffee", "from afar")
    hub_holds(zeros)
    assert "it is zero" in adapters("pull", "b", "hf://org/repo", code=1)
    adapters("pull", "b", "hf://org/repo", "--allow-noop")
    adapters("pull", "c", "hf://org/repo", "--no-verify")
    assert {record.name for record in stand.catalog.registry.list()} == {"a", "b", "c"}


def test_warnings_and_faults_are_lines(adapters: Run, adapter_files: AdapterFiles, tmp_path: Path) -> None:
    def with_config(**fields: Any) -> Path:
        altered = replace(adapter_files, config=adapter_files.config | fields)
        return altered.write(tmp_path / "altered")

    warned = adapters("add", "a", with_config(base_model_name_or_path="org/other"))
    assert warned.startswith('warning: base_model_name_or_path is "org/other"')
    refused = adapters("add", "b", with_config(use_dora=True, bias="all"), code=1).splitlines()
    assert refused[0] == "loramux: adapter 'b' is refused:"
    assert [line.split(":")[0].strip() for line in refused[1:]] == ["bias", "use_dora"]


def test_what_is_no_adapter_is_said_before_anything_is_sent(adapters: Run, tmp_path: Path) -> None:
    assert (
        adapters("add", "a", tmp_path / "nowhere", code=1) == f"loramux: {tmp_path}/nowhere: is not a file\n"
    )
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / CONFIG_FILE).write_text("{}")
    assert "adapter_model.safetensors: is not a file" in adapters("add", "a", tmp_path / "half", code=1)
