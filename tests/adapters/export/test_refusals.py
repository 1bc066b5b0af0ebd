"""What cannot be exported is refused in one sentence, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux_adapters.errors import BaseModelError, ExportError, InvalidAdapter
from loramux_adapters.export import (
    ExportOptions,
    Onto,
    VerifyOptions,
    WeightedAdapter,
    plan_export,
    run_export,
)
from loramux_adapters.export.journal import Journal
from loramux_adapters.export.options import parse_format, parse_size

from .conftest import make_base

NONE = VerifyOptions(prompts=0)


def options(base: Path, adapter: Path, out: Path, **more: Any) -> ExportOptions:
    return ExportOptions(base, (WeightedAdapter(adapter),), out, **({"verify": NONE} | more))


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where nothing must appear."""
    path = tmp_path / "merged"
    yield path
    assert list(tmp_path.glob("merged*")) == []


def change_config(base: Path, **fields: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(base: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_missing_shard(adapter: Path, tmp_path: Path, out: Path) -> None:
    base = make_base(tmp_path / "base", "llama", shard="60KB")
    victim = sorted(base.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(
        BaseModelError, match=f"lacks 1 of its . weight files: {victim.name}; download it again"
    ):
        plan_export(options(base, adapter, out))


def test_truncated_shard(base_copy: Path, adapter: Path, out: Path) -> None:
    path = base_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        BaseModelError, match="the base cannot be read: model.safetensors: the tensors end at"
    ):
        plan_export(options(base_copy, adapter, out))


def test_tensor_names_of_another_kind(base_copy: Path, adapter: Path, out: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            tensors[name.replace("model.layers", "transformer.h")] = tensors.pop(name)

    change_tensors(base_copy, rename)
    with pytest.raises(BaseModelError) as caught:
        plan_export(options(base_copy, adapter, out))
    assert caught.value.message.count(" is missing") == 9  # all of them, not the first


def test_unsupported_weight_type(base_copy: Path, adapter: Path, out: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    change_tensors(base_copy, quantize)
    with pytest.raises(BaseModelError, match=f"{name} has type F8_E4M3; F16, BF16, F32 and bitsandbytes NF4"):
        plan_export(options(base_copy, adapter, out))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized with gptq"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            "quantized with bitsandbytes fp4",
        ),
    ],
)
def test_unsupported_quantization(
    base_copy: Path, adapter: Path, out: Path, config: dict[str, Any], said: str
) -> None:
    change_config(base_copy, quantization_config=config)
    with pytest.raises(BaseModelError, match=said):
        plan_export(options(base_copy, adapter, out))


def test_unknown_architecture(base_copy: Path, adapter: Path, out: Path) -> None:
    change_config(base_copy, model_type="no-such-model")
    with pytest.raises(BaseModelError, match="config.json cannot be used"):
        plan_export(options(base_copy, adapter, out))


def test_adapter_of_another_shape(
    bases: Callable[[str], Path], adapter: Path, tmp_path: Path, out: Path
) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        plan_export(options(bases("gemma2"), damaged(adapter, tmp_path), out))
    assert len(caught.value.faults) >= 2


def damaged(adapter: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(adapter, tmp_path / "damaged"))
    path = copy / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in list(tensors)[:2]:
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, path)
    return copy


def test_two_adapters_of_two_bases(
    bases: Callable[[str], Path], stamp: Any, tmp_path: Path, out: Path
) -> None:
    first = stamp("1" * 64)
    second = Path(shutil.copytree(first, tmp_path / "other"))
    path = second / "adapter_config.json"
    path.write_text(path.read_text().replace("1" * 64, "2" * 64))
    both = (WeightedAdapter(first), WeightedAdapter(second))
    with pytest.raises(ExportError, match="stamped, other were trained on different bases"):
        plan_export(ExportOptions(bases("llama"), both, out, verify=NONE))


def test_no_such_adapter(bases: Callable[[str], Path], tmp_path: Path, out: Path) -> None:
    with pytest.raises(ExportError, match="there is no such directory"):
        plan_export(options(bases("llama"), tmp_path / "nowhere", out))


def test_no_such_base(adapter: Path, tmp_path: Path, out: Path) -> None:
    with pytest.raises(BaseModelError, match="there is no model directory"):
        plan_export(options(tmp_path / "nowhere", adapter, out))


def test_full_disk(
    bases: Callable[[str], Path], adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        total: int = 1000
        used: int = 900
        free: int = 100

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())
    with pytest.raises(ExportError, match=r"needs 0.07 GB, and .* has 0.00 GB free"):
        run_export(plan_export(options(bases("llama"), adapter, out)))


def test_disk_that_fills_up(
    bases: Callable[[str], Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    plan = plan_export(options(bases("llama"), adapter, tmp_path / "merged"))
    monkeypatch.setattr("loramux_adapters.export.shards.os.fsync", full)
    with pytest.raises(
        ExportError, match=r"the disk is full: free space for .*merged.partial and use --resume"
    ):
        run_export(plan)


def test_out_exists(bases: Callable[[str], Path], adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(ExportError, match="exists already: choose another --out or delete it"):
        run_export(plan_export(options(bases("llama"), adapter, tmp_path / "merged")))


def test_leftovers_need_resume(bases: Callable[[str], Path], adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged.partial").mkdir()
    with pytest.raises(ExportError, match="is left from an earlier export: continue it with --resume"):
        run_export(plan_export(options(bases("llama"), adapter, tmp_path / "merged")))


def test_two_exports_at_once(bases: Callable[[str], Path], adapter: Path, tmp_path: Path) -> None:
    plan = plan_export(options(bases("llama"), adapter, tmp_path / "merged"))
    plan.options.partial.mkdir()
    with (
        Journal(plan.options.partial, plan.fingerprint),
        pytest.raises(ExportError, match="another export is writing"),
    ):
        run_export(plan, resume=True)


def test_resuming_something_else(bases: Callable[[str], Path], adapter: Path, tmp_path: Path) -> None:
    first = plan_export(options(bases("llama"), adapter, tmp_path / "merged"))
    first.options.partial.mkdir()
    with Journal(first.options.partial, first.fingerprint):
        pass
    other = plan_export(options(bases("llama"), adapter, tmp_path / "merged", onto=Onto.ORIGINAL))
    with pytest.raises(ExportError, match="was begun with another base, adapter, option"):
        run_export(other, resume=True)


def test_adapter_without_effect(
    bases: Callable[[str], Path], adapter: Path, tmp_path: Path, out: Path
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "zero"))
    path = copy / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}, path)
    with pytest.raises(ExportError, match="changes nothing: every lora_B is zero"):
        plan_export(options(bases("llama"), copy, out))


def test_change_lost_in_rounding(bases: Callable[[str], Path], adapter: Path, tmp_path: Path) -> None:
    weak = WeightedAdapter(adapter, 1e-9)
    plan = plan_export(
        ExportOptions(bases("llama"), (weak,), tmp_path / "merged", onto=Onto.ORIGINAL, verify=NONE)
    )
    with pytest.raises(ExportError, match="is lost in rounding; export with --format fp32"):
        run_export(plan)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MiB", 500 * 2**20), ("1.5 kb", 1500), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1", "0"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ExportError, match="--shard-size"):
        parse_size(text)


def test_wrong_words() -> None:
    with pytest.raises(ExportError, match="choose one of bf16, fp16, fp32, nf4"):
        parse_format("int8")
    with pytest.raises(ExportError, match="convert_hf_to_gguf"):
        parse_format("gguf")
    with pytest.raises(ExportError, match="must be a number other than 0"):
        WeightedAdapter.parse("a=0")
    with pytest.raises(ExportError, match="there are 8 prompts"):
        VerifyOptions(prompts=9)
    assert WeightedAdapter.parse("dir=x/a") == WeightedAdapter(Path("dir=x/a"))
    assert WeightedAdapter.parse("a=0.5") == WeightedAdapter(Path("a"), 0.5)
