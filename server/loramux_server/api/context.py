"""What every route shares: settings and the long-lived collaborators, built once by create_app."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from loramux_server.api.models import ModelNames
from loramux_server.api.texts import Texts
from loramux_server.engine.interface import EngineClient
from loramux_server.keys.limits import KeyLimits
from loramux_server.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """The limits and names that the HTTP side is configured with."""

    served_model_names: tuple[str, ...]  # of the base; the first one is canonical
    version: str
    max_body_bytes: int = 8 * 2**20
    default_max_tokens: int = 16  # of completions; chat defaults to the rest of the context
    max_sequences_per_request: int = 128  # prompts times n
    max_stored_responses: int = (
        1000  # of each tenant, for previous_response_id; the least recently used go first
    )
    max_stored_response_bytes: int = 64 * 2**20  # of each tenant
    adapter_roots: tuple[Path, ...] = ()  # the folders that /v1/load_lora_adapter may read
    started: int = field(default_factory=lambda: int(time.time()))  # `created` of the base's model card

    def __post_init__(self) -> None:
        if not self.served_model_names:
            raise ValueError("served_model_names needs at least one name")


@dataclass(frozen=True)
class ApiContext:
    """Handed to every router; nothing in it changes after start."""

    engine: EngineClient
    models: ModelNames
    texts: Texts
    settings: ApiSettings
    metrics: Metrics
    limits: KeyLimits
