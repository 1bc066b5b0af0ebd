"""The adapters of an export: read, passed through the gate against the base, each with its factor.

Promises: an adapter that would change nothing, and adapters that say they were trained on different bases, are
refused. Does not compare the stamps with the base: that needs its weights (see `run.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux_adapters.errors import ExportError
from loramux_adapters.export.options import WeightedAdapter
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.training.layout import MANIFEST_FILE
from loramux_adapters.weights import LoraWeights


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter that passed the gate against this base, and its factor.

    `data` are the sha256 of what it was trained on, by role, if the trainer's manifest lies beside it.
    """

    name: str
    weight: float
    weights: LoraWeights
    data: dict[str, str] | None = None


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
    return LoadedAdapter(adapter.path.resolve().name, adapter.weight, weights, _training_data(adapter.path))


def _training_data(directory: Path) -> dict[str, str] | None:
    path = directory / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        files = {"training": manifest["data"], "validation": manifest["validation"]}
        return {role: str(report["sha256"]) for role, report in files.items() if report is not None}
    except (ValueError, LookupError, TypeError) as error:
        raise ExportError(
            f"--adapter {directory}: its {MANIFEST_FILE} is not the trainer's; take it away", param="adapter"
        ) from error
