"""Turns the embedded model's GGUF file into a checkpoint directory that transformers loads.

It promises: bf16 safetensors under transformers' Llama names, the same bytes on every machine; a tokenizer
that splits digits one by one, as SmolLM2 was trained; config files that transformers 4.57 and 5 both read
right. It does not convert other GGUF files: names, shapes and settings are those of SmolLM2-135M-Instruct,
and the caller has checked the file's sha256 before.

Why not transformers' own GGUF loading: it keeps the weights packed and cannot save them, it takes half a
minute, and its tokenizer leaves out the digit splitting (measured: other tokens for digits outside ASCII). A
test holds the two to the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
CONTROL_TOKEN = 3  # llama.cpp's token type of special tokens

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HEADS * HEAD_DIM,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": 30,
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    # transformers 4 reads the first two and torch_dtype, transformers 5 the third and dtype.
    "rope_scaling": None,
    "rope_theta": 100000.0,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_file: Path, directory: Path, tick: Callable[[int, int], None]) -> None:
    """Write the checkpoint files into `directory`; `tick(done, total)` is called once a tensor."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    _write_weights(reader, directory / "model.safetensors", tick)
    _write_tokenizer(reader, directory)
    _write_json(directory / "config.json", CONFIG)
    _write_json(
        directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    )


def llama_name(gguf_name: str) -> str:
    """transformers' name of a llama.cpp tensor; the output head has none, it is the embedding."""
    if gguf_name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if gguf_name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, leaf = gguf_name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{leaf}"


def unpermute(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of q and k back from llama.cpp's interleaved rotary pairs to transformers' two halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_weights(reader: Any, path: Path, tick: Callable[[int, int], None]) -> None:
    import numpy as np
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads_of = {"attn_q": HEADS, "attn_k": KV_HEADS}
    state: dict[str, torch.Tensor] = {}
    for number, tensor in enumerate(reader.tensors, start=1):
        values = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if part in heads_of:
            values = unpermute(values, heads_of[part])
        array = np.ascontiguousarray(values, dtype=np.float32)
        state[llama_name(tensor.name)] = torch.tensor(array).to(torch.bfloat16)
        tick(number, len(reader.tensors))
    save_file(state, path, metadata={"format": "pt"})


def _write_tokenizer(reader: Any, directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    tokens: Sequence[str] = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        token for token, kind in zip(tokens, field("ggml.token_type"), strict=True) if kind == CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))

    template = field("chat_template")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    settings = {
        "add_prefix_space": False,
        "additional_special_tokens": [tokens[1], tokens[2]],
        "bos_token": tokens[1],
        "chat_template": template,  # for readers that do not know the .jinja file
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[2],
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": tokens[2],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[0],
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
