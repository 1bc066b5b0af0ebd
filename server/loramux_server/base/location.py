"""Whether the name of a base can be one: said at once, before anything is loaded. No torch."""

from __future__ import annotations

from pathlib import Path

from loramux_adapters.errors import BaseModelError


def check_location(model: str) -> None:
    """Raises BaseModelError for a path that is no model directory. What may be a hub id is the hub's to judge."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseModelError(f"{model} holds no config.json: it is not a model directory", param="model")
    elif path.exists():
        raise BaseModelError(f"{model} is a file; name the model's directory", param="model")
    elif model.startswith(("/", ".", "~")) or model.endswith("/") or model.count("/") > 1:
        raise BaseModelError(f"{model} does not exist", param="model")
