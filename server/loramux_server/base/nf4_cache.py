"""Quantized copies of bases, so that a later start reads a third of the bytes and quantizes nothing.

Promises: a copy is found only for the very files it was made of (path, size and change time of each; commit of a hub
model), the same kind of device and the same releases of the libraries that wrote it; it appears whole or not at all;
and it is used only if the identity of its bytes is the one that was written down when it was made. A copy that cannot
be written is a warning. The format is transformers' own of a bitsandbytes checkpoint.
Does not delete copies of bases that are gone: the directory is a cache, and may be emptied at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_FORMAT = 1  # raise it when a newer loramux would quantize or write otherwise
_IDENTITY = "identity.txt"
_WRITERS = ("bitsandbytes", "transformers", "torch")
_ABANDONED_S = 3600.0
_READ = (".json", ".safetensors")


@dataclass(frozen=True, slots=True)
class QuantizedCopy:
    """The place of one base's copy, whether or not it is there."""

    path: Path

    @classmethod
    def of(cls, root: Path, model: str, config: Any, device: torch.device) -> QuantizedCopy | None:
        """None if nothing tells one content of `model` from another."""
        source = _source(model, config)
        if source is None:
            return None
        parts = [_FORMAT, device.type, [version(name) for name in _WRITERS], source]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        return cls(root / key)

    def identity(self) -> str | None:
        """Of the base that was written, `nf4.base_identity`; None if there is no copy."""
        try:
            return (self.path / _IDENTITY).read_text()
        except OSError:
            return None

    def discard(self, reason: str) -> None:
        logger.warning("the quantized copy %s is damaged (%s); quantizing anew", self.path, reason)
        shutil.rmtree(self.path, ignore_errors=True)

    def write(self, model: PreTrainedModel) -> Path | None:
        """Write the freshly quantized model beside its place; None, with a warning, if that is not possible."""
        partial: Path | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._sweep()
            partial = Path(tempfile.mkdtemp(prefix=f"{self.path.name}.", dir=self.path.parent))
            model.save_pretrained(partial)
            return partial
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # served all the same
            logger.warning("no quantized copy could be kept in %s: %s", self.path.parent, error)
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            return None

    def _sweep(self) -> None:
        """Drop what starts that were killed while they wrote have left, but for the last: somebody may write it now."""
        left = sorted(self.path.parent.glob(f"{self.path.name}.*"), key=lambda one: one.stat().st_mtime)
        for number, one in enumerate(left, 1):
            if number < len(left) or time.time() - one.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(one, ignore_errors=True)

    def publish(self, partial: Path, identity: str) -> None:
        """Give what `write` wrote its name. The identity is written last: without it there is no copy."""
        try:
            for file in partial.iterdir():
                _sync(file)
            (partial / _IDENTITY).write_text(identity)
            _sync(partial / _IDENTITY)
            shutil.rmtree(self.path, ignore_errors=True)
            partial.rename(self.path)
        except OSError as error:  # another start published the same copy first, or the disk is full
            logger.warning("no quantized copy could be kept in %s: %s", self.path.parent, error)
            shutil.rmtree(partial, ignore_errors=True)


def _source(model: str, config: Any) -> object:
    directory = Path(model)
    if not directory.is_dir():
        commit = getattr(config, "_commit_hash", None)
        return [model, commit] if commit else None
    files = sorted(file for file in directory.iterdir() if file.suffix in _READ)
    stats = [(file.name, file.stat()) for file in files]
    return [str(directory.resolve()), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
