"""config.json, tokenizer and licence: readable by transformers 4.57 and 5.x, nothing of the base's left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from loramux_adapters.export import (
    ExportOptions,
    Format,
    VerifyOptions,
    WeightedAdapter,
    plan_export,
    run_export,
)
from loramux_adapters.export.assets import portable_tokenizer_config, rope_fields

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def written(raw: dict[str, Any], config: Any) -> dict[str, Any]:
    return raw | rope_fields(raw, config)


def test_a_plain_base_gets_both_spellings() -> None:
    config = transformers.LlamaConfig(rope_theta=100000.0)  # type: ignore[call-arg]
    raw = {"model_type": "llama", "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}}
    fields = written(raw, config)
    assert fields["rope_theta"] == 100000.0
    assert fields["rope_scaling"] is None
    assert fields["rope_parameters"] == raw["rope_parameters"]


def test_a_base_written_by_transformers_4_keeps_its_fields() -> None:
    raw = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": dict(LLAMA3), "hidden_size": 64}
    config = transformers.LlamaConfig(rope_theta=5e5, rope_scaling=dict(LLAMA3))  # type: ignore[call-arg]
    fields = written(raw, config)
    assert fields["rope_scaling"] == LLAMA3
    assert fields["rope_theta"] == 5e5
    assert fields["rope_parameters"] == LLAMA3 | {"rope_theta": 5e5}


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma3_text"])
def test_transformers_5_reads_the_same_rotary_settings(model_type: str, tmp_path: Path) -> None:
    if model_type == "llama":
        config: Any = transformers.LlamaConfig(rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    elif model_type == "phi3":
        factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
        config = transformers.Phi3Config(
            rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
            max_position_embeddings=8192,
        )
    else:
        config = transformers.Gemma3TextConfig(num_hidden_layers=6)
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    fields = written(raw, config)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    read = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    read.pop("type", None)  # what 4.x calls rope_type
    assert read == config.rope_parameters
    if model_type == "phi3":  # transformers 4.x accepts exactly these
        assert set(fields["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    if model_type == "gemma3_text":
        assert (fields["rope_theta"], fields["rope_local_base_freq"]) == (1e6, 1e4)


def test_tokenizer_fields_of_transformers_5_are_translated() -> None:
    raw = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "pad_token": "</s>"}
    assert portable_tokenizer_config(raw) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "pad_token": "</s>",
    }
    assert portable_tokenizer_config({"tokenizer_class": "GPT2Tokenizer"}) == {
        "tokenizer_class": "GPT2Tokenizer"
    }


@pytest.fixture(scope="module")
def merged(bases: Callable[[str], Path], adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("assets") / "merged"
    options = ExportOptions(
        bases("llama"), (WeightedAdapter(adapter),), out, verify=VerifyOptions(prompts=2, tokens=32)
    )
    return run_export(plan_export(options)).out


def test_everything_is_carried(bases: Callable[[str], Path], merged: Path) -> None:
    base = bases("llama")
    names = {path.name for path in base.iterdir()} | {"merge_report.json"}
    assert {path.name for path in merged.iterdir()} == names
    for name in ("LICENSE", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    tokenizer = json.loads((merged / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == (base / "chat_template.jinja").read_text()
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    loaded = transformers.AutoTokenizer.from_pretrained(merged)
    assert loaded.encode("tide") == transformers.AutoTokenizer.from_pretrained(base).encode("tide")


def test_config_of_a_float_export(merged: Path) -> None:
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"


def test_config_of_an_nf4_export(bases: Callable[[str], Path], adapter: Path, tmp_path: Path) -> None:
    options = ExportOptions(
        bases("llama"),
        (WeightedAdapter(adapter),),
        tmp_path / "merged",
        format=Format.NF4,
        verify=VerifyOptions(prompts=0),
    )
    out = run_export(plan_export(options)).out
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "bitsandbytes"
    assert quantization["bnb_4bit_quant_type"] == "nf4"
    assert quantization["bnb_4bit_use_double_quant"] is True


def test_report_and_card(merged: Path) -> None:
    report = json.loads((merged / "merge_report.json").read_text())
    assert report["verification"]["passed"] is True
    assert report["verification"]["export"]["positions"] == 64
    assert {tensor["action"] for tensor in report["tensors"]} == {"copied", "merged"}
    assert all(tensor["finite"] for tensor in report["tensors"])
    merged_tensors = [tensor for tensor in report["tensors"] if tensor["action"] == "merged"]
    assert all(tensor["changed"] and tensor["survival"] > 0.99 for tensor in merged_tensors)
    card = (merged / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert report["adapters"][0]["generation"] in card
    assert report["base"]["content_sha256"] in card
    assert "/" not in report["adapters"][0]["trained_on"], "no path of the machine it was trained on"
