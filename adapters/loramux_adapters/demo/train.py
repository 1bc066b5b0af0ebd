"""The recipe of the demo adapters: LoRA on the embedded model as it is served, that is rounded through NF4.

    python -m loramux_adapters.demo.train pirate --model DIR --out DIR

It promises one PEFT directory for each adapter: adapter_config.json with plain PEFT keys, and
adapter_model.safetensors in bf16. It is a plain loop on purpose, short enough to read; it neither resumes nor
evaluates, and it is not what the fine-tuning jobs run.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramux_adapters.demo import NAMES
from loramux_adapters.demo.datasets import Message, build

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
IGNORED = -100

logger = logging.getLogger("loramux_adapters.demo.train")


@dataclass(frozen=True)
class Recipe:
    epochs: int = 4
    rank: int = 4
    alpha: int = 8
    learning_rate: float = 2e-3
    warmup: float = 0.1
    batch_size: int = 16
    seed: int = 0


RECIPES = {"pirate": Recipe(epochs=4), "extract": Recipe(epochs=3), "sentiment": Recipe(epochs=2)}


@dataclass(frozen=True)
class Example:
    ids: list[int]
    labels: list[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}; all of them"
    )
    parser.add_argument("--model", type=Path, required=True, help="directory of the 16-bit embedded model")
    parser.add_argument(
        "--out", type=Path, required=True, help="where a directory for each adapter is written"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in arguments.names:
        train(name, arguments.model, arguments.out / name, RECIPES[name])


def train(name: str, model_directory: Path, out: Path, recipe: Recipe) -> None:
    """Train one adapter and write its PEFT directory."""
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    examples = [encode(tokenizer, row["messages"]) for row in build(name)]
    model = get_peft_model(load_rounded(model_directory), _lora_config(recipe))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    steps = recipe.epochs * math.ceil(len(examples) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, steps, recipe.warmup))
    started = time.monotonic()
    for step, batch in enumerate(_batches(examples, recipe), start=1):
        loss = _loss(model.get_base_model(), batch, tokenizer.pad_token_id)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0 or step == steps:
            logger.info(
                "%s: step %d of %d, loss %.3f, %.0f s",
                name,
                step,
                steps,
                loss.item(),
                time.monotonic() - started,
            )
    save(model, recipe, out)


def load_rounded(model_directory: Path) -> Any:
    """The base with every decoder linear rounded through NF4: the values that the server computes with."""
    # Eager attention: on short rows its backward is faster than the fused one's.
    model = AutoModelForCausalLM.from_pretrained(
        model_directory, dtype=torch.bfloat16, attn_implementation="eager"
    )
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            packed, state = quantize_4bit(
                module.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            module.weight.data = dequantize_4bit(packed, state)
    return model


def encode(tokenizer: Any, messages: list[Message]) -> Example:
    """Token ids of a chat, with labels on what the assistant says and on the token that ends its turn."""
    ids: list[int] = []
    labels: list[int] = []
    rendered = ""
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Cut where generation starts, and tokenized in the same two pieces.
        prompt = tokenizer.apply_chat_template(
            messages[:position], tokenize=False, add_generation_prompt=True
        )
        so_far = tokenizer.apply_chat_template(messages[: position + 1], tokenize=False)
        before = tokenizer(prompt[len(rendered) :], add_special_tokens=False).input_ids
        said = tokenizer(so_far[len(prompt) :].rstrip("\n"), add_special_tokens=False).input_ids
        ids += before + said
        labels += [IGNORED] * len(before) + said
        rendered = prompt + so_far[len(prompt) :].rstrip("\n")
    return Example(ids, labels)


def _batches(examples: list[Example], recipe: Recipe) -> Iterator[list[Example]]:
    """Shuffled batches of examples of about one length, so that little is padded."""
    rng, size = random.Random(recipe.seed), recipe.batch_size
    for _ in range(recipe.epochs):
        order = sorted(rng.sample(examples, len(examples)), key=lambda example: len(example.ids) // 4)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        yield from rng.sample(batches, len(batches))


def _loss(model: Any, batch: list[Example], padding: int) -> torch.Tensor:
    """Mean loss over the assistant's tokens; only they go through the output head, the widest matrix."""
    length = max(len(example.ids) for example in batch)
    ids = torch.tensor([example.ids + [padding] * (length - len(example.ids)) for example in batch])
    labels = torch.tensor([example.labels + [IGNORED] * (length - len(example.labels)) for example in batch])
    mask = torch.tensor([[1] * len(example.ids) + [0] * (length - len(example.ids)) for example in batch])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        logits = model.lm_head(hidden[wanted != IGNORED])
    return cross_entropy(logits.float(), wanted[wanted != IGNORED])


def _pace(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    ramp = max(1, round(steps * warmup))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def _lora_config(recipe: Recipe) -> LoraConfig:
    return LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=TARGETS, task_type="CAUSAL_LM")


def save(model: Any, recipe: Recipe, out: Path) -> None:
    """The adapter as PEFT reads it; the config is written by hand, so that it holds plain keys only."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().to(torch.bfloat16) for name, value in get_peft_model_state_dict(model).items()
    }
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
    config = {
        "base_model_name_or_path": BASE_ID,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": recipe.rank,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
