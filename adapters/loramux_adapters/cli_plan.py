"""`loramux plan`: the words of the command line. The flags are called as those of `loramux train` and `loramux serve`.

Exit codes: 0 planned (whether or not it fits), 1 refused, 2 wrong usage. Standard output carries the plan (with --json one
JSON object), standard error errors. Nothing heavy is imported until the command runs. Does not know where the demo
model comes from, nor in which type a base on this machine's CPU computes: the caller says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from loramux_adapters.cli_errors import exit_codes
from loramux_adapters.errors import ConfigError
from loramux_adapters.planning.serving import ServingOptions
from loramux_adapters.planning.weights import Device, Quantization
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.targets import targets_of_text

if TYPE_CHECKING:
    from loramux_adapters.planning.plan import Plan

_SERVE = ServingOptions()
_DEVICES: tuple[Device, ...] = ("cuda", "cpu")
_QUANTIZATIONS: tuple[Quantization, ...] = ("nf4", "none")
_DTYPES = ("bfloat16", "float16", "float32")
_Word = TypeVar("_Word", bound=str)


def register(app: typer.Typer, demo: Callable[[], tuple[Path, str]], cpu_dtype: Callable[[], str]) -> None:
    """Add `plan` to an app.

    `demo` gives the directory of the embedded model and its name, `cpu_dtype` what `--dtype auto` is on this CPU.
    """
    app.command("plan")(plan_command(demo, cpu_dtype))


def plan_command(demo: Callable[[], tuple[Path, str]], cpu_dtype: Callable[[], str]) -> Callable[..., None]:
    """The command function, with typer's annotations."""

    def plan(
        model: Annotated[str, typer.Option(help="Base model: a directory, a hub id, or demo. Only its config is read.")],
        revision: Annotated[str | None, typer.Option(help="Hub revision of the base.")] = None,
        device: Annotated[str, typer.Option(help="cuda, or cpu: what it takes without compiled kernels.")] = "cuda",
        dtype: Annotated[str, typer.Option(help="Compute type: auto, bfloat16, float16 or float32.")] = "auto",
        r: Annotated[int | None, typer.Option(help="Rank of the adapter.", show_default="16")] = None,
        target_modules: Annotated[
            str | None,
            typer.Option(help="all-linear, attention, attention-qv, or names of linears.", show_default="all-linear"),
        ] = None,
        max_seq_length: Annotated[
            int | None, typer.Option(help="Tokens of a row.", show_default="2048, or the model's context")
        ] = None,
        batch_size: Annotated[int, typer.Option(help="Rows in one forward pass.")] = 1,
        packing: Annotated[bool, typer.Option("--packing", help="Rows are filled to max_seq_length.")] = False,
        optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit or paged_adamw_8bit.")] = "adamw",
        lora_dropout: Annotated[float, typer.Option(help="Any dropout costs masks.")] = 0.0,
        quantization: Annotated[str, typer.Option(help="How the server holds the base: nf4 or none.")] = "nf4",
        max_loras: Annotated[int, typer.Option(min=1, help="Adapters resident at once.")] = _SERVE.max_loras,
        max_lora_rank: Annotated[int, typer.Option(min=1, help="Largest adapter rank.")] = _SERVE.max_lora_rank,
        max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = _SERVE.max_num_seqs,
        max_model_len: Annotated[
            int | None, typer.Option(min=32, help="Longest prompt plus answer.", show_default="the model's")
        ] = None,
        gpu_memory: Annotated[
            str | None, typer.Option(help="Say what fits and what would make it fit, such as 24GB or 80GiB.")
        ] = None,
        gpu_memory_utilization: Annotated[
            float, typer.Option(min=0.1, max=0.99, help="Share of the GPU's memory that the server uses.")
        ] = _SERVE.gpu_memory_utilization,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    ) -> None:  # fmt: skip
        """Print what training and serving a model take in memory, from its config alone."""
        with exit_codes(as_json):
            fields: dict[str, object] = {
                "r": r,
                "target_modules": None if target_modules is None else targets_of_text(target_modules),
                "max_seq_length": max_seq_length,
                "batch_size": batch_size,
                "packing": packing,
                "optimizer": optimizer,
                "lora_dropout": lora_dropout,
            }
            serving = ServingOptions(
                max_loras=max_loras,
                max_lora_rank=max_lora_rank,
                max_num_seqs=max_num_seqs,
                gpu_memory_utilization=gpu_memory_utilization,
                quantization=_one_of("quantization", quantization, _QUANTIZATIONS),
            )
            # What can be wrong without the model is said before it is looked for.
            recipe = Recipe.parse({name: value for name, value in fields.items() if value is not None})
            on, type_ = _place(device, dtype, cpu_dtype)
            made = _plan(model, revision, on, type_, recipe, serving, max_model_len, _bytes(gpu_memory), demo)
            _print(made, as_json=as_json)

    return plan


def _plan(
    model: str, revision: str | None, device: Device, dtype: str, recipe: Recipe, serving: ServingOptions,
    max_model_len: int | None, memory: int | None, demo: Callable[[], tuple[Path, str]],
) -> Plan:  # fmt: skip
    from loramux_adapters.planning.model import read_model
    from loramux_adapters.planning.plan import make_plan

    source, name = demo() if model == "demo" else (model, model.rstrip("/"))
    return make_plan(
        read_model(str(source), name, revision=revision),
        recipe,
        serving,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        memory=memory,
    )


def _place(device: str, dtype: str, cpu_dtype: Callable[[], str]) -> tuple[Device, str]:
    """Where it computes and in which type."""
    on, named = _one_of("device", device, _DEVICES), _one_of("dtype", dtype, ("auto", *_DTYPES))
    if named != "auto":
        return on, named
    return on, cpu_dtype() if on == "cpu" else "bfloat16"


def _one_of(flag: str, given: str, known: tuple[_Word, ...]) -> _Word:
    for word in known:
        if word == given:
            return word
    raise ConfigError(f"--{flag} {given}: choose {', '.join(known[:-1])} or {known[-1]}", param=flag)


def _bytes(given: str | None) -> int | None:
    if given is None:
        return None
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = TypeAdapter(ByteSize).validate_python(given)
    except ValidationError:
        size = None
    if not size or size < 10**6:  # a bare 24 would be bytes
        raise ConfigError(
            f"--gpu-memory {given}: give a size with its unit, such as 24GB or 80GiB", param="gpu_memory"
        )
    return int(size)


def _print(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plan.to_json(), indent=2, allow_nan=False))
        return
    from loramux_adapters.planning.text import plan_lines

    for line in plan_lines(plan):
        typer.echo(line)
