"""A byte tokenizer with a chat template, small enough for the tiny models, and training files for it."""

from __future__ import annotations

import json
from array import array
from collections.abc import Generator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loramux_adapters.spec import AdapterSpec
from loramux_adapters.training.batches import Batches
from loramux_adapters.training.layerwise import LayerStack
from loramux_adapters.training.lora import TrainedAdapter
from loramux_adapters.training.recipe import Recipe, ResolvedRecipe, TrainingBase, resolve
from loramux_adapters.training.samples import Sample
from loramux_adapters.training.trainer import Trainer
from loramux_adapters.twin import twin_of
from loramux_server.base.loading import LoadOptions, ResidentBase, load_base

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML) -> Any:
    """A token a byte, plus <pad> 0, <|im_start|> 1 and <|im_end|> 2, the end token."""
    specials = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    made.chat_template = template
    return made


def chat(*words: str, **extra: object) -> dict[str, object]:
    """A row of turns, user and assistant by turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(words)], **extra}


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load_tiny(directory: Path, dtype: str = "float32", quantization: Any = "nf4") -> ResidentBase:
    return load_base(
        LoadOptions(
            model=str(directory), name="org/tiny", device="cpu", dtype=dtype, quantization=quantization
        )
    )


def random_samples(*lengths: int, vocabulary: int = 320, seed: int = 0) -> list[Sample]:
    """Random ids; about half of the tokens are trained on."""
    random = Random(seed)
    made = []
    for length in lengths:
        mask = [0, *(random.randint(0, 1) for _ in range(length - 2)), 1]
        made.append(Sample(array("i", (random.randrange(vocabulary) for _ in range(length))), bytes(mask)))
    return made


def recipe_for(base: ResidentBase, units: int, **fields: object) -> ResolvedRecipe:
    facts = TrainingBase(base.geometry, base.config.hidden_size, base.max_position, base.device.type)
    return resolve(Recipe.parse({"r": 4, "lora_alpha": 8, "learning_rate": 1e-2} | fields), facts, units)[0]


def make_trainer(
    base: ResidentBase, samples: list[Sample], units: list[tuple[int, ...]] | None = None, **fields: object
) -> Trainer:
    """A trainer over a twin of the base, B filled so that every factor has a gradient from the start."""
    units = units or [(index,) for index in range(len(samples))]
    recipe = recipe_for(base, len(units), **fields)
    spec = AdapterSpec(
        recipe.r,
        recipe.lora_alpha,
        recipe.target_modules,
        recipe.use_rslora,
        base_identity=base.geometry.identity,
    )
    twin = twin_of(base.model)
    adapter = TrainedAdapter.install(twin, spec, base.geometry, seed=recipe.seed, dropout=recipe.lora_dropout)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=generator) * 0.05)
    batches = Batches(units, recipe.batch_size, recipe.gradient_accumulation_steps, recipe.seed)
    return Trainer(LayerStack(twin), adapter, recipe, samples, batches)


def run_slices(slices: Generator[Any, None, Any]) -> Any:
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value
