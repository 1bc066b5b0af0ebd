"""The recipe of the demo adapters, on a model of two tiny layers: what it learns from and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loramux_adapters.demo import train as recipe
from loramux_adapters.demo.train import IGNORED, Recipe, encode, load_rounded, train

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "arr"},
    {"role": "user", "content": "yo"},
    {"role": "assistant", "content": "aye"},
]


class ByteTokenizer:
    """ChatML over bytes, with `>` as the end of a turn."""

    pad_token_id = 0

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool = False
    ) -> str:
        text = "".join(f"<{message['role']}:{message['content']}>\n" for message in messages)
        return text + "<assistant:" * add_generation_prompt

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        return type("Encoding", (), {"input_ids": list(text.encode())})


def test_only_what_the_assistant_says_is_learned() -> None:
    example = encode(ByteTokenizer(), CHAT)
    assert bytes(example.ids).decode() == "<user:hi>\n<assistant:arr>\n<user:yo>\n<assistant:aye>"
    learned = bytes(label if label != IGNORED else ord("_") for label in example.labels).decode()
    assert learned.replace("_", " ").split() == ["arr>", "aye>"]


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_linears_are_rounded_and_nothing_else(tiny_model: Path) -> None:
    before = LlamaForCausalLM.from_pretrained(tiny_model).state_dict()
    after = load_rounded(tiny_model).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    for name in changed:
        assert after[name].view(-1, 64)[0].unique().numel() <= 16


# PEFT asks transformers by a name that is about to go.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_short_run_writes_a_peft_directory(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _directory: ByteTokenizer())
    monkeypatch.setattr(recipe, "build", lambda _name: [{"messages": CHAT}] * 6)
    train("pirate", tiny_model, tmp_path / "out", Recipe(epochs=3, batch_size=2))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, recipe.TARGETS)
    assert len(tensors) == 2 * 7 * 2
    learned = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert all(tensor.dtype == torch.bfloat16 and tensor.any() for tensor in learned)
