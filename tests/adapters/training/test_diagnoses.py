"""What is said of curves that go wrong, and that nothing is said of those that go well."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loramux_adapters.spec import BaseGeometry
from loramux_adapters.training.diagnoses import diagnose
from loramux_adapters.training.recipe import Recipe, ResolvedRecipe, TrainingBase, resolve


@pytest.fixture
def recipe() -> ResolvedRecipe:
    base = TrainingBase(BaseGeometry("b", "", {"attn.q_proj": (8, 8)}), 576, 512, "cpu")
    return resolve(Recipe.parse({"n_epochs": 1, "batch_size": 1, "learning_rate": 3e-4, "r": 8}), base, 100)[
        0
    ]


def curve(
    losses: list[float], valid: dict[int, float] | None = None, accuracy: float = 0.3
) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [
        {"step": step, "train_loss": loss, "train_mean_token_accuracy": accuracy}
        for step, loss in enumerate(losses, start=1)
    ]
    for step, loss in sorted((valid or {}).items(), reverse=True):
        if step:
            entries[step - 1]["valid_loss"] = loss
        else:
            entries.insert(0, {"step": 0, "valid_loss": loss})
    return entries


def said(history: list[dict[str, Any]], recipe: ResolvedRecipe) -> list[str]:
    return [diagnosis.code for diagnosis in diagnose(history, recipe)]


def test_a_good_curve_is_left_alone(recipe: ResolvedRecipe) -> None:
    good = curve(
        [3 * math.exp(-step / 40) + 0.1 * (step % 3) for step in range(100)], {0: 3.0, 50: 1.5, 100: 1.2}
    )
    for end in range(1, len(good) + 1):
        assert said(good[:end], recipe) == []


def test_not_moving(recipe: ResolvedRecipe) -> None:
    flat = curve([2.0 - step * 1e-4 for step in range(15)])
    (diagnosis,) = diagnose(flat, recipe)
    assert (diagnosis.code, diagnosis.param, diagnosis.step) == ("loss_not_moving", "learning_rate", 15)
    assert "fell by 0.1% only, from 2.000 to 1.999 in 15 steps: try learning_rate 0.0009" in diagnosis.message
    assert said(flat[:14], recipe) == []  # too young
    assert said(curve([0.01] * 15, accuracy=0.99), recipe) == []  # nothing left to learn


def test_diverging(recipe: ResolvedRecipe) -> None:
    rising = curve([2.0] * 5 + [1.0] * 5 + [1.1] * 5 + [1.3] * 5)
    assert said(rising[:15], recipe) == []
    (diagnosis,) = diagnose(rising, recipe)
    assert (diagnosis.code, diagnosis.param) == ("loss_diverging", "learning_rate")
    assert "rose from 1.000 to 1.300 (means of 5 steps): try learning_rate 0.0001" in diagnosis.message


def test_overfitting(recipe: ResolvedRecipe) -> None:
    losses = [2.0 - 0.05 * step for step in range(30)]
    history = curve(losses, {0: 2.0, 10: 1.0, 20: 1.2, 30: 1.4})
    (diagnosis,) = diagnose(history, recipe)
    assert diagnosis.code == "overfitting"
    assert "rose from 1.000 (step 10) to 1.400 while the training loss fell" in diagnosis.message
    assert said(history[:21], recipe) == []  # one worse validation is no trend
    assert said(curve(losses, {0: 2.0, 10: 1.0, 20: 1.01, 30: 1.02}), recipe) == []
    assert said(curve([1.0] * 5 + [0.5] * 5 + [0.58] * 5, {5: 1.0, 10: 1.1, 15: 1.2}), recipe) == [
        "overfitting"
    ]
    assert said(curve([1.0] * 15, {5: 1.0, 10: 1.1, 15: 1.2}), recipe) == ["loss_not_moving"]
