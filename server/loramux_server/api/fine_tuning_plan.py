"""What is said about a fine-tuning job that nobody has created yet."""

from __future__ import annotations

from typing import Any

import msgspec

from loramux_adapters.training.outlook import Outlook


class MemoryView(msgspec.Struct):
    """Bytes beside the resident base; `total` is the peak, in which the larger of the last two counts."""

    total: int
    adapter: int
    gradients: int
    optimizer: int
    layer_inputs: int
    layer_activations: int
    logits: int


class TurnView(msgspec.Struct):
    role: str
    content: str
    trained: bool


class PartView(msgspec.Struct):
    text: str
    trained: bool


class RowView(msgspec.Struct):
    """The first rows of the file: `turns` as written, `parts` as the tokenizer sees it; long ones are cut."""

    line: int
    tokens: int
    trained_tokens: int
    turns: list[TurnView]
    parts: list[PartView]


class FineTuningPlan(msgspec.Struct, tag_field="object", tag="fine_tuning.plan"):
    """`tokens` and `trained_tokens` are of one epoch, estimated unless `exact`; `why` explains what "auto" became."""

    rows: int
    validation_rows: int
    exact: bool
    tokens: int
    trained_tokens: int
    longest: int
    total_steps: int
    steps_per_epoch: int
    trainable_parameters: int
    memory: MemoryView
    hyperparameters: dict[str, Any]
    why: dict[str, str]
    warnings: list[str]
    preview: list[RowView]


def plan_view(found: Outlook) -> FineTuningPlan:
    memory = found.memory
    return FineTuningPlan(
        rows=found.rows,
        validation_rows=found.validation_rows,
        exact=found.exact,
        tokens=found.tokens,
        trained_tokens=found.trained_tokens,
        longest=found.longest,
        total_steps=found.recipe.total_steps,
        steps_per_epoch=found.recipe.steps_per_epoch,
        trainable_parameters=found.trainable_parameters,
        memory=MemoryView(
            memory.total,
            memory.adapter,
            memory.gradients,
            memory.optimizer,
            memory.layer_inputs,
            memory.layer_activations,
            memory.logits,
        ),
        hyperparameters={name: value for name, value in found.recipe.to_json().items() if name != "seed"},
        why=found.why,
        warnings=list(found.warnings),
        preview=[
            RowView(
                row.line,
                row.tokens,
                row.trained_tokens,
                [TurnView(turn.role, turn.content, turn.trained) for turn in row.turns],
                [PartView(part.text, part.trained) for part in row.parts],
            )
            for row in found.shown
        ],
    )
