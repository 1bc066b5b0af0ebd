"""LoraWeights: reading and writing, identity, and that mutated files are refused or mean what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file

from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE, GateLimits
from loramux_adapters.errors import InvalidAdapter
from loramux_adapters.safetensors_header import ITEM_BYTES, read_header
from loramux_adapters.spec import AdapterSpec, BaseGeometry
from loramux_adapters.weights import LoraWeights

MakeWeights = Callable[..., LoraWeights]
per_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def same(one: LoraWeights, other: LoraWeights) -> bool:
    return one.spec == other.spec and all(
        torch.equal(a, b) and a.dtype == b.dtype
        for name in one.tensors.keys() | other.tensors.keys()
        for a, b in zip(one.tensors[name], other.tensors[name], strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(
    dtype: torch.dtype, make_lora_weights: MakeWeights, tiny_geometry: BaseGeometry, tmp_path: Path
) -> None:
    weights = make_lora_weights(
        dtype=dtype, rank_pattern={"layers.1.self_attn.v_proj": 2}, base_identity="nf4:1234"
    )
    weights.write(tmp_path)
    again = LoraWeights.read(tmp_path, tiny_geometry)
    assert same(again, weights)
    assert again.generation == weights.generation
    assert again.num_bytes == weights.num_bytes
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_mixed_dtypes_stay_and_stay_aligned(
    tmp_path: Path,
) -> None:
    """A of three bf16 values before B of f32: in the order of their names B would lie at an odd multiple of 2."""
    geometry = BaseGeometry("odd", "", {"m.q": (2, 3)})
    spec = AdapterSpec(r=1, lora_alpha=1, target_modules=("q",))
    mixed = LoraWeights(spec, {"m.q": (torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(2, 1))})
    mixed.write(tmp_path)
    assert same(LoraWeights.read(tmp_path, geometry), mixed)
    assert mixed.dtype == "BF16+F32"
    with (tmp_path / WEIGHTS_FILE).open("rb", buffering=0) as file:
        size = (tmp_path / WEIGHTS_FILE).stat().st_size
        entries = read_header(file, label="", file_size=size, max_header_bytes=size, max_tensors=2)
    assert all(entry.start % ITEM_BYTES[entry.dtype] == 0 for entry in entries)
    assert len(load_file(tmp_path / WEIGHTS_FILE)) == 2


def test_unaligned_foreign_file(adapter_files: Any, tiny_geometry: BaseGeometry, tmp_path: Path) -> None:
    """Not every writer pads its header; data at an odd offset must still be read right."""
    raw = save(adapter_files.tensors)
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].rstrip()
    text = text if len(text) % 2 else text + b" "
    adapter_files.raw[WEIGHTS_FILE] = len(text).to_bytes(8, "little") + text + raw[8 + length :]
    weights = LoraWeights.read(adapter_files.write(tmp_path), tiny_geometry)
    for module, (a, _) in weights.tensors.items():
        assert torch.equal(a, adapter_files.tensors[f"base_model.model.{module}.lora_A.weight"])


def test_adapter_named_default_is_the_same_adapter(
    adapter_files: Any, tiny_geometry: BaseGeometry, tmp_path: Path
) -> None:
    plain = LoraWeights.read(adapter_files.write(tmp_path / "plain"), tiny_geometry)
    adapter_files.tensors = {
        name.replace(".weight", ".default.weight"): tensor for name, tensor in adapter_files.tensors.items()
    }
    named = LoraWeights.read(adapter_files.write(tmp_path / "named"), tiny_geometry)
    assert named.generation == plain.generation


def test_generation_depends_on_everything(make_lora_weights: MakeWeights) -> None:
    base = make_lora_weights()
    first, *rest = base.tensors
    a, b = base.tensors[first]
    flipped = a.clone()
    flipped.view(torch.int32)[0, 0] ^= 1
    variants = [
        base,
        make_lora_weights(lora_alpha=9.0),
        make_lora_weights(seed=1),
        make_lora_weights(dtype=torch.bfloat16),
        LoraWeights(base.spec, {first: (flipped, b)} | {name: base.tensors[name] for name in rest}),
        LoraWeights(base.spec, {first: (a.view(8, 8), b)} | {name: base.tensors[name] for name in rest}),
        LoraWeights(base.spec, {name: base.tensors[name] for name in rest}),
    ]
    assert len({weights.generation for weights in variants}) == len(variants)


def test_generation_does_not_depend_on_layout(make_lora_weights: MakeWeights) -> None:
    weights = make_lora_weights()
    reordered = {name: weights.tensors[name] for name in reversed(weights.tensors)}
    strided = {
        name: (a.T.contiguous().T, b.clone().requires_grad_(True)) for name, (a, b) in reordered.items()
    }
    assert not next(iter(strided.values()))[0].is_contiguous()
    assert LoraWeights(weights.spec, strided).generation == weights.generation


def test_what_it_holds_in_numbers(make_lora_weights: MakeWeights) -> None:
    weights = make_lora_weights(dtype=torch.bfloat16, rank_pattern={"layers.0.self_attn.q_proj": 6})
    assert weights.rank == 6
    assert weights.dtype == "BF16"
    assert weights.num_bytes == 2 * (6 * 32 + 4 * 32 + 2 * 4 * 24)


def test_write_replaces_and_a_failed_write_leaves_the_old(
    make_lora_weights: MakeWeights,
    tiny_geometry: BaseGeometry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = make_lora_weights(seed=1), make_lora_weights(seed=2)
    old.write(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            new.write(tmp_path)
    assert same(LoraWeights.read(tmp_path, tiny_geometry), old)
    assert len(list(tmp_path.iterdir())) == 2
    new.write(tmp_path)
    assert same(LoraWeights.read(tmp_path, tiny_geometry), new)


@per_file
@given(st.integers(0, 63), st.sampled_from([float("nan"), float("inf"), float("-inf")]), st.booleans())
def test_one_bad_value_anywhere_is_found(
    adapter_files: Any, tiny_geometry: BaseGeometry, tmp_path: Path, position: int, value: float, half: bool
) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    good = adapter_files.tensors[name]
    bad = good.half() if half else good.clone()
    bad.view(-1)[position] = value
    files = type(adapter_files)(adapter_files.config, adapter_files.tensors | {name: bad})
    with pytest.raises(InvalidAdapter, match="NaN or infinite"):
        LoraWeights.read(files.write(tmp_path), tiny_geometry)


edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "cut", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, changes: list[tuple[str, float, int]], length: int | None = None) -> bytes:
    """Apply byte edits at positions given as a share of the (first `length`) bytes."""
    found = bytearray(data)
    for kind, share, value in changes:
        at = int(share * min(len(found), length or len(found)))
        if kind == "flip" and found:
            found[at] ^= value or 1
        elif kind == "insert":
            found[at:at] = bytes([value])
        elif kind == "delete":
            del found[at : at + 1 + value % 4]
        elif kind == "cut":
            del found[at:]
        else:
            found[at:at] = found[at : at + value]
    return bytes(found)


@settings(parent=per_file, max_examples=1000)
@given(edits, st.booleans())
def test_a_mutated_file_is_refused_or_reads_as_the_library_reads_it(
    adapter_files: Any,
    tiny_geometry: BaseGeometry,
    tmp_path: Path,
    changes: list[tuple[str, float, int]],
    in_header: bool,
) -> None:
    valid = save(adapter_files.tensors)
    header_end = 8 + int.from_bytes(valid[:8], "little")
    mutated = mutate(valid, changes, header_end if in_header else None)
    adapter_files.raw[WEIGHTS_FILE] = mutated
    try:
        weights = LoraWeights.read(adapter_files.write(tmp_path), tiny_geometry)
    except InvalidAdapter as error:
        assert str(error).isprintable()
        return
    library = load(mutated)
    assert len(library) == 2 * len(weights.tensors)
    for module, pair in weights.tensors.items():
        for kind, tensor in zip(("lora_A", "lora_B"), pair, strict=True):
            name = f"base_model.model.{module}.{kind}.weight"
            expected = library.get(name, library.get(name.replace(".weight", ".default.weight")))
            assert torch.equal(tensor, expected)
            assert torch.isfinite(tensor).all()


@settings(parent=per_file, max_examples=400)
@given(edits)
def test_a_mutated_config_is_refused_or_rebuilt(
    adapter_files: Any, tiny_geometry: BaseGeometry, tmp_path: Path, changes: list[tuple[str, float, int]]
) -> None:
    mutated = mutate(json.dumps(adapter_files.config).encode(), changes)
    adapter_files.raw[CONFIG_FILE] = mutated
    try:
        weights = LoraWeights.read(adapter_files.write(tmp_path), tiny_geometry)
    except InvalidAdapter as error:
        assert str(error).isprintable()
        return
    assert weights.spec == AdapterSpec.from_config(json.loads(mutated))
    assert tuple(weights.tensors) == weights.spec.targets(tiny_geometry)


def test_reads_a_large_adapter_at_once(tmp_path: Path) -> None:
    """Rank 64 on 2 layers of 8 B-model size; a bound on what is allocated, seconds are for the load tests."""
    shapes = {f"model.layers.{i}.mlp.up_proj": (14336, 4096) for i in range(2)}
    geometry = BaseGeometry("org/large", "", shapes)
    spec = AdapterSpec(r=64, lora_alpha=64, target_modules=("up_proj",))
    tensors = {}
    for module, (out_features, in_features) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(
            64, in_features, dtype=torch.bfloat16
        )
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(
            out_features, 64, dtype=torch.bfloat16
        )
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(spec.to_config()))
    size = (tmp_path / WEIGHTS_FILE).stat().st_size
    weights = LoraWeights.read(tmp_path, geometry, limits=GateLimits(max_file_bytes=size))
    assert weights.num_bytes == 4 * 64 * (14336 + 4096)
    with pytest.raises(InvalidAdapter, match=f"{size} bytes, at most {size - 1} are allowed"):
        LoraWeights.read(tmp_path, geometry, limits=GateLimits(max_file_bytes=size - 1))
