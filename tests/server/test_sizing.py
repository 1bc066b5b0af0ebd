"""What fits beside a base: asked for and refused with figures, or derived from what is free."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loramux_adapters.errors import ConfigError
from loramux_server.engine import sizing
from loramux_server.engine.options import WorkerOptions
from loramux_server.engine.sizing import GIB, Sizes, plan_sizes

TOKEN = 1024  # bytes of keys and values a token takes
BLOCK = 16


def base(device: str = "cpu", max_position: int = 4096) -> Any:
    shapes = {f"layers.{i}.q_proj": (512, 512) for i in range(4)}
    return SimpleNamespace(
        device=torch.device(device),
        dtype=torch.bfloat16,
        max_position=max_position,
        geometry=SimpleNamespace(linear_shapes=shapes),
    )


def plan(on: Any = None, **options: Any) -> Sizes:
    return plan_sizes(
        WorkerOptions(address="", parent_pid=0, model="m", name="m", **options), on or base(), TOKEN
    )


def test_the_cache_that_was_asked_for() -> None:
    sizes = plan(kv_cache_bytes=1000 * BLOCK * TOKEN, max_num_seqs=64)
    assert sizes.num_blocks == 1000
    assert sizes.max_model_len == 4096


def test_no_more_blocks_than_can_be_used() -> None:
    sizes = plan(kv_cache_bytes=1000 * BLOCK * TOKEN, max_num_seqs=2, max_model_len=100)
    assert sizes.num_blocks == 2 * 7
    assert sizes.max_model_len == 100


def test_the_context_shrinks_to_what_the_cache_holds_unless_it_was_asked_for() -> None:
    assert plan(kv_cache_bytes=10 * BLOCK * TOKEN).max_model_len == 160
    with pytest.raises(
        ConfigError, match="--max-model-len 161 does not fit the KV cache, which holds 160 tokens"
    ) as caught:
        plan(kv_cache_bytes=10 * BLOCK * TOKEN, max_model_len=161)
    assert caught.value.param == "max_model_len"
    assert plan(kv_cache_bytes=10 * BLOCK * TOKEN, max_model_len=160).max_model_len == 160


def test_a_context_longer_than_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="5000 is longer than the 4096 positions of the model"):
        plan(kv_cache_bytes=GIB, max_model_len=5000)


def test_a_cache_too_small_to_serve_is_refused_with_figures() -> None:
    with pytest.raises(
        ConfigError, match=r"0\.00 GiB are left for the KV cache, which holds 16 tokens of 1 KiB"
    ) as caught:
        plan(kv_cache_bytes=BLOCK * TOKEN + 5)
    assert caught.value.param == "kv_cache_memory"


def test_on_cpus_every_slot_may_hold_the_largest_rank() -> None:
    assert plan(kv_cache_bytes=GIB, max_loras=8, max_lora_rank=64).lora_rows == 512


def test_on_gpus_rank_16_is_planned_for_and_the_largest_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * GIB, 10 * GIB))
    cuda = base("cuda")
    assert plan(cuda, max_loras=8, max_lora_rank=64).lora_rows == 128
    assert plan(cuda, max_loras=2, max_lora_rank=64).lora_rows == 64
    assert plan(cuda, max_loras=8, max_lora_rank=8).lora_rows == 64


@pytest.mark.parametrize(("eager", "copies"), [(True, 1), (False, 2)])
def test_on_gpus_the_cache_gets_the_share_that_is_left(
    eager: bool, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * GIB, 10 * GIB))
    given = {"max_loras": 8, "max_lora_rank": 16, "max_num_seqs": 1024}
    sizes = plan(base("cuda"), gpu_memory_utilization=0.8, enforce_eager=eager, **given)
    adapters = 128 * 4 * 1024 * 2  # rows, linears, in + out, bytes
    assert sizes.num_blocks == (2 * GIB - copies * adapters) // (BLOCK * TOKEN)
    with pytest.raises(ConfigError, match="lower --max-loras or choose a smaller model"):
        plan(base("cuda"), gpu_memory_utilization=0.5)


def test_on_cpus_the_cache_takes_no_more_than_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_bytes", lambda: GIB)
    adapters = 512 * 4 * 1024 * 2
    sizes = plan(max_num_seqs=1024, max_model_len=4096)
    assert sizes.num_blocks == (GIB // 2 - adapters) // (BLOCK * TOKEN)
    monkeypatch.setattr(sizing, "available_bytes", lambda: 64 * GIB)
    assert plan(max_num_seqs=1024, max_model_len=4096).num_blocks == 4 * GIB // (BLOCK * TOKEN)
