"""`loramux plan`: flags, the printed tables, refusals in one sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from loramux_adapters.cli_plan import register
from loramux_adapters.training.recipe import Recipe

MODELS = Path(__file__).parent / "models"
MISTRAL = str(MODELS / "mistral-7b")
DOCS = Path(__file__).parents[3] / "docs"


def run(*arguments: str) -> Result:
    app = typer.Typer()
    register(app, lambda: (MODELS / "llama-2-7b", "embedded"), lambda: "float32")
    app.command("other")(lambda: None)  # one command alone would lose its name
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})


def test_tables_for_a_model_of_which_only_the_config_exists() -> None:
    result = run("--model", MISTRAL, "--gpu-memory", "24GB", "--max-model-len", "8192", "--batch-size", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        f"{MISTRAL}: MistralForCausalLM, 7.24 B parameters, 32 layers, bfloat16 on cuda"
    )
    for words in (
        "QLoRA",
        "layer inputs",
        "logits of a chunk",
        "131,072 bytes each",
        "batches of 2 x 2048",
        "fits",
    ):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "cpu"], "float32 on cpu"),
        (["--device", "cpu", "--dtype", "bfloat16"], "bfloat16 on cpu"),
        (["--device", "cuda"], "bfloat16 on cuda"),
    ],
)
def test_auto_is_what_the_caller_says_of_the_cpu(flags: list[str], said: str) -> None:
    assert said in run("--model", MISTRAL, *flags).stdout


def test_json_has_the_figures() -> None:
    told = json.loads(
        run("--model", MISTRAL, "--json", "--r", "4", "--target-modules", "q_proj, v_proj").stdout
    )
    assert told["training"]["target_modules"] == ["q_proj", "v_proj"]
    assert told["training"]["methods"]["qlora"]["trainable"] == 4 * 32 * (2 * 4096 + 4096 + 1024)
    assert told["serving"]["memory"]["kv_per_token"] == 131072
    assert told["fit"] is None


def test_flags_are_called_as_when_training() -> None:
    shown = run("--help").stdout
    for name in (
        "r",
        "target_modules",
        "max_seq_length",
        "batch_size",
        "packing",
        "optimizer",
        "lora_dropout",
    ):
        assert name in Recipe.model_fields
        assert f"--{name.replace('_', '-')} " in shown


def test_the_embedded_model_has_its_name() -> None:
    assert run("--model", "demo").stdout.startswith("embedded: LlamaForCausalLM")


def test_float32_is_said() -> None:
    assert "LoRA 32-bit" in run("--model", MISTRAL, "--dtype", "float32", "--device", "cpu").stdout


@pytest.mark.parametrize(
    ("arguments", "param", "words"),
    [
        (["--target-modules", "w9"], "target_modules", "no linear"),
        (["--r", "0"], "r", "r should be"),
        (["--optimizer", "sgd"], "optimizer", "optimizer should be"),
        (["--max-seq-length", "40000"], "max_seq_length", "context of 32768"),
        (["--max-model-len", "40000"], "max_model_len", "32768 positions"),
        (["--gpu-memory", "24"], "gpu_memory", "such as 24GB"),
        (["--gpu-memory", "much"], "gpu_memory", "such as 24GB"),
        (["--gpu-memory", "24GB", "--device", "cpu"], "gpu_memory", "of a GPU"),
        (["--device", "tpu"], "device", "choose cuda or cpu"),
        (["--dtype", "int8"], "dtype", "choose auto, bfloat16"),
        (["--quantization", "gptq"], "quantization", "choose nf4 or none"),
        (["--model", "/nowhere"], "model", "does not exist"),
        (["--model", str(MODELS)], "model", "holds no config.json"),
    ],
)
def test_refusals_are_one_sentence(arguments: list[str], param: str, words: str) -> None:
    spoken = run("--model", MISTRAL, *arguments)
    assert spoken.exit_code == 1
    assert spoken.stdout == ""
    assert spoken.stderr.startswith("loramux: ")
    assert spoken.stderr.count("\n") == 1
    assert words in spoken.stderr
    error = json.loads(run("--model", MISTRAL, *arguments, "--json").stdout)["error"]
    assert error["param"] == param


def test_the_table_of_the_documentation_is_what_is_printed() -> None:
    """The command and its output as docs/training.md shows them."""
    text = (DOCS / "training.md").read_text()
    block = re.search(r"```\n\$ loramux (plan [^\n]*)\n(.*?)```", text, re.DOTALL)
    assert block is not None
    arguments = block[1].replace("mistralai/Mistral-7B-v0.1", MISTRAL).split()[1:]
    shown = run(*arguments).stdout.replace(MISTRAL, "mistralai/Mistral-7B-v0.1")
    assert shown == block[2]


def test_the_arithmetic_needs_no_torch() -> None:
    modules = ["shape", "weights", "serving", "training", "fit", "plan", "text"]
    imports = "; ".join(f"import loramux_adapters.planning.{module}" for module in modules)
    check = f"import sys; {imports}; import loramux_adapters.cli_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0
