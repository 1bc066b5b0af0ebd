"""What a fine-tuned model and its checkpoints are called: names of adapters, in OpenAI's manner.

ft:<base>:<suffix>:<8 digits>                       the model; the suffix may be empty
ft:<base>:<suffix>:<8 digits>:ckpt-step-<number>    a checkpoint
"""

from __future__ import annotations

import re
from uuid import uuid4

MAX_BASE = 28  # characters; with the longest suffix and step a name is still one that an adapter may have

_FOREIGN = re.compile(r"[^A-Za-z0-9._-]+")


def model_name(base: str, suffix: str | None) -> str:
    """A name that nobody has. `base` may be a hub id or a path: its last part is used."""
    short = _FOREIGN.sub("-", base.rstrip("/").rpartition("/")[2])[:MAX_BASE]
    return f"ft:{short}:{suffix or ''}:{uuid4().hex[:8]}"


def checkpoint_name(model: str, step: int) -> str:
    return f"{model}:ckpt-step-{step}"
