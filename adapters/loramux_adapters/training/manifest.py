"""What an adapter says of how it came about: recipe, data, base, versions; a finished one in a manifest with its curve.

Every checkpoint has the same provenance in its state, because it may be served, published and exported as well.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

from loramux_adapters import __version__
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.training.inputs import TrainingInputs
from loramux_adapters.weights import LoraWeights


def provenance_of(
    inputs: TrainingInputs,
    geometry: BaseGeometry,
    initial: LoraWeights | None,
    *,
    dtype: str,
    device: str,
    parameters: int,
) -> dict[str, Any]:
    """Of every adapter of a run. `initial` is the one that it trains further."""
    return {
        "base": {"name": geometry.name, "identity": geometry.identity, "dtype": dtype, "device": device},
        "recipe": inputs.recipe.to_json(),
        "initial": None if initial is None else initial.generation,
        "asked": inputs.asked.model_dump(exclude_unset=True),
        "auto": inputs.why,
        "trainable_parameters": parameters,
        "data": asdict(inputs.data.report) | {"digest": inputs.digest},
        "validation": None if inputs.validation is None else asdict(inputs.validation.report),
        "versions": {
            "loramux": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def manifest_of(
    provenance: Mapping[str, Any], weights: LoraWeights, history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Of the finished adapter."""
    return {
        "format": 1,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "generation": weights.generation,
        **provenance,
        "loss_curve": history,
    }
