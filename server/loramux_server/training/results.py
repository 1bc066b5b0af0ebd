"""A finished job's result file: what was measured at every step, as CSV in OpenAI's columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}


def step_metrics(metrics: Mapping[int, Mapping[str, Any]]) -> bytes:
    """One row a step; what was not measured at it is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for step, values in metrics.items():
        writer.writerow([step, *(values.get(name, "") for name in list(COLUMNS.values())[1:])])
    return text.getvalue().encode()
