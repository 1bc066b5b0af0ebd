"""The adapters of an export: read, passed through the gate against the base, each with its factor.

Promises: an adapter that would change nothing, and adapters that say they were trained on different bases, are
refused. Does not compare the stamps with the base: that needs its weights (see `run.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loramux_adapters.errors import ExportError
from loramux_adapters.export.options import WeightedAdapter
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.weights import LoraWeights


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter that passed the gate against this base, and its factor."""

    name: str
    weight: float
    weights: LoraWeights


def load_adapters(adapters: Iterable[WeightedAdapter], geometry: BaseGeometry) -> tuple[LoadedAdapter, ...]:
    """Raises InvalidAdapter with every fault of the first bad one, or ExportError."""
    loaded = tuple(_load(adapter, geometry) for adapter in adapters)
    stamped = {a.name: a.weights.spec.base_identity for a in loaded if a.weights.spec.base_identity}
    if len(set(stamped.values())) > 1:
        names = ", ".join(stamped)
        raise ExportError(f"the adapters {names} were trained on different bases", param="adapter")
    return loaded


def _load(adapter: WeightedAdapter, geometry: BaseGeometry) -> LoadedAdapter:
    if not adapter.path.is_dir():
        raise ExportError(f"--adapter {adapter.path}: there is no such directory", param="adapter")
    weights = LoraWeights.read(adapter.path, geometry)
    if not any(bool(b.any()) for _, b in weights.tensors.values()):
        raise ExportError(
            f"--adapter {adapter.path}: changes nothing: every lora_B is zero, as before training",
            param="adapter",
        )
    return LoadedAdapter(adapter.path.resolve().name, adapter.weight, weights)
