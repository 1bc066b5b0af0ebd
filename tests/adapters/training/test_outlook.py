"""What a run would be, against what the run's own reading of the files says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from loramux_adapters.errors import TrainingError
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.training import outlook as module
from loramux_adapters.training.inputs import read_inputs
from loramux_adapters.training.memory import DecoderShape
from loramux_adapters.training.outlook import Outlook, outlook
from loramux_adapters.training.recipe import Recipe, TrainingBase
from tests.adapters.training.support import byte_tokenizer, chat, write_jsonl

DECODER = DecoderShape(hidden=32, intermediate=64, layers=2, vocabulary=320, query_width=32, kv_width=16)
LINEARS = {f"layers.{layer}.self_attn.{name}_proj": (32, 32) for layer in (0, 1) for name in "qv"}
BASE = TrainingBase(
    BaseGeometry("org/base", "id", LINEARS), hidden_size=32, context_length=4096, device="cpu"
)


def look(path: Path, **fields: object) -> Outlook:
    return outlook(BASE, byte_tokenizer(), Recipe.parse(fields), path, decoder=DECODER, dtype_bytes=4)


def conversations(count: int) -> list[dict[str, object]]:
    return [
        chat(f"Question {number}?" + " more" * (number % 7), "Answer." * (1 + number % 3))
        for number in range(count)
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_it_says_what_the_run_itself_finds(tmp_path: Path, packing: bool) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", conversations(40))
    recipe = Recipe.parse({"packing": packing, "r": 4, "batch_size": 2, "max_seq_length": 200})
    found = outlook(BASE, byte_tokenizer(), recipe, path, decoder=DECODER, dtype_bytes=4)
    run = read_inputs(BASE, byte_tokenizer(), recipe, path)
    assert found.exact
    assert (found.rows, found.tokens, found.trained_tokens) == (
        run.data.report.rows,
        run.data.report.tokens,
        run.data.report.trained_tokens,
    )
    assert (found.recipe, found.why, found.warnings) == (run.recipe, run.why, tuple(run.data.report.warnings))
    assert found.longest == run.longest_sample
    assert found.trainable_parameters == 4 * 4 * 64
    config = SimpleNamespace(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        vocab_size=320,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    assert found.memory == run.memory(config, BASE.geometry, 4, "cpu")


def test_a_long_file_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", conversations(300))
    monkeypatch.setattr(module, "TOKENIZED", 60)
    about = look(path)
    monkeypatch.setattr(module, "TOKENIZED", 1000)
    exact = look(path)
    assert (about.exact, exact.exact) == (False, True)
    assert about.rows == exact.rows == 300
    assert about.longest == exact.longest, "the longest rows are among those that are tokenized"
    assert about.memory == exact.memory
    assert about.recipe == exact.recipe
    assert about.tokens == pytest.approx(exact.tokens, rel=0.15)
    assert about.trained_tokens == pytest.approx(exact.trained_tokens, rel=0.25)


def test_rows_are_shown_with_what_is_learned(tmp_path: Path) -> None:
    rows = [chat("Hi", "Hello!", "And?", "Bye."), chat("One", "Two")]
    rows[0]["messages"][1]["weight"] = 0  # type: ignore[index]
    shown = look(write_jsonl(tmp_path / "train.jsonl", rows)).shown[0]
    assert [(turn.role, turn.content, turn.trained) for turn in shown.turns] == [
        ("user", "Hi", False),
        ("assistant", "Hello!", False),
        ("user", "And?", False),
        ("assistant", "Bye.", True),
    ]
    assert [part.text for part in shown.parts if part.trained] == ["Bye.<|im_end|>"]
    assert "".join(part.text for part in shown.parts).startswith("<|im_start|>user\nHi<|im_end|>")
    assert shown.trained_tokens == len("Bye.") + 1
    everything = look(tmp_path / "train.jsonl", train_on_inputs=True).shown[0]
    assert all(turn.trained for turn in everything.turns)


def test_other_kinds_of_rows(tmp_path: Path) -> None:
    pair = look(write_jsonl(tmp_path / "pair.jsonl", [{"prompt": "2+2=", "completion": "4"}])).shown[0]
    assert [(turn.role, turn.trained) for turn in pair.turns] == [("prompt", False), ("completion", True)]
    text = look(write_jsonl(tmp_path / "text.jsonl", [{"text": "Anything."}])).shown[0]
    assert [(turn.role, turn.content, turn.trained) for turn in text.turns] == [("text", "Anything.", True)]


def test_faults_are_those_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 1}\n')
    with pytest.raises(TrainingError) as planned:
        look(path)
    with pytest.raises(TrainingError) as run:
        read_inputs(BASE, byte_tokenizer(), Recipe(), path)
    assert planned.value.message == run.value.message
    assert "Line 2" in planned.value.message
