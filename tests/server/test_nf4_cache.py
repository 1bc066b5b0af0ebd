"""Quantized copies: the same base from a third of the bytes, and never from another's."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from loramux_server.base import loading, nf4_cache
from loramux_server.base.loading import LoadOptions, ResidentBase, load_base
from loramux_server.base.nf4_cache import QuantizedCopy

ModelFactory = Callable[[str], Path]


@pytest.fixture
def model(tiny_model: ModelFactory, tmp_path: Path) -> Path:
    """A tiny llama of its own, in bf16."""
    directory = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models whose weights were quantized, in order."""
    read = loading._read_weights
    seen: list[str] = []

    def watched(options: LoadOptions, config: object, device: torch.device, *, quantize: bool) -> object:
        if quantize:
            seen.append(options.model)
        return read(options, config, device, quantize=quantize)

    monkeypatch.setattr(loading, "_read_weights", watched)
    return seen


def load(model: Path, cache: Path, name: str = "tiny") -> ResidentBase:
    return load_base(LoadOptions(model=str(model), name=name, device="cpu", dtype="float32", nf4_cache=cache))


def logits(base: ResidentBase) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = base.model(input_ids=torch.arange(5, 40)[None], use_cache=False).logits
    return answer


def only_copy(cache: Path) -> Path:
    (found,) = cache.iterdir()
    return found


def test_a_later_start_quantizes_nothing_and_is_the_same_base(
    model: Path, tmp_path: Path, quantized: list[str]
) -> None:
    first = load(model, tmp_path / "cache")
    second = load(model, tmp_path / "cache", name="again")
    assert quantized == [str(model)]
    assert second.geometry.identity == first.geometry.identity
    assert second.geometry.name == "again"
    assert torch.equal(logits(first), logits(second))
    assert (second.max_position, second.eos_token_ids) == (first.max_position, first.eos_token_ids)
    assert second.weight_bytes == first.weight_bytes


def test_changed_files_are_another_base(model: Path, tmp_path: Path, quantized: list[str]) -> None:
    first = load(model, tmp_path / "cache")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    second = load(model, tmp_path / "cache")
    assert len(quantized) == 2
    assert second.geometry.identity != first.geometry.identity


def test_a_config_changed_within_the_same_size_is_seen(
    model: Path, tmp_path: Path, quantized: list[str]
) -> None:
    load(model, tmp_path / "cache")
    status = (model / "config.json").stat()
    os.utime(model / "config.json", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    load(model, tmp_path / "cache")
    assert len(quantized) == 2


@pytest.mark.parametrize("damage", ["bytes", "config", "cut"])
def test_a_damaged_copy_is_named_and_made_anew(
    model: Path, tmp_path: Path, quantized: list[str], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache = tmp_path / "cache"
    first = load(model, cache)
    weights = only_copy(cache) / "model.safetensors"
    if damage == "bytes":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 255
        weights.write_bytes(content)
        tensors = load_file(weights)
        packed = tensors["model.layers.0.mlp.up_proj.weight"]
        packed[0] ^= 255
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "config":
        (only_copy(cache) / "config.json").write_text("{")
    else:
        os.truncate(weights, weights.stat().st_size // 2)
    with caplog.at_level(logging.WARNING):
        second = load(model, cache)
    assert "damaged" in caplog.text
    assert str(only_copy(cache)) in caplog.text
    assert len(quantized) == 2
    assert second.geometry.identity == first.geometry.identity
    load(model, cache)
    assert len(quantized) == 2


def test_a_copy_that_was_not_finished_does_not_count(
    model: Path, tmp_path: Path, quantized: list[str]
) -> None:
    cache = tmp_path / "cache"
    load(model, cache)
    copy = only_copy(cache)
    (copy / "identity.txt").unlink()
    abandoned = shutil.copytree(copy, cache / f"{copy.name}.abc")
    young = shutil.copytree(copy, cache / f"{copy.name}.def")
    os.utime(abandoned, (0, 0))
    load(model, cache)
    assert len(quantized) == 2
    assert (copy / "identity.txt").exists()
    assert young.exists()
    assert not abandoned.exists()


def test_a_cache_that_cannot_be_written_is_a_warning(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    with caplog.at_level(logging.WARNING):
        base = load(model, tmp_path / "cache")
    assert base.quantization == "nf4"
    assert "no quantized copy could be kept" in caplog.text


def test_what_the_key_depends_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.from_pretrained(model)
    cpu = torch.device("cpu")

    def key(name: str = str(model), device: torch.device = cpu, config: object = config) -> Path:
        copy = QuantizedCopy.of(tmp_path, name, config, device)
        assert copy is not None
        return copy.path

    assert key() == key()
    assert key(device=torch.device("cuda")) != key()
    published = {
        commit: key("org/model", config=SimpleNamespace(_commit_hash=commit)) for commit in ("a", "b")
    }
    assert len({*published.values(), key()}) == 3
    assert QuantizedCopy.of(tmp_path, "org/model", SimpleNamespace(_commit_hash=None), cpu) is None
    before = key()
    monkeypatch.setattr(nf4_cache, "version", lambda name: "99")
    assert key() != before
