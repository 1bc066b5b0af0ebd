"""`loramux`: the command line. Each command imports what it needs when it runs, so that --help is immediate.

Errors are one sentence on standard error and exit code 1; wrong usage is exit code 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux_server.lazy_commands import LazyCommands, later

if TYPE_CHECKING:
    from loramux_adapters import cli_verify

app = typer.Typer(
    name="loramux",
    cls=LazyCommands,
    help="Many LoRA adapters on one resident NF4 base model: serve, train, export.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command(
    add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def serve(context: typer.Context) -> None:
    """Serve a base model and its adapters. See loramux serve --help."""
    from loramux_server.config import read_config

    config = read_config(context.args)
    from loramux_server.serve import run

    run(config)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    models: Annotated[list[str], typer.Argument(help="Base or adapter names; all are asked at once.")],
    url: Annotated[str, typer.Option(help="Address of a running server.")] = "http://127.0.0.1:8000",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 80,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.0,
) -> None:
    """Ask several adapters of a running server the same question and print their answers."""
    from loramux_server.ask import ask_models

    for model, answer in ask_models(url, question, models, max_tokens=max_tokens, temperature=temperature):
        typer.echo(f"[{model}] {answer}")


def _base_to_verify(
    model: str, device: str, dtype: str, quantization: cli_verify.Quantization = "nf4"
) -> cli_verify.VerifyBase:
    """The base as the server would hold it; without a tokenizer it is compared on fixed token ids."""
    from transformers import AutoTokenizer

    from loramux_adapters.cli_verify import VerifyBase
    from loramux_server.base.demo import DEMO_MODEL_ID, default_cache_dir, ensure_demo_model
    from loramux_server.base.loading import LoadOptions, load_base

    is_demo = model == "demo"
    source = str(ensure_demo_model()) if is_demo else model
    name = DEMO_MODEL_ID if is_demo else model.rstrip("/")
    base = load_base(
        LoadOptions(
            model=source,
            name=name,
            device=device,
            dtype=dtype,
            quantization=quantization,
            cpu_kernels=default_cache_dir().absolute() / "kernels",
        )
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError):
        tokenizer = None
    return VerifyBase(base.model, base.geometry, tokenizer)


def _demo_model() -> tuple[Path, str]:
    from loramux_server.base.demo import DEMO_MODEL_ID, ensure_demo_model

    return ensure_demo_model(), DEMO_MODEL_ID


def _cpu_dtype() -> str:
    """What `--dtype auto` is when a base is loaded on this machine's CPU."""
    import torch

    from loramux_adapters.native.library import load_native
    from loramux_server.base.demo import default_cache_dir
    from loramux_server.base.device import pick_dtype

    native = load_native(default_cache_dir().absolute() / "kernels")
    dtype = pick_dtype("auto", torch.device("cpu"), native.products if native else None)
    return str(dtype).removeprefix("torch.")


def _verify(to: typer.Typer) -> None:
    from loramux_adapters import cli_verify

    cli_verify.register(to, _base_to_verify)


def _train(to: typer.Typer) -> None:
    from loramux_adapters import cli_train

    cli_train.register(to, _base_to_verify)


def _plan(to: typer.Typer) -> None:
    from loramux_adapters import cli_plan

    cli_plan.register(to, _demo_model, _cpu_dtype)


def _export(to: typer.Typer) -> None:
    from loramux_adapters import cli_export

    cli_export.register(to, _demo_model)


def _doctor(to: typer.Typer) -> None:
    from loramux_server.cli_doctor import doctor

    to.command("doctor")(doctor)


def _adapters(to: typer.Typer) -> None:
    from loramux_server.cli_adapters import adapters_app

    to.add_typer(adapters_app, name="adapters")


def _keys(to: typer.Typer) -> None:
    from loramux_server.cli_keys import keys_app

    to.add_typer(keys_app, name="keys")


def _jobs(to: typer.Typer) -> None:
    from loramux_server.cli_jobs import jobs_app

    to.add_typer(jobs_app, name="jobs")


later(
    app, "verify", "Check that an adapter changes its base, and computes what PEFT computes with it.", _verify
)
later(app, "train", "Train an adapter on a base as it is served, and write it as PEFT reads it.", _train)
later(app, "plan", "Print what training and serving a model take in memory, from its config alone.", _plan)
later(
    app,
    "export",
    "Merge adapters into their base: a checkpoint that is checked to be the model that was served.",
    _export,
)
later(
    app,
    "merge",
    "Merge adapters into their base: a checkpoint that is checked to be the model that was served.",
    _export,
    hidden=True,
)
later(
    app,
    "doctor",
    "Look for what would keep a server from running here; each fault comes with advice.",
    _doctor,
)
later(app, "adapters", "List, add, change and remove the adapters of a running server.", _adapters)
later(app, "keys", "Make, list and revoke the keys of a server.", _keys)
later(app, "jobs", "Start, list, watch and end the fine-tuning jobs of a running server.", _jobs)


@app.command()
def version() -> None:
    """Print the version."""
    from loramux_adapters import __version__

    typer.echo(f"loramux {__version__}")


def main() -> None:
    """Entry point of the `loramux` command."""
    from loramux_adapters.errors import LoramuxError

    try:
        app()
    except LoramuxError as error:
        typer.echo(f"loramux: {error.message}", err=True)
        sys.exit(1)
