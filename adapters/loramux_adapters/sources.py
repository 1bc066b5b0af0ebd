"""Where an adapter comes from: a directory, an archive or the Hugging Face hub, staged for the gate.

Each function makes a fresh directory below `staging` with exactly adapter_config.json and
adapter_model.safetensors as regular files of allowed size; `LoraWeights.read` then judges what is in them.
Leaving the `with` block of the result removes it. What a crash leaves, `clean_staging` removes at start.
No torch.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

from loramux_adapters.adapter_files import ADAPTER_FILES, DEFAULT_LIMITS, PICKLE_ADVICE, GateLimits
from loramux_adapters.archives import unpack
from loramux_adapters.config_fields import shown
from loramux_adapters.errors import AdapterUnavailable, Fault, InvalidAdapter
from loramux_adapters.files import copy_bounded, open_regular
from loramux_adapters.registry_db import Source

_HUB_REFERENCE = re.compile(
    r"hf://(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[A-Za-z0-9][\w./-]{0,199}))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Staged:
    """An adapter's two files in a directory of their own, and where they came from."""

    directory: Path
    source: Source
    origin: str
    info: Mapping[str, object] = field(default_factory=dict)  # what its manifest is to say besides

    def discard(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Staged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


@dataclass(frozen=True, slots=True)
class HubRevision:
    """A branch, tag or commit of a hub repository, resolved: what it holds now and for ever."""

    commit: str
    sizes: Mapping[str, int]  # by file name, of every file


class Hub(Protocol):
    """The two things asked of a hub. Raises InvalidAdapter or AdapterUnavailable."""

    def resolve(self, repo: str, revision: str) -> HubRevision: ...

    def download(self, repo: str, commit: str, file: str, directory: Path) -> None: ...


def new_staging_directory(staging: Path) -> Path:
    """A fresh, empty directory that only this process's user may enter."""
    staging.mkdir(parents=True, exist_ok=True)
    directory = staging / uuid.uuid4().hex
    directory.mkdir(mode=0o700)
    return directory


def clean_staging(staging: Path) -> None:
    """Remove what a crash left. Only while nothing is being staged."""
    for leftover in staging.iterdir() if staging.exists() else ():
        shutil.rmtree(leftover, ignore_errors=True)


def stage_directory(
    path: Path, staging: Path, *, roots: Iterable[Path] = (), limits: GateLimits = DEFAULT_LIMITS
) -> Staged:
    """Copy from a directory on this machine. With `roots`, neither it nor its files may lie outside them.

    Messages repeat only what the caller wrote, so that they tell a stranger nothing about the file system.
    """
    confined = [root.resolve() for root in roots]
    with _staged(staging) as directory:
        faults = []
        for name in ADAPTER_FILES:
            target = Path(os.path.realpath(path / name))
            if confined and not any(target.is_relative_to(root) for root in confined):
                raise InvalidAdapter(
                    [Fault("lora_path", "is outside the folders adapters may be loaded from")]
                )
            problem = _copy(target, directory / name, limits.max_bytes(name))
            if problem:
                faults.append(Fault(name, problem))
        if faults:
            raise InvalidAdapter(faults)
        return Staged(directory, "path", str(path))


def stage_archive(archive: Path, staging: Path, *, limits: GateLimits = DEFAULT_LIMITS) -> Staged:
    """Unpack an uploaded .zip, .tar, .tar.gz or .tar.zst; the format is told from its content."""
    with _staged(staging) as directory:
        unpack(archive, directory, limits)
        return Staged(directory, "upload", "")


def stage_hub(reference: str, staging: Path, *, hub: Hub, limits: GateLimits = DEFAULT_LIMITS) -> Staged:
    """Download from `hf://org/repo[@revision]`; the origin records the commit the revision meant."""
    match = _HUB_REFERENCE.fullmatch(reference)
    if match is None or ".." in reference:
        raise InvalidAdapter(
            [Fault("source", f"{shown(reference)} is not hf://organisation/repository@revision")]
        )
    repo, revision = match["repo"], match["revision"] or "main"
    found = hub.resolve(repo, revision)
    faults = [
        Fault(name, problem) for name in ADAPTER_FILES if (problem := _hub_problem(name, found.sizes, limits))
    ]
    if faults:
        raise InvalidAdapter(faults)
    with _staged(staging) as directory:
        for name in ADAPTER_FILES:
            hub.download(repo, found.commit, name, directory)
        return Staged(directory, "hub", f"hf://{repo}@{found.commit}")


def _hub_problem(name: str, sizes: Mapping[str, int], limits: GateLimits) -> str:
    if name not in sizes:
        has_pickle = name.replace(".safetensors", ".bin") in sizes
        return "is not in the repository" + (f", only a .bin, and {PICKLE_ADVICE}" if has_pickle else "")
    if sizes[name] > limits.max_bytes(name):
        return f"{sizes[name]} bytes, at most {limits.max_bytes(name)} are allowed"
    return ""


@contextmanager
def _staged(staging: Path) -> Iterator[Path]:
    """A staging directory that is removed if the block fails."""
    directory = new_staging_directory(staging)
    try:
        yield directory
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _copy(source: Path, target: Path, limit: int) -> str:
    """Copy up to `limit` bytes; what went wrong, if anything."""
    try:
        with open_regular(source, follow_links=False) as reader:
            if not copy_bounded(reader, target, limit):
                return f"is larger than the {limit} bytes allowed"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be copied: {error.strerror or error}"
    return ""


class HuggingFaceHub:
    """The hub through huggingface_hub's own client. `token` and `endpoint` default to its environment."""

    def __init__(self, *, token: str | None = None, endpoint: str | None = None) -> None:
        self._token = token
        self._endpoint = endpoint

    def resolve(self, repo: str, revision: str) -> HubRevision:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint, token=self._token)
        with _hub_errors(repo, revision):
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=30)
        if info.sha is None:
            raise AdapterUnavailable(f"source: the hub names no commit for {repo}@{revision}", param="source")
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        return HubRevision(info.sha, sizes)

    def download(self, repo: str, commit: str, file: str, directory: Path) -> None:
        from huggingface_hub import hf_hub_download

        with _hub_errors(repo, commit):
            hf_hub_download(
                repo,
                file,
                revision=commit,
                local_dir=directory,
                token=self._token,
                endpoint=self._endpoint,
            )
        shutil.rmtree(directory / ".cache", ignore_errors=True)  # the client's own bookkeeping


@contextmanager
def _hub_errors(repo: str, revision: str) -> Iterator[None]:
    """What the client raises, as what it means here. Its messages hold URLs and request ids: not repeated."""
    from huggingface_hub import errors, get_session

    # The client's transport errors are those of its HTTP library: httpx at first, httpx2 since version 2.
    transport = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.GatedRepoError):
        problem = f"{repo}@{revision} does not exist on the hub, or the server's token may not read it"
        raise InvalidAdapter([Fault("source", problem)]) from None
    except (errors.HfHubHTTPError, transport.HTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        raise AdapterUnavailable(
            f"source: the Hugging Face hub cannot be reached ({type(error).__name__}), upload files instead",
            param="source",
            code="source_unavailable",
        ) from error
