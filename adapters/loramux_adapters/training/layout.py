"""Names of what a fine-tuning run leaves in its directory. No torch: a server's front reads them, too."""

from __future__ import annotations

CHECKPOINTS = "checkpoints"  # directory of step-1, step-2, ...
STATE_FILE = "trainer_state.json"  # of a checkpoint
MANIFEST_FILE = "training_manifest.json"  # of a finished adapter
