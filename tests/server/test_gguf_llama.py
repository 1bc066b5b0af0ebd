"""The conversion against transformers' own GGUF loading: the same weights, on a one-layer file made here.

The real file is compared by the e2e test in `test_demo_model.py`, through the sha256 of its conversion.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loramux_server.base.gguf_llama import CONFIG, LAYER_NAMES, convert, llama_name, unpermute

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SHAPES = {
    "attn_q": (576, 576),
    "attn_k": (192, 576),
    "attn_v": (192, 576),
    "attn_output": (576, 576),
    "ffn_gate": (1536, 576),
    "ffn_up": (1536, 576),
    "ffn_down": (576, 1536),
}


def write_gguf(path: Path) -> None:
    """One layer of SmolLM2's shape with random weights and a byte vocabulary, as llama.cpp writes it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*SPECIAL, *bytes_to_unicode().values(), "he"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(8192)
    writer.add_embedding_length(576)
    writer.add_feed_forward_length(1536)
    writer.add_head_count(9)
    writer.add_head_count_kv(3)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    _write_tensors(writer, len(tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tensors(writer: GGUFWriter, vocabulary: int) -> None:
    random = np.random.default_rng(0)

    def add(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
        values = random.standard_normal(shape, dtype=np.float32) * 0.05
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", (vocabulary, 576), GGMLQuantizationType.Q8_0)
    for part in LAYER_NAMES:
        if part in SHAPES:
            add(f"blk.0.{part}.weight", SHAPES[part], GGMLQuantizationType.Q4_1)
        else:
            add(f"blk.0.{part}.weight", (576,), GGMLQuantizationType.F32)
    add("output_norm.weight", (576,), GGMLQuantizationType.F32)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="module")
def converted(gguf_file: Path) -> Path:
    ticks: list[tuple[int, int]] = []
    convert(gguf_file, gguf_file.parent, lambda done, total: ticks.append((done, total)))
    assert ticks == [(done, 11) for done in range(1, 12)]
    return gguf_file.parent


def test_same_logits_as_transformers_own_gguf_loading(gguf_file: Path, converted: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    state = load_file(converted / "model.safetensors")
    vocabulary = state["model.embed_tokens.weight"].shape[0]
    config = LlamaConfig(**CONFIG | {"num_hidden_layers": 1, "vocab_size": vocabulary})
    ours, theirs = LlamaForCausalLM(config), LlamaForCausalLM(config)
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    theirs.load_state_dict({name: value.to(torch.bfloat16) for name, value in packed.state_dict().items()})
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.float()(ids).logits, theirs.float()(ids).logits, rtol=0, atol=0)


def test_unpermute_undoes_what_llama_cpp_does() -> None:
    weight = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)
    permuted = weight.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    assert not np.array_equal(permuted, weight)
    assert np.array_equal(unpermute(permuted, 2), weight)


def test_names_of_the_tensors_outside_the_layers() -> None:
    assert llama_name("blk.7.ffn_norm.weight") == "model.layers.7.post_attention_layernorm.weight"
    assert llama_name("output_norm.weight") == "model.norm.weight"


def test_the_tokenizer_keeps_special_tokens_whole_and_splits_digits(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    ids = tokenizer("he<|im_end|> 12\u0661").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["he", "<|im_end|>", "Ġ", "1", "2", "Ù", "¡"]
    assert tokenizer.decode(ids) == "he<|im_end|> 12\u0661"
    steps = json.loads((converted / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert steps[0] == {"type": "Digits", "individual_digits": True}
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert chat == "<|im_start|>user\nhe<|im_end|>\n"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 2, 8192)


def test_the_configs_speak_to_old_and_new_transformers(converted: Path) -> None:
    config = AutoConfig.from_pretrained(converted)
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert config.dtype == torch.bfloat16
    written = json.loads((converted / "config.json").read_text())
    assert (written["rope_theta"], written["torch_dtype"]) == (100000.0, "bfloat16")
    settings = json.loads((converted / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
