"""The base as an export must take it: the very files that are served, and how the server holds them.

A hub id is pinned to the commit that lies in the cache when the server has loaded it; the embedded model is checked against
its own checksums by the export. Whatever the files are by then, the export compares their quantization identity with
the resident one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.errors import ExportError
from loramux_adapters.files import open_regular
from loramux_adapters.safetensors_header import ITEM_BYTES, MalformedHeader, read_header
from loramux_server.engine.messages import Ready

logger = logging.getLogger(__name__)

SPARE_BYTES = 64 * 2**20  # tokenizer, report and the file system's own

_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_VALUE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "nf4": 2}
_FLOATS = frozenset({"F16", "BF16", "F32"})
_MAX_HEADER_BYTES = 100 * 2**20
_MAX_TENSORS = 10**6


@dataclass(frozen=True, slots=True)
class ExportBase:
    """`model` are the command line's arguments for it; `directory` is None if the hub's cache does not have it."""

    model: tuple[str, ...]
    directory: Path | None
    dtype: str
    quantization: str
    device: str
    identity: str

    @property
    def arguments(self) -> Sequence[str]:
        return (
            *self.model,
            *("--served-dtype", _DTYPES[self.dtype]),
            *("--quantization", self.quantization),
            *("--device", self.device),
            *("--base-identity", self.identity),
        )

    def needed_bytes(self, format: str) -> int:
        """What an export takes on disk, at most and nearly. Reads headers only; raises ExportError."""
        if self.directory is None:
            raise ExportError("the base's files are not in the hub's cache, so it cannot be exported")
        values = 0
        try:
            for path in sorted(self.directory.glob("*.safetensors")):
                with open_regular(path) as file:
                    entries = read_header(
                        file,
                        label=path.name,
                        file_size=path.stat().st_size,
                        max_header_bytes=_MAX_HEADER_BYTES,
                        max_tensors=_MAX_TENSORS,
                    )
                for entry in entries:
                    # four-bit codes come two in a byte; what is neither float nor code is small
                    per_byte = 1 / ITEM_BYTES[entry.dtype] if entry.dtype in _FLOATS else 2
                    values += int((entry.stop - entry.start) * per_byte)
        except (OSError, MalformedHeader) as error:
            raise ExportError(f"the base's files cannot be read any more: {error}") from error
        return values * _VALUE_BYTES[format] + SPARE_BYTES


def served_base(model: str, revision: str | None, ready: Ready, *, is_demo: bool) -> ExportBase:
    """`model` is the directory or hub id that was loaded (the demo's directory); the worker is ready. Blocks."""
    directory: Path | None = Path(model)
    if is_demo:
        arguments: tuple[str, ...] = ("--model", "demo")
    elif Path(model).is_dir():
        directory = Path(model).absolute()
        arguments = ("--model", str(directory))
    else:
        directory = _cached(model, revision)
        arguments = ("--model", model, "--revision", directory.name if directory else "")
    return ExportBase(
        model=arguments,
        directory=directory,
        dtype=ready.dtype,
        quantization=ready.quantization,
        device="cuda" if ready.device.startswith("cuda") else "cpu",
        identity=ready.base_identity,
    )


def _cached(model: str, revision: str | None) -> Path | None:
    """The snapshot directory, which is named by its commit."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        logger.warning("exports are not possible: %s is not in the hub's cache: %s", model, error)
        return None
