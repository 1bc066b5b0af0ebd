"""Names of what a fine-tuning run leaves in its directory. No torch: a server's front reads them, too."""

from __future__ import annotations

import json
from collections.abc import Mapping

CHECKPOINTS = "checkpoints"  # directory of step-1, step-2, ...
STATE_FILE = "trainer_state.json"  # of a checkpoint
MANIFEST_FILE = "training_manifest.json"  # of a finished adapter
PUBLISHED = "training"  # among the facts that a generation was published with: what its manifest says


def published_manifest(facts: Mapping[str, object], job: str) -> bytes | None:
    """What MANIFEST_FILE says beside what a generation has itself; None if `job` did not train it.

    `facts` are what the generation was published with. Equal bytes are one generation, whoever brings them: what a job says
    of its data is for those whose model came from it.
    """
    manifest = facts.get(PUBLISHED)
    if not isinstance(manifest, dict) or manifest.get("job") != job:
        return None
    if "validation" not in manifest:  # published before manifests were kept whole
        return None
    return json.dumps(manifest).encode() + b"\n"
