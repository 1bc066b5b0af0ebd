"""`loramux`: the command line. Each command imports what it needs when it runs, so that --help is immediate.

Errors are one sentence on standard error and exit code 1; wrong usage is exit code 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from loramux_adapters import cli_export, cli_plan, cli_train, cli_verify
from loramux_server.cli_adapters import adapters_app
from loramux_server.cli_doctor import doctor
from loramux_server.cli_jobs import jobs_app

app = typer.Typer(
    name="loramux",
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

    from loramux_server.base.demo import DEMO_MODEL_ID, ensure_demo_model
    from loramux_server.base.loading import LoadOptions, load_base

    is_demo = model == "demo"
    source = str(ensure_demo_model()) if is_demo else model
    name = DEMO_MODEL_ID if is_demo else model.rstrip("/")
    base = load_base(
        LoadOptions(model=source, name=name, device=device, dtype=dtype, quantization=quantization)
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError):
        tokenizer = None
    return cli_verify.VerifyBase(base.model, base.geometry, tokenizer)


def _demo_model() -> tuple[Path, str]:
    from loramux_server.base.demo import DEMO_MODEL_ID, ensure_demo_model

    return ensure_demo_model(), DEMO_MODEL_ID


cli_verify.register(app, _base_to_verify)
cli_train.register(app, _base_to_verify)
cli_plan.register(app, _demo_model)
cli_export.register(app, _demo_model)
app.command()(doctor)
app.add_typer(adapters_app, name="adapters")
app.add_typer(jobs_app, name="jobs")


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
