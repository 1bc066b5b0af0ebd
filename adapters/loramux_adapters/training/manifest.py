"""What a finished adapter says of how it came about: recipe, data, base, loss curve, versions."""

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


def manifest_of(
    inputs: TrainingInputs,
    geometry: BaseGeometry,
    weights: LoraWeights,
    history: Sequence[Mapping[str, Any]],
    *,
    dtype: str,
    device: str,
    parameters: int,
) -> dict[str, Any]:
    return {
        "format": 1,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "generation": weights.generation,
        "base": {"name": geometry.name, "identity": geometry.identity, "dtype": dtype, "device": device},
        "recipe": inputs.recipe.to_json(),
        "asked": inputs.asked.model_dump(exclude_unset=True),
        "auto": inputs.why,
        "trainable_parameters": parameters,
        "data": asdict(inputs.data.report) | {"digest": inputs.digest},
        "validation": None if inputs.validation is None else asdict(inputs.validation.report),
        "loss_curve": history,
        "versions": {
            "loramux": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
