"""GenerationStore: immutable adapter contents on disk, each in a directory named by its sha256.

    <root>/<first 2 hex>/<64 hex>/{adapter_config.json, adapter_model.safetensors, manifest.json}

`publish` returns when the generation is durable; at any instant a crash leaves a whole generation or none.
Files are never changed after that, so a reader needs no lock. Several processes may share a root. Names are
`registry.py`'s business. No torch at import.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loramux_adapters.adapter_files import DEFAULT_LIMITS
from loramux_adapters.errors import InvalidAdapter, StorageDamaged, StorageError
from loramux_adapters.files import fsync_directory, storage_error, write_file
from loramux_adapters.set_aside import set_aside

if TYPE_CHECKING:
    from loramux_adapters.weights import LoraWeights

MANIFEST_FILE = "manifest.json"
GENERATION = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of a generation without reading its weights. Not part of its identity."""

    generation: str
    created: float  # seconds since the epoch, of the first publication
    num_bytes: int  # of the tensors
    rank: int  # the largest of any module
    target_modules: tuple[str, ...]
    dtype: str
    base_model_name_or_path: str | None
    base_identity: str | None
    file_bytes: Mapping[str, int]  # by file name
    info: Mapping[str, object] = field(default_factory=dict)  # the publisher's: source, report, ...


class GenerationStore:
    """Publish, find, check and delete generations. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._partial = root / ".partial"
        self._lock_file = root / ".lock"
        self._lock = threading.Lock()
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            with self._locked(exclusive=True) as alone:
                if alone:  # nobody is publishing, so what lies here was left by a crash
                    for leftover in self._partial.iterdir():
                        shutil.rmtree(leftover, ignore_errors=True)
        except OSError as error:
            raise storage_error("the adapter store cannot be opened", error) from error

    def publish(self, weights: LoraWeights, info: Mapping[str, object] | None = None) -> str:
        """Store the weights and return their generation; storing the same content again changes nothing."""
        generation = weights.generation
        staged = self._partial / uuid.uuid4().hex
        try:
            with self._locked(exclusive=False):
                if not self._renew(generation):
                    self._stage(staged, weights, info or {})
                    with self._lock:
                        self._install(staged, self._directory(generation))
        except OSError as error:
            raise storage_error(f"generation {generation[:12]} cannot be stored", error) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return generation

    def path(self, generation: str) -> Path:
        """The directory to read; StorageError if the generation is absent or visibly damaged."""
        self.manifest(generation)
        return self._directory(generation)

    def manifest(self, generation: str) -> Manifest:
        """The manifest, after comparing the files' sizes with it."""
        directory = self._directory(generation)
        try:
            fields = json.loads((directory / MANIFEST_FILE).read_bytes())
            manifest = Manifest(**fields | {"target_modules": tuple(fields["target_modules"])})
            sizes = {name: (directory / name).stat().st_size for name in manifest.file_bytes}
        except FileNotFoundError as error:
            if directory.exists():
                missing = Path(error.filename).name
                raise StorageDamaged(
                    f"generation {generation[:12]} is damaged: {missing} is missing"
                ) from None
            raise StorageError(f"generation {generation[:12]} is not in the adapter store") from None
        except OSError as error:
            raise storage_error(f"generation {generation[:12]} cannot be read", error) from error
        except (ValueError, TypeError, KeyError) as error:
            raise StorageDamaged(f"generation {generation[:12]} has no readable manifest: {error}") from None
        if manifest.generation != generation or sizes != manifest.file_bytes:
            raise StorageDamaged(f"generation {generation[:12]} is damaged: its files have other sizes")
        return manifest

    def set_damaged_aside(self) -> dict[str, str]:
        """Rename the generations that are visibly damaged; what is wrong with each. To be called before they are used."""
        found: dict[str, str] = {}
        for generation in tuple(self):
            try:
                self.manifest(generation)
            except StorageDamaged as error:
                found[generation] = f"{error.message}; set aside as *{set_aside(self._directory(generation))}"
        return found

    def __contains__(self, generation: str) -> bool:
        """Whether the generation is here and its files have their sizes; `verify` reads them."""
        try:
            self.manifest(generation)
        except StorageError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        for shard in sorted(self.root.glob("[0-9a-f][0-9a-f]")):
            yield from sorted(entry.name for entry in shard.iterdir() if GENERATION.fullmatch(entry.name))

    def verify(self, generation: str) -> None:
        """Read the whole generation back and compare its hash; StorageError if that is not its name."""
        from loramux_adapters.gate import smallest_geometry
        from loramux_adapters.weights import LoraWeights

        directory = self.path(generation)
        try:
            weights = LoraWeights.read(directory, smallest_geometry(directory, DEFAULT_LIMITS))
        except InvalidAdapter as error:
            raise StorageError(f"generation {generation[:12]} is damaged: {error.faults[0]}") from None
        if weights.generation != generation:
            raise StorageError(f"generation {generation[:12]} is damaged: its content has another hash")

    def delete(self, generation: str) -> bool:
        """Remove a generation at once, whoever uses it; whether it was there."""
        with self._lock:
            discarded = self._set_aside(generation)
        if discarded is not None:
            shutil.rmtree(discarded, ignore_errors=True)  # what stays is removed at the next open
        return discarded is not None

    def sweep(self, keep: Collection[str], *, min_age: float = 600.0) -> tuple[str, ...]:
        """Delete what is not in `keep` and was not published in the last `min_age` seconds; what went.

        The grace protects a generation between its publication and its first name. Does nothing while another
        thread or process publishes: the next sweep will.
        """
        limit = time.time() - min_age
        discarded: dict[str, Path] = {}
        with self._lock, self._locked(exclusive=True) as alone:
            for generation in self if alone else ():
                if generation not in keep and self._directory(generation).stat().st_mtime <= limit:
                    path = self._set_aside(generation)
                    if path is not None:
                        discarded[generation] = path
        for path in discarded.values():
            shutil.rmtree(path, ignore_errors=True)
        return tuple(discarded)

    def _directory(self, generation: str) -> Path:
        if not GENERATION.fullmatch(generation):
            raise StorageError(f"{generation[:80]!a} is not a generation: 64 hex digits are")
        return self.root / generation[:2] / generation

    def _set_aside(self, generation: str) -> Path | None:
        """Take a generation out of sight in one step; deleting its files can then be interrupted."""
        discarded = self._partial / uuid.uuid4().hex
        try:
            self._directory(generation).rename(discarded)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(f"generation {generation[:12]} cannot be deleted", error) from error
        return discarded

    def _renew(self, generation: str) -> bool:
        """Whether it is here and whole; if so, its grace against `sweep` starts again."""
        with self._lock:
            if generation not in self:
                return False
            os.utime(self._directory(generation))
            return True

    def _stage(self, staged: Path, weights: LoraWeights, info: Mapping[str, object]) -> None:
        staged.mkdir()
        weights.write(staged)
        manifest = Manifest(
            generation=weights.generation,
            created=time.time(),
            num_bytes=weights.num_bytes,
            rank=weights.rank,
            target_modules=weights.spec.target_modules,
            dtype=weights.dtype,
            base_model_name_or_path=weights.spec.base_model_name_or_path,
            base_identity=weights.spec.base_identity,
            file_bytes={entry.name: entry.stat().st_size for entry in staged.iterdir()},
            info=info,
        )
        write_file(staged / MANIFEST_FILE, [json.dumps(asdict(manifest), indent=2).encode("ascii")])
        for entry in staged.iterdir():
            entry.chmod(0o444)
        fsync_directory(staged)

    def _install(self, staged: Path, final: Path) -> None:
        final.parent.mkdir(exist_ok=True)
        fsync_directory(self.root)
        if final.exists() and final.name not in self:  # damaged: move it out of the way
            self._set_aside(final.name)
        try:
            staged.rename(final)
        except OSError:
            if final.name not in self:  # else another process published the same content first
                raise
        fsync_directory(final.parent)

    @contextmanager
    def _locked(self, *, exclusive: bool) -> Iterator[bool]:
        """The lock publishers share. Exclusive means nobody publishes: it does not wait, and says whether."""
        with open(self._lock_file, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
            except BlockingIOError:
                yield False
            else:
                yield True
