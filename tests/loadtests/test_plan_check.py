"""The planned memory of a QLoRA training against what one allocates, by either of the two terms that may be the largest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from loadtests import BenchError
from loadtests.plan_check import GOAL, Case, check, show
from loramux_adapters.planning.model import read_model
from loramux_adapters.planning.training import method_memory, training_options
from tests.adapters.training.support import byte_tokenizer


def write_model(directory: Path, vocabulary: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=vocabulary, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("vocabulary", "length", "largest"), [(8192, 128, "logits"), (320, 512, "layer_activations")]
)
def test_planned_is_measured(
    vocabulary: int,
    length: int,
    largest: str,
    dtype: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = write_model(tmp_path / "model", vocabulary)
    case = Case(str(model), device="cpu", dtype=dtype, max_seq_length=length, batch_size=2, r=8)
    shape = read_model(str(model), "small")
    item = 4 if dtype == "float32" else 2
    memory = method_memory(shape, training_options(shape, case.recipe(), "cpu"), "qlora", "cpu", item)
    assert max(memory.layer_activations, memory.logits) == getattr(memory, largest)
    found = check(case)
    assert found.planned_weights == found.measured.weights
    assert found.planned_training == memory.beside_weights
    assert abs(found.ratio - 1) <= GOAL
    show([found])
    assert f"2 x {length}" in capsys.readouterr().out


def test_a_model_that_cannot_be_measured_is_said(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="64 tokens failed"):
        check(Case(str(tmp_path), device="cpu", dtype="float32", max_seq_length=64, batch_size=1, r=8))
