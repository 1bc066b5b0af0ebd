"""`loramux export` as typed: exit codes, what goes to which stream, JSON."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from loramux_adapters.cli_export import register
from loramux_adapters.export.sources import ServedSource


@pytest.fixture
def export(bases: Callable[[str], Path]) -> Callable[..., Result]:
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    register(app, lambda: (bases("llama"), "org/tiny"))

    def invoke(command: str, *arguments: object) -> Result:
        return CliRunner().invoke(app, [command, *map(str, arguments)])

    return invoke


def test_dry_run_writes_nothing(export: Callable[..., Result], adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    result = export("export", "--model", "demo", "--adapter", f"{adapter}=0.5", "--out", out, "--dry-run")
    assert result.exit_code == 0
    assert "base       org/tiny" in result.stdout
    assert "plain x 0.5 (rank 8, 14 modules)" in result.stdout
    assert "6 copied, 14 merged" in result.stdout
    assert list(tmp_path.iterdir()) == []

    as_json = export("merge", "--model", "demo", "--adapter", adapter, "--out", out, "--dry-run", "--json")
    plan = json.loads(as_json.stdout)
    assert plan["tensors"] == {"copied": 6, "merged": 14}
    assert plan["bytes"] > 0
    assert plan["peak_memory_bytes"] > 0


def test_export_and_what_it_says(
    export: Callable[..., Result], bases: Callable[[str], Path], adapter: Path, tmp_path: Path
) -> None:
    common = ("--model", bases("llama"), "--adapter", adapter, "--verify-tokens", 32)
    result = export("export", *common, "--out", tmp_path / "one", "--compare")
    assert result.exit_code == 0
    assert f"exported to {tmp_path / 'one'}" in result.stdout
    assert "export || served: KL" in result.stdout
    assert "other base || served: KL" in result.stdout

    silent = export("export", *common, "--out", tmp_path / "two", "--quiet")
    assert (silent.exit_code, silent.stdout) == (0, "")

    parsed = json.loads(export("export", *common, "--out", tmp_path / "three", "--json").stdout)
    assert parsed["out"] == str(tmp_path / "three")
    assert parsed["report"]["verification"]["passed"] is True


def test_what_the_adapter_was_trained_on(
    export: Callable[..., Result], adapter: Path, tmp_path: Path
) -> None:
    trained = Path(shutil.copytree(adapter, tmp_path / "trained"))
    manifest = trained / "training_manifest.json"
    manifest.write_text(json.dumps({"data": {"sha256": "ab" * 32}, "validation": {"sha256": "cd" * 32}}))
    common = ("export", "--model", "demo", "--adapter", trained, "--verify", 0)
    report = json.loads(export(*common, "--out", tmp_path / "merged", "--json").stdout)["report"]
    assert report["adapters"][0]["data_sha256"] == {"training": "ab" * 32, "validation": "cd" * 32}
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"| training data (sha256) | `{'ab' * 32}` (trained) |" in card
    for other in ("{", "[]", '{"data": {}, "validation": null}'):
        manifest.write_text(other)
        result = export(*common, "--out", tmp_path / "other")
        assert result.exit_code == 1
        assert "its training_manifest.json is not the trainer's" in result.stderr


DOCUMENTED = re.findall(
    r"^loramux export (.*?)(?: +#.*)?$",
    (Path(__file__).parents[3] / "docs" / "export.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize("arguments", DOCUMENTED)
def test_commands_of_the_guide(
    arguments: str, export: Callable[..., Result], bases: Callable[[str], Path], adapter: Path, tmp_path: Path
) -> None:
    """As they stand there, with this model, this adapter and another place, up to the plan."""
    words = arguments.split()
    for index, word in enumerate(words[:-1]):
        match word:
            case "--model" if words[index + 1] != "demo":
                words[index + 1] = str(bases("llama"))
            case "--adapter":
                _, separator, weight = words[index + 1].partition("=")
                words[index + 1] = f"{adapter}{separator}{weight}"
            case "--out":
                words[index + 1] = str(tmp_path / "merged")
    result = export("export", *words, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "merged" in result.stdout


def test_refusals_are_one_sentence_and_exit_1(
    export: Callable[..., Result], adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "merged").mkdir()
    common = ("--model", "demo", "--adapter", adapter, "--out", tmp_path / "merged")
    result = export("export", *common)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("loramux: ")
    assert "exists already" in result.stderr
    error = json.loads(export("export", *common, "--json").stdout)["error"]
    assert (error["param"], error["code"]) == ("out", "export_error")
    for word, value in (("--onto", "half"), ("--format", "gguf"), ("--served-dtype", "int4")):
        assert export("export", *common, word, value).exit_code == 1
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n")
    assert "holds no text" in export("export", *common, "--verify-file", prompts).stderr


def test_an_unproven_export_exits_3(
    export: Callable[..., Result], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServedSource, "adapt", lambda self, module, x: None)
    result = export(
        "export", "--model", "demo", "--adapter", adapter, "--out", tmp_path / "merged", "--strict"
    )
    assert result.exit_code == 3
    assert "is not equal to the served model" in result.stderr
    assert (tmp_path / "merged.partial").is_dir()
    assert not (tmp_path / "merged").exists()


def test_prompts_from_a_file(export: Callable[..., Result], adapter: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The gulls knew first.\n\nThey left at noon.\n")
    arguments = ("--model", "demo", "--adapter", adapter, "--out", tmp_path / "merged", "--json")
    result = export("export", *arguments, "--verify-file", prompts)
    verification = json.loads(result.stdout)["report"]["verification"]
    assert verification["tokens"] == "given texts"
    assert verification["export"]["positions"] == 21 + 18


def test_help_needs_nothing_heavy() -> None:
    check = "import sys, loramux_adapters.cli_export; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0


def test_no_such_model(export: Callable[..., Result], adapter: Path, tmp_path: Path) -> None:
    result = export("export", "--model", "not a model", "--adapter", adapter, "--out", tmp_path / "merged")
    assert result.exit_code == 1
    assert "--model not a model: neither a directory nor a model the hub gives" in result.stderr


def test_progress_for_programs(export: Callable[..., Result], adapter: Path, tmp_path: Path) -> None:
    arguments = ("--model", "demo", "--adapter", adapter, "--out", tmp_path / "merged", "--verify", 1)
    result = export("export", *arguments, "--json", "--progress", "json")
    plan, *said = map(json.loads, result.stderr.splitlines())
    assert (plan["event"], list(plan["phases"])) == ("plan", ["merge", "verify"])
    last = {line["phase"]: line for line in said}
    assert {phase: (line["done"], line["total"]) for phase, line in last.items()} == {
        phase: (total, total) for phase, total in plan["phases"].items()
    }
    assert json.loads(result.stdout)["report"]["verification"]["passed"] is True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--base-identity", "0" * 64), "this is not the base that is served: org/tiny quantizes to"),
        (("--quantization", "int8"), "--quantization int8: choose one of nf4, none"),
        (
            ("--quantization", "none", "--format", "nf4"),
            "--format nf4: a base served with --quantization none",
        ),
        (("--device", "tpu"), "--device tpu: choose one of cpu, cuda"),
        pytest.param(
            ("--device", "cuda"),
            "--device cuda: torch finds no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_how_the_base_was_held(
    export: Callable[..., Result], adapter: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    arguments = ("--model", "demo", "--adapter", adapter, "--out", tmp_path / "merged", "--verify", 0)
    result = export("export", *arguments, *words)
    assert result.exit_code == 1
    assert said in result.stderr
    assert list(tmp_path.glob("merged*")) == []


def test_a_moved_branch_and_a_revision(
    export: Callable[..., Result],
    bases: Callable[[str], Path],
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    snapshots = tmp_path / "models--org--tiny" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / ("a" * 40)).symlink_to(bases("llama"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    arguments = ("--model", "org/tiny", "--adapter", adapter, "--out", tmp_path / "merged", "--dry-run")
    assert export("export", *arguments, "--revision", "a" * 40).exit_code == 0
    assert export("export", *arguments, "--revision", "b" * 40).exit_code == 1
