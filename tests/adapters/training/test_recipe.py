"""Recipes: what is refused by name, and what "auto" becomes."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from loramux_adapters.errors import TrainingError
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.training.recipe import (
    Recipe,
    TrainingBase,
    learning_rate_factor,
    resolve,
    sequence_length,
)

LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")


def base_of(*leaves: str, device: str = "cpu", width: int = 2000) -> TrainingBase:
    shapes = {f"model.layers.{i}.{leaf}": (8, 8) for i in range(2) for leaf in leaves or LEAVES}
    return TrainingBase(BaseGeometry("org/base", "id", shapes), width, 4096, device)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("n_epochs", 51, "n_epochs should be 'auto' or less than or equal to 50, not 51"),
        ("n_epochs", "3", "n_epochs should be"),
        ("batch_size", True, "batch_size should be"),
        ("r", 0, "r should be"),
        ("learning_rate", float("nan"), "learning_rate should be"),
        ("lora_dropout", 1, "lora_dropout should be less than 1, not 1"),
        ("target_modules", [], "target_modules"),
        ("optimizer", "sgd", "optimizer should be 'adamw', 'adamw_8bit' or 'paged_adamw_8bit', not"),
        ("max_steps", 0, "max_steps should be"),
        ("lora_rank", 8, "'lora_rank' is not a field of a training recipe"),
        ("lora_alfa", 8, "did you mean 'lora_alpha'?"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object, words: str) -> None:
    with pytest.raises(TrainingError) as caught:
        Recipe.parse({field: value, "weight_decay": 0.0})
    assert words in caught.value.message
    assert caught.value.param == field


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(TrainingError) as caught:
        Recipe.parse({"r": -1, "colour": "red"})
    assert "r should be" in caught.value.message
    assert "'colour'" in caught.value.message
    assert caught.value.param is None


def test_auto_is_resolved_and_explained() -> None:
    recipe, why = resolve(Recipe.parse({}), base_of(), 1000)
    assert (recipe.n_epochs, recipe.batch_size, recipe.total_steps) == (2, 16, 126)
    assert (recipe.r, recipe.lora_alpha) == (16, 32.0)
    assert recipe.target_modules == ("k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert recipe.learning_rate == pytest.approx(5e-4)
    assert (recipe.max_seq_length, recipe.save_steps, recipe.eval_steps) == (2048, 63, 0)
    assert {"n_epochs", "batch_size", "learning_rate", "r", "max_seq_length", "seed"} <= set(why)
    assert "2000" in why["learning_rate"]


def test_what_was_given_is_kept_and_not_explained() -> None:
    given: dict[str, Any] = {"r": 4, "learning_rate": 1e-3, "learning_rate_multiplier": 2.0, "n_epochs": 3}
    recipe, why = resolve(Recipe.parse(given), base_of(), 10, validated=True)
    assert (recipe.r, recipe.lora_alpha, recipe.n_epochs) == (4, 8.0, 3)
    assert recipe.learning_rate == pytest.approx(2e-3)
    assert recipe.eval_steps == 3
    assert not set(given) & set(why)
    assert Recipe.parse(given | {"batch_size": "auto"}).given == set(given)


def test_steps_follow_accumulation_and_max_steps() -> None:
    fields = {"batch_size": 2, "gradient_accumulation_steps": 3, "n_epochs": 2}
    assert resolve(Recipe.parse(fields), base_of(), 13)[0].total_steps == 6  # 7 batches, 3 steps an epoch
    assert resolve(Recipe.parse(fields | {"max_steps": 4}), base_of(), 13)[0].total_steps == 4


@pytest.mark.parametrize("width", [64, 576, 4096, 16384])
def test_wider_bases_get_lower_rates(width: int) -> None:
    rate = resolve(Recipe(), base_of(width=width), 10)[0].learning_rate
    wider = resolve(Recipe(), base_of(width=2 * width), 10)[0].learning_rate
    assert 5e-5 < wider <= rate <= 2e-3
    assert width < 500 or wider < rate


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_small_optimizers_need_cuda(optimizer: str) -> None:
    with pytest.raises(TrainingError, match="needs a CUDA device") as caught:
        resolve(Recipe.parse({"optimizer": optimizer}), base_of(), 10)
    assert caught.value.param == "optimizer"
    assert (
        resolve(Recipe.parse({"optimizer": optimizer}), base_of(device="cuda"), 10)[0].optimizer == optimizer
    )


def test_eval_steps_need_something_to_validate_on() -> None:
    with pytest.raises(TrainingError, match="eval_steps needs a validation file") as caught:
        resolve(Recipe.parse({"eval_steps": 5}), base_of(), 10)
    assert caught.value.param == "eval_steps"


def test_rows_cannot_be_longer_than_the_context() -> None:
    with pytest.raises(
        TrainingError, match="max_seq_length 5000 is more than the base's context of 4096"
    ) as caught:
        sequence_length(Recipe.parse({"max_seq_length": 5000}), base_of())
    assert caught.value.param == "max_seq_length"


@pytest.mark.parametrize(
    ("choice", "leaves", "expected"),
    [
        ("attention-qv", LEAVES, ("q_proj", "v_proj")),
        ("attention", LEAVES, ("k_proj", "o_proj", "q_proj", "v_proj")),
        ("attention-qv", ("self_attn.qkv_proj", "mlp.down_proj"), ("qkv_proj",)),
        (["mlp.up_proj", "layers.1.self_attn.q_proj"], LEAVES, ("layers.1.self_attn.q_proj", "mlp.up_proj")),
    ],
)
def test_targets(choice: Any, leaves: tuple[str, ...], expected: tuple[str, ...]) -> None:
    recipe, _ = resolve(Recipe.parse({"target_modules": choice}), base_of(*leaves), 10)
    assert recipe.target_modules == expected


@pytest.mark.parametrize(
    ("choice", "leaves", "words"),
    [
        (["q_proj", "w1"], LEAVES, 'has no linear "w1"; it has k_proj, o_proj'),
        ("attention-qv", ("mixer.in_proj",), "list them, of in_proj"),
        ("attention", ("attention.dense", "mlp.dense"), "list them, of dense"),
    ],
)
def test_targets_the_base_lacks(choice: Any, leaves: tuple[str, ...], words: str) -> None:
    with pytest.raises(TrainingError, match=words) as caught:
        resolve(Recipe.parse({"target_modules": choice}), base_of(*leaves), 10)
    assert caught.value.param == "target_modules"


def test_schedules() -> None:
    linear = [learning_rate_factor(step, 4, "linear", 0.0) for step in range(4)]
    assert linear == [1.0, 0.75, 0.5, 0.25]
    cosine = [learning_rate_factor(step, 12, "cosine", 0.2) for step in range(12)]
    assert cosine[:3] == [0.25, 0.5, 0.75]
    assert cosine[3] == 1.0
    assert cosine[3:] == sorted(cosine[3:], reverse=True)
    assert math.isclose(cosine[-1], 0.5 * (1 + math.cos(math.pi * 8 / 9)))
    assert {learning_rate_factor(step, 5, "constant", 0.0) for step in range(5)} == {1.0}


def test_the_front_process_reads_recipes_and_data_without_torch() -> None:
    modules = ("batches", "context", "diagnoses", "recipe", "rows", "samples", "start", "targets")
    imports = "; ".join(f"import loramux_adapters.training.{module}" for module in modules)
    check = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0
