"""Tiny bases of every family with a tokenizer, and PEFT adapters on them, made once a test session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 320
WIDTH = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON, rope_theta=50000.0, tie_word_embeddings=True),  # type: ignore[call-arg]
    "mistral": lambda: transformers.MistralConfig(**_COMMON, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**_COMMON, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON, head_dim=16, tie_word_embeddings=False),
    "gemma2": lambda: transformers.Gemma2Config(
        **_COMMON, head_dim=16, query_pre_attn_scalar=16, sliding_window=128, final_logit_softcapping=None
    ),
    "phi3": lambda: transformers.Phi3Config(**_COMMON, tie_word_embeddings=False),
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of 258 tokens, saved by transformers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {symbol: index for index, symbol in enumerate(alphabet, 2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(directory)


def make_base(
    directory: Path, family: str, *, shard: str = "50GB", dtype: torch.dtype = torch.bfloat16
) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    _give_winners(model, family)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    write_tokenizer(directory)
    (directory / "LICENSE").write_text("Do what you like.\n")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    return directory


def _give_winners(model: Any, family: str) -> None:
    """Random logits are full of near ties. Here every token mostly predicts itself, with a probability near one half."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
        # Gemma multiplies embeddings by sqrt(width), its norms by 1 + weight, and norms what each layer adds.
        embedding.normal_(std=1.0 if family != "gemma2" else 4 * WIDTH**-0.5)
        head.copy_(embedding)
        norm = 0.1 if family != "gemma2" else 0.2 - 1.0
        model.model.norm.weight.fill_(norm)


@dataclass(frozen=True)
class Recipe:
    """How to make an adapter: PEFT's config and the size of B (A keeps PEFT's initialisation)."""

    config: dict[str, Any] = field(default_factory=dict)
    size: float = 0.02
    seed: int = 1


def make_adapter(directory: Path, base: Path, recipe: Recipe) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(recipe.seed)
    config = {"target_modules": target_names(model), "r": 8, "lora_alpha": 16} | recipe.config
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=recipe.size)
    peft_model.save_pretrained(directory)
    return directory


def target_names(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
    )


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name -> directory, made on first use. Read only."""
    root = tmp_path_factory.mktemp("bases")

    def base(family: str) -> Path:
        directory = root / family
        return directory if directory.exists() else make_base(directory, family)

    return base


@pytest.fixture(scope="session")
def adapter(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter on the tiny Llama. Read only."""
    return make_adapter(tmp_path_factory.mktemp("adapters") / "plain", bases("llama"), Recipe())


@pytest.fixture
def base_copy(bases: Callable[[str], Path], tmp_path: Path) -> Path:
    """The tiny Llama in a directory of this test's own, to be damaged."""
    return Path(shutil.copytree(bases("llama"), tmp_path / "base"))


@pytest.fixture
def stamp(adapter: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the plain adapter that says it was trained on the base of that identity."""

    def stamped(identity: str) -> Path:
        copy = Path(shutil.copytree(adapter, tmp_path / "stamped"))
        path = copy / "adapter_config.json"
        config = json.loads(path.read_text()) | {"loramux_base_identity": identity}
        path.write_text(json.dumps(config))
        return copy

    return stamped
