"""What a loss curve says of its recipe: not moving, diverging, overfitting; each with its figure and what to try.

Pure functions of the curve so far, so that a resumed run says the same. They are hints for people: nothing is
changed or stopped on their account (a loss that is not finite stops the run, in `trainer.py`). No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramux_adapters.training.recipe import ResolvedRecipe

NOT_MOVING = 0.02  # relative fall of the loss below which it has not moved
DIVERGING = 1.2  # times the lowest mean so far
OVERFITTING = 1.03  # times the lowest validation loss so far
LEARNT = 0.95  # token accuracy above which a loss has no reason to move
SMALLEST_WINDOW = 5  # steps that are averaged

Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`code` is stable; `message` has the figure and the change to try; `param` is the field to change."""

    step: int
    code: str
    param: str
    message: str


def diagnose(history: Sequence[Entry], recipe: ResolvedRecipe) -> list[Diagnosis]:
    """What is to be said after the last step of `history`. Empty for a run that goes well, or is too young."""
    trained = [entry for entry in history if "train_loss" in entry]
    window = max(SMALLEST_WINDOW, recipe.total_steps // 20)
    found = [_overfitting(history, trained)]
    if len(trained) >= 3 * window:
        found += [_diverging(trained, window, recipe), _not_moving(trained, window, recipe)]
    return [diagnosis for diagnosis in found if diagnosis is not None]


def _mean(entries: Sequence[Entry], key: str = "train_loss") -> float:
    return sum(float(entry[key]) for entry in entries) / len(entries)


def _not_moving(trained: Sequence[Entry], window: int, recipe: ResolvedRecipe) -> Diagnosis | None:
    first, last = _mean(trained[:window]), _mean(trained[-window:])
    fall = 1.0 - last / first if first > 0 else 1.0
    if not 0 <= fall < NOT_MOVING or _mean(trained[-window:], "train_mean_token_accuracy") > LEARNT:
        return None
    step = trained[-1]["step"]
    return Diagnosis(
        step,
        "loss_not_moving",
        "learning_rate",
        f"the loss fell by {fall:.1%} only, from {first:.3f} to {last:.3f} in {step} steps: try learning_rate "
        f"{3 * recipe.learning_rate:.1g} instead of {recipe.learning_rate:.2g}, then a larger r than {recipe.r} or "
        "target_modules all-linear",
    )


def _diverging(trained: Sequence[Entry], window: int, recipe: ResolvedRecipe) -> Diagnosis | None:
    means = [_mean(trained[end - window : end]) for end in range(window, len(trained) + 1, window)]
    lowest, last = min(means), _mean(trained[-window:])
    if not last > DIVERGING * lowest:
        return None
    return Diagnosis(
        trained[-1]["step"],
        "loss_diverging",
        "learning_rate",
        f"the loss rose from {lowest:.3f} to {last:.3f} (means of {window} steps): try learning_rate "
        f"{recipe.learning_rate / 3:.1g} instead of {recipe.learning_rate:.2g}, or a longer warmup_ratio than "
        f"{recipe.warmup_ratio:g}",
    )


def _overfitting(history: Sequence[Entry], trained: Sequence[Entry]) -> Diagnosis | None:
    """Two validations in a row above the best one, while the training loss between them fell."""
    scores = [entry for entry in history if "valid_loss" in entry]
    if len(scores) < 3 or not trained or scores[-1] is not history[-1]:
        return None
    best = min(scores, key=lambda entry: entry["valid_loss"])
    worse = [float(entry["valid_loss"]) > OVERFITTING * float(best["valid_loss"]) for entry in scores[-2:]]
    until, since = [entry for entry in trained if entry["step"] <= best["step"]], trained[-SMALLEST_WINDOW:]
    if not all(worse) or not until:
        return None
    before, now = _mean(until[-SMALLEST_WINDOW:]), _mean(since)
    if not now < before:
        return None
    return Diagnosis(
        trained[-1]["step"],
        "overfitting",
        "n_epochs",
        f"the validation loss rose from {best['valid_loss']:.3f} (step {best['step']}) to {scores[-1]['valid_loss']:.3f} "
        f"while the training loss fell from {before:.3f} to {now:.3f}: use the checkpoint nearest to step {best['step']}, "
        "or train fewer n_epochs, with a lower r or some lora_dropout",
    )
