"""LoraWeights: the one in-memory form of an adapter, shared by upload, bank, trainer and export.

What `read` returns has passed the gate (`gate.py`); what `write` leaves is what PEFT reads, and durable.
An instance built elsewhere, as by the trainer, has not been checked: the gate sees it when it is read back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from loramux_adapters.adapter_files import CONFIG_FILE, DEFAULT_LIMITS, WEIGHTS_FILE, GateLimits
from loramux_adapters.files import replace_file
from loramux_adapters.gate import DTYPES, PREFIX, Pair, read_adapter, tensor_bytes
from loramux_adapters.safetensors_header import encode_header
from loramux_adapters.spec import AdapterSpec, BaseGeometry

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "GateLimits", "LoraWeights"]

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LoraWeights:
    """An adapter: its spec and, per full module name, A [r, in] and B [out, r] on the CPU."""

    spec: AdapterSpec
    tensors: Mapping[str, Pair]

    @cached_property
    def generation(self) -> str:
        """sha256 over the canonical spec and every tensor's name, dtype, shape and bytes: 64 hex digits."""
        digest = hashlib.sha256(self.spec.canonical())
        for name, tensor in self._stored():
            digest.update(f"\n{name} {_DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.tensors.values() for tensor in pair)

    @property
    def dtype(self) -> str:
        """The dtype as safetensors names it, or several joined by "+"."""
        return "+".join(sorted({_DTYPE_NAMES[tensor.dtype] for _, tensor in self._stored()}))

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(a.shape[0] for a, _ in self.tensors.values())

    @classmethod
    def read(
        cls, directory: Path, geometry: BaseGeometry, *, limits: GateLimits = DEFAULT_LIMITS
    ) -> LoraWeights:
        """Pass a PEFT adapter directory through the gate. Raises only InvalidAdapter, with every fault."""
        return cls(*read_adapter(directory, geometry, limits))

    def write(self, directory: Path) -> None:
        """Write PEFT's two files, each atomically and durably; the config last, because it marks an adapter.

        Replacing an adapter in place is atomic per file, not per pair; the store publishes whole directories.
        """
        directory.mkdir(parents=True, exist_ok=True)
        # Widest items first keeps every tensor aligned, which readers that map the file rely on.
        stored = sorted(self._stored(), key=lambda item: -item[1].element_size())
        header = encode_header(
            ((name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in stored),
            {"format": "pt"},
        )
        replace_file(directory / WEIGHTS_FILE, (header, *(tensor_bytes(tensor) for _, tensor in stored)))
        config = json.dumps(self.spec.to_config(), indent=2, allow_nan=False)
        replace_file(directory / CONFIG_FILE, [config.encode("ascii")])

    def _stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors under their names in the file, sorted."""
        for module in sorted(self.tensors):
            for kind, tensor in zip(("lora_A", "lora_B"), self.tensors[module], strict=True):
                yield f"{PREFIX}{module}.{kind}.weight", tensor
