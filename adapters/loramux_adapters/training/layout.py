"""Names of what a fine-tuning run leaves in its directory. No torch: a server's front reads them, too."""

from __future__ import annotations

import json
from collections.abc import Mapping

CHECKPOINTS = "checkpoints"  # directory of step-1, step-2, ...
STATE_FILE = "trainer_state.json"  # of a checkpoint
MANIFEST_FILE = "training_manifest.json"  # of a finished adapter
PUBLISHED = "training"  # among the facts that a generation was published with: what its manifest says


def published_manifest(facts: Mapping[str, object]) -> bytes | None:
    """MANIFEST_FILE again, of a generation that was published with these facts; None if it was not trained here."""
    manifest = facts.get(PUBLISHED)
    if not isinstance(manifest, dict) or "validation" not in manifest:  # or before manifests were kept whole
        return None
    return json.dumps(manifest, indent=2).encode() + b"\n"
