"""What an answer says about itself: id, time, model, and a fingerprint of the exact weights."""

from __future__ import annotations

import time
from dataclasses import dataclass

from loramux_server.api.generation import Ask
from loramux_server.engine.messages import Ready


@dataclass(frozen=True)
class Identity:
    id: str
    created: int
    model: str
    fingerprint: str

    @classmethod
    def of(cls, ask: Ask, base: Ready) -> Identity:
        adapter = ask.target.adapter
        weights = adapter.generation[:12] if adapter else "base"
        return cls(ask.id, int(time.time()), ask.target.name, f"lmx-{base.base_identity[:8]}-{weights}")
