"""Three small adapters for the embedded model, shipped so that the first start has something to show.

`pirate` talks like a pirate, `extract` turns a sentence into a JSON object, `sentiment` answers in one word.
Their data sets are under `data/`, the recipe is `train.py`. This file only lists them; it imports no torch.
"""

from __future__ import annotations

from pathlib import Path

NAMES = ("pirate", "extract", "sentiment")


def demo_adapters() -> dict[str, Path]:
    """Name -> PEFT directory of every shipped adapter."""
    return {name: Path(__file__).parent / name for name in NAMES}
