"""Shared by all tests: one thread, no network, tiny random models of every architecture we claim, adapters for them."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
for _name in [name for name in os.environ if name.startswith("LORAMUX_") and name != "LORAMUX_CACHE_DIR"]:
    del os.environ[_name]

import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from loramux_adapters.native import build
from loramux_adapters.native.library import Native, load_native

torch.set_num_threads(1)

# No test asserts how long something takes: the machine may be somebody else's, too.
hypothesis.settings.register_profile("loramux", deadline=None)
hypothesis.settings.load_profile("loramux")

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# sliding windows are shorter than the test prompts, so that they matter
TINY_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=32),
    "gemma2": lambda: Gemma2Config(**_COMMON, head_dim=16, sliding_window=16),
    "gemma3": lambda: Gemma3TextConfig(**_COMMON, head_dim=16, sliding_window=16),
    "phi3": lambda: Phi3Config(**_COMMON),
}


@pytest.fixture(scope="session", params=["own", "avx2", "sse2"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Native:
    """The CPU's kernels, compiled once for this processor, and as for ones with narrower vectors."""
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler")
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "own":
            cpuinfo = Path("/proc/cpuinfo")
            if not cpuinfo.exists() or request.param not in cpuinfo.read_text():
                pytest.skip(f"this processor has no {request.param}")
            other = {"avx2": "-march=haswell", "sse2": "-march=x86-64"}[request.param]
            patch.setattr(build, "_native", lambda: other)
        found = load_native(tmp_path_factory.mktemp("kernels"))
    assert found is not None
    return found


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directory of a random model of the named architecture, spread out enough that greedy tokens vary.

    `layers` is another number of decoder layers than three.
    """
    made: dict[tuple[str, int | None], Path] = {}

    def make(architecture: str, layers: int | None = None) -> Path:
        if (architecture, layers) not in made:
            torch.manual_seed(0)
            config = TINY_CONFIGS[architecture]()
            if layers is not None:
                config.num_hidden_layers = layers
            model = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "norm" in name:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
                    elif name.endswith("bias"):
                        parameter.normal_(0, 0.2)
                    else:
                        parameter.normal_(0, 0.6 if "embed" in name else 0.15)
            directory = tmp_path_factory.mktemp("models") / f"tiny-{architecture}"
            model.save_pretrained(directory)
            made[architecture, layers] = directory
        return made[architecture, layers]

    return make
