"""What a user may ask of a fine-tuning run, and what "auto" becomes.

`Recipe.parse` takes the fields as JSON gave them, under OpenAI's and PEFT's names, and refuses every unknown field and
every value out of range by name. `resolve` replaces "auto" by numbers and says why, so that a report can show it.
Nothing is read, loaded or trained here. No torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loramux_adapters.config_fields import shown
from loramux_adapters.errors import TrainingError
from loramux_adapters.spec import MAX_ALPHA, MAX_RANK, BaseGeometry
from loramux_adapters.training.targets import resolve_targets

Auto = Literal["auto"]
Preset = Literal["attention-qv", "attention", "all-linear"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
Scheduler = Literal["constant", "linear", "cosine"]

LONGEST_AUTO = 2048  # tokens; what fits beside a served 7B base on 24 GB
DEFAULT_SEED = 42
MAX_EPOCHS = 50
MAX_BATCH = 256
SAMPLES_WANTED = 2000  # "auto" epochs show the model about so many rows
STEPS_WANTED = 100  # "auto" batches leave at least so many optimizer steps

Count = Annotated[int, Field(ge=1, le=10_000_000)]


class Recipe(BaseModel):
    """The fields of `method.supervised.hyperparameters`, and those that LoRA users need besides."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    n_epochs: Auto | Annotated[int, Field(ge=1, le=MAX_EPOCHS)] = Field(
        "auto", description="Passes over the data, 1 to 50."
    )
    batch_size: Auto | Annotated[int, Field(ge=1, le=MAX_BATCH)] = Field(
        "auto", description="Rows in one forward pass, 1 to 256; packed rows count as one."
    )
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = Field(
        "auto", description="Scales the learning rate."
    )
    r: Auto | Annotated[int, Field(ge=1, le=MAX_RANK)] = Field("auto", description="Rank of the adapter.")
    lora_alpha: Auto | Annotated[float, Field(gt=0, le=MAX_ALPHA)] = Field(
        "auto", description="The update is scaled by lora_alpha / r."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of each adapted linear's inputs that its adapter does not see."
    )
    target_modules: Auto | Preset | Annotated[list[str], Field(min_length=1)] = Field(
        "auto", description="all-linear, attention, attention-qv, or names of linears."
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead.")
    learning_rate: Auto | Annotated[float, Field(gt=0, le=1)] = Field(
        "auto", description="Peak learning rate."
    )
    lr_scheduler: Scheduler = Field("cosine", description="constant, linear or cosine.")
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="Share of the steps in which the learning rate rises."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="Of AdamW.")
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] = Field(
        1, description="Batches whose gradients make one optimizer step."
    )
    max_seq_length: Auto | Annotated[int, Field(ge=8)] = Field(
        "auto", description="Tokens of a row; what is longer is cut."
    )
    packing: bool = Field(False, description="Put several short rows where one of max_seq_length fits.")
    optimizer: Optimizer = Field("adamw", description="adamw, adamw_8bit or paged_adamw_8bit.")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Clip the gradient to this norm; 0 is off."
    )
    max_steps: Count | None = Field(None, description="Stop after so many optimizer steps.")
    eval_steps: Auto | Count = Field("auto", description="Validate every so many steps.")
    save_steps: Auto | Count = Field("auto", description="Write a checkpoint every so many steps.")
    seed: Auto | Annotated[int, Field(ge=0, lt=2**31)] = Field(
        "auto", description="Of initial weights, order of rows and dropout."
    )
    init_from: str | None = Field(None, description="An adapter to go on training instead of a new one.")
    train_on_inputs: bool = Field(False, description="Train on every token, not only on the assistant's.")

    @classmethod
    def parse(cls, fields: Mapping[str, object]) -> Recipe:
        """Raises TrainingError with every fault; `param` is the field when it is one."""
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            faults = _faults(error, fields)
            param = next(iter(faults)) if len(faults) == 1 else None
            raise TrainingError("; ".join(faults.values()), param=param) from None

    @property
    def given(self) -> frozenset[str]:
        """The fields the user set to something other than "auto"."""
        return frozenset(name for name in self.model_fields_set if getattr(self, name) != "auto")


@dataclass(frozen=True, slots=True)
class TrainingBase:
    """What a recipe must know of the base. `device` is a torch device type."""

    geometry: BaseGeometry
    hidden_size: int
    context_length: int
    device: str


@dataclass(frozen=True, slots=True)
class ResolvedRecipe:
    """A recipe without "auto"; equal ones on equal data and base train the same adapter."""

    n_epochs: int
    batch_size: int
    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...]
    use_rslora: bool
    learning_rate: float
    lr_scheduler: Scheduler
    warmup_ratio: float
    weight_decay: float
    gradient_accumulation_steps: int
    max_seq_length: int
    packing: bool
    optimizer: Optimizer
    max_grad_norm: float
    eval_steps: int
    save_steps: int
    seed: int
    init_from: str | None
    train_on_inputs: bool
    steps_per_epoch: int
    total_steps: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "target_modules": list(self.target_modules)}


def _faults(error: ValidationError, fields: Mapping[str, object]) -> dict[str, str]:
    """One sentence a field; the branches of a union are joined."""
    wanted: dict[str, list[str]] = {}
    unknown: set[str] = set()
    for item in error.errors():
        name = str(item["loc"][0])
        if item["type"] == "extra_forbidden":
            unknown.add(name)
        text = item["msg"].removeprefix("Input should be ").removeprefix("a valid ")
        if text not in wanted.setdefault(name, []):
            wanted[name].append(text)
    faults = {}
    for name, texts in wanted.items():
        if name in unknown:
            close = difflib.get_close_matches(name, Recipe.model_fields, n=1)
            hint = f", did you mean '{close[0]}'?" if close else ""
            faults[name] = f"'{name[:64]}' is not a field of a training recipe{hint}"
        else:
            faults[name] = f"{name} should be {' or '.join(texts)}, not {shown(fields[name])}"
    return faults


def sequence_length(recipe: Recipe, base: TrainingBase) -> int:
    """`max_seq_length` for this base. Raises TrainingError beyond the base's context."""
    if recipe.max_seq_length == "auto":
        return min(LONGEST_AUTO, base.context_length)
    if recipe.max_seq_length > base.context_length:
        raise TrainingError(
            f"max_seq_length {recipe.max_seq_length} is more than the base's context of {base.context_length} tokens",
            param="max_seq_length",
        )
    return recipe.max_seq_length


def check_device(recipe: Recipe, base: TrainingBase) -> None:
    """Raises TrainingError for an optimizer that exists on CUDA only."""
    if recipe.optimizer != "adamw" and base.device != "cuda":
        raise TrainingError(
            f"optimizer {recipe.optimizer} needs a CUDA device and the base is on the {base.device}: use adamw",
            param="optimizer",
        )


def _check_possible(recipe: Recipe, base: TrainingBase, validated: bool) -> None:
    check_device(recipe, base)
    if "eval_steps" in recipe.given and not validated:
        raise TrainingError("eval_steps needs a validation file", param="eval_steps")


def _chosen(recipe: Recipe, why: dict[str, str], name: str, value: Any, reason: str) -> Any:
    """What was given, or else `value`; then `why` has the reason."""
    given = getattr(recipe, name)
    if given != "auto":
        return given
    why[name] = reason
    return value


def resolve(
    recipe: Recipe, base: TrainingBase, units: int, *, validated: bool = False
) -> tuple[ResolvedRecipe, dict[str, str]]:
    """The recipe in numbers, and for each field that was "auto" why it is what it is.

    `units` is what a batch counts: rows, or packed rows. Without a validation set (`validated`) eval_steps is 0.
    """
    _check_possible(recipe, base, validated)
    why: dict[str, str] = {}
    auto = partial(_chosen, recipe, why)
    epochs = min(4, math.ceil(SAMPLES_WANTED / units))
    n_epochs = auto("n_epochs", epochs, f"{units} rows, about {SAMPLES_WANTED} wanted, 4 epochs at most")
    per_step = n_epochs * units / STEPS_WANTED / recipe.gradient_accumulation_steps
    batch = min(16, 2 ** int(math.log2(max(1.0, per_step))))
    batch_size = auto("batch_size", batch, f"so that there are about {STEPS_WANTED} steps, 16 at most")
    batches = math.ceil(units / batch_size)
    steps_per_epoch = math.ceil(batches / recipe.gradient_accumulation_steps)
    total = n_epochs * steps_per_epoch
    if recipe.max_steps is not None:
        total = min(total, recipe.max_steps)
    r = auto("r", 16, "enough for thousands of rows")
    targets = auto("target_modules", "all-linear", "adapters of attention alone learn less")
    rate = auto("learning_rate", _auto_rate(base.hidden_size), f"from the base's width {base.hidden_size}")
    multiplier = auto("learning_rate_multiplier", 1.0, "the learning rate as it is")
    length = sequence_length(recipe, base)
    shorter = f"{LONGEST_AUTO}, or the base's context of {base.context_length} if it is shorter"
    eval_steps = auto("eval_steps", max(1, total // 10), "ten times a run") if validated else 0
    resolved = ResolvedRecipe(
        n_epochs=n_epochs,
        batch_size=batch_size,
        r=r,
        lora_alpha=float(auto("lora_alpha", 2 * r, "twice r")),
        lora_dropout=recipe.lora_dropout,
        target_modules=resolve_targets(targets, base.geometry),
        use_rslora=recipe.use_rslora,
        learning_rate=rate * multiplier,
        lr_scheduler=recipe.lr_scheduler,
        warmup_ratio=recipe.warmup_ratio,
        weight_decay=recipe.weight_decay,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        max_seq_length=auto("max_seq_length", length, shorter),
        packing=recipe.packing,
        optimizer=recipe.optimizer,
        max_grad_norm=recipe.max_grad_norm,
        eval_steps=eval_steps,
        save_steps=auto("save_steps", steps_per_epoch, "after each epoch"),
        seed=auto("seed", DEFAULT_SEED, "the default"),
        init_from=recipe.init_from,
        train_on_inputs=recipe.train_on_inputs,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
    )
    return resolved, why


def _auto_rate(width: int) -> float:
    """LoRA likes ten times the rate of full fine-tuning, nearly whatever the rank; wide models like less.

    5e-5 * 10 * (2000 / width) ** 0.78, the fit published for Llama by Thinking Machines (tinker-cookbook).
    """
    return float(f"{min(2e-3, 5e-4 * (2000 / width) ** 0.78):.2g}")


def learning_rate_factor(step: int, total: int, scheduler: Scheduler, warmup_ratio: float) -> float:
    """What the peak rate is multiplied by in step 0, 1, ..., total - 1; without warm-up as in transformers.

    The warm-up rises from 1 / (steps + 1): its first step trains too.
    """
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    if scheduler == "linear":
        return 1.0 - progress
    if scheduler == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
