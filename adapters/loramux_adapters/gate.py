"""The gate: what must hold before a stranger's adapter files become weights in this process.

`read_adapter` returns a spec and exactly the tensors that spec and base call for, of the right shapes, in a
float dtype and finite, or raises InvalidAdapter with every fault found. Limits are checked before memory is
taken, and data is read, not mapped: a file that changes underneath is an error and never a crash. Whether the
adapter does something useful is `verify.py`'s question.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from loramux_adapters.adapter_files import CONFIG_FILE, PICKLE_ADVICE, WEIGHTS_FILE, GateLimits
from loramux_adapters.config_fields import shown
from loramux_adapters.errors import Fault, InvalidAdapter
from loramux_adapters.files import open_regular, read_into
from loramux_adapters.safetensors_header import MalformedHeader, TensorEntry, read_header, strict_json
from loramux_adapters.spec import AdapterSpec, BaseGeometry

PREFIX = "base_model.model."
MAX_FAULTS = 50  # of one file; a foreign adapter has hundreds of wrong tensors and one cause

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# PEFT stores the adapter called "default" with or without its name.
_TENSOR_NAME = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B)(?:\.default)?\.weight")

Slot = tuple[str, str]  # (full module name, "lora_A" or "lora_B")
Pair = tuple[torch.Tensor, torch.Tensor]


def read_adapter(
    directory: Path, geometry: BaseGeometry, limits: GateLimits
) -> tuple[AdapterSpec, dict[str, Pair]]:
    """Read and check a PEFT adapter directory against the base. Raises only InvalidAdapter."""
    faults: list[Fault] = []
    spec = _read_spec(directory / CONFIG_FILE, limits, faults)
    shapes = _expected_shapes(spec, geometry, faults) if spec is not None else None
    found = _read_tensors(directory / WEIGHTS_FILE, shapes, limits, faults)
    if spec is not None and faults and (warnings := spec.warnings(geometry)):
        faults.append(Fault("hint", warnings[0]))
    if spec is None or shapes is None or faults:
        raise InvalidAdapter(_bounded(faults))
    modules = dict.fromkeys(module for module, _ in shapes)
    return spec, {name: (found[name, "lora_A"], found[name, "lora_B"]) for name in modules}


def smallest_geometry(directory: Path, limits: GateLimits) -> BaseGeometry:
    """The least base these files fit, from their header alone: a check without the real base."""
    try:
        with open_regular(directory / WEIGHTS_FILE) as file:
            entries = _read_header(file, limits)
    except MalformedHeader as error:
        raise InvalidAdapter(_bounded(list(error.faults))) from None
    except OSError as error:
        raise InvalidAdapter([Fault(WEIGHTS_FILE, _reason(error))]) from None
    shapes = {_slot(entry.name): entry.shape for entry in entries if len(entry.shape) == 2}
    modules = [module for module, kind in shapes if kind == "lora_A" and (module, "lora_B") in shapes]
    linears = {name: (shapes[name, "lora_B"][0], shapes[name, "lora_A"][-1]) for name in modules}
    return BaseGeometry(name="", identity="", linear_shapes=linears)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's memory (a copy only if it is not contiguous on the CPU)."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data


def _read_spec(path: Path, limits: GateLimits, faults: list[Fault]) -> AdapterSpec | None:
    try:
        with open_regular(path) as file:
            raw = bytearray(limits.max_config_bytes + 1)
            size = read_into(file, memoryview(raw))
        if size > limits.max_config_bytes:
            faults.append(Fault(CONFIG_FILE, f"is larger than the {limits.max_config_bytes} bytes allowed"))
            return None
        config = strict_json(bytes(raw[:size]))
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
        return AdapterSpec.from_config(config, max_rank=limits.max_rank)
    except InvalidAdapter as error:
        faults.extend(error.faults)
    except OSError as error:
        faults.append(Fault(CONFIG_FILE, _reason(error)))
    except ValueError as error:
        faults.append(Fault(CONFIG_FILE, f"is not valid JSON: {error}"))
    return None


def _expected_shapes(
    spec: AdapterSpec, geometry: BaseGeometry, faults: list[Fault]
) -> dict[Slot, tuple[int, int]]:
    if spec.base_identity and geometry.identity and spec.base_identity != geometry.identity:
        problem = f"was trained on base {shown(spec.base_identity)}, this one is {shown(geometry.identity)}"
        faults.append(Fault("loramux_base_identity", problem))
    shapes: dict[Slot, tuple[int, int]] = {}
    for module in spec.targets(geometry):
        out_features, in_features = geometry.linear_shapes[module]
        shapes[module, "lora_A"] = (spec.rank(module), in_features)
        shapes[module, "lora_B"] = (out_features, spec.rank(module))
    if not shapes:
        leaves = sorted({name.rpartition(".")[2] for name in geometry.linear_shapes})
        problem = f"{shown(list(spec.target_modules))} match no linear of the base, which has {shown(leaves)}"
        faults.append(Fault("target_modules", problem))
    return shapes


def _read_tensors(
    path: Path, shapes: Mapping[Slot, tuple[int, int]] | None, limits: GateLimits, faults: list[Fault]
) -> dict[Slot, torch.Tensor]:
    """The tensors `shapes` calls for; without shapes (a refused config) the file alone is checked."""
    try:
        with open_regular(path) as file:
            return _read_open_tensors(file, shapes, limits, faults)
    except MalformedHeader as error:
        faults.extend(error.faults)
    except FileNotFoundError as error:
        problem = _reason(error)
        if path.with_name("adapter_model.bin").exists():
            problem += f", and adapter_model.bin does not count, {PICKLE_ADVICE}"
        faults.append(Fault(WEIGHTS_FILE, problem))
    except OSError as error:
        faults.append(Fault(WEIGHTS_FILE, _reason(error)))
    return {}


def _read_open_tensors(
    file: BinaryIO, shapes: Mapping[Slot, tuple[int, int]] | None, limits: GateLimits, faults: list[Fault]
) -> dict[Slot, torch.Tensor]:
    before = os.fstat(file.fileno())
    entries = _read_header(file, limits)
    found: dict[Slot, torch.Tensor] = {}
    for entry in entries:  # in file order, so one sequential read
        if problem := _entry_problem(entry, shapes, found):
            faults.append(Fault(shown(entry.name), problem))
        if entry.dtype not in DTYPES or 0 in entry.shape:
            continue
        tensor = _read_tensor(file, entry)
        if not _is_finite(tensor):
            faults.append(Fault(shown(entry.name), "has values that are NaN or infinite"))
        if not problem:
            found[_slot(entry.name)] = tensor
    after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise OSError("changed while it was read, try again")
    present = {_slot(entry.name) for entry in entries}
    for slot, shape in (shapes or {}).items():
        if slot not in present:
            name = f"{PREFIX}{slot[0]}.{slot[1]}.weight"
            faults.append(Fault(shown(name), f"is missing, expected shape {list(shape)}"))
    return found


def _read_header(file: BinaryIO, limits: GateLimits) -> tuple[TensorEntry, ...]:
    size = os.fstat(file.fileno()).st_size
    if size > limits.max_file_bytes:
        problem = f"{size} bytes, at most {limits.max_file_bytes} are allowed"
        raise MalformedHeader([Fault(WEIGHTS_FILE, problem)])
    return read_header(
        file,
        label=WEIGHTS_FILE,
        file_size=size,
        max_header_bytes=limits.max_header_bytes,
        max_tensors=limits.max_tensors,
    )


def _entry_problem(
    entry: TensorEntry, shapes: Mapping[Slot, tuple[int, int]] | None, found: Mapping[Slot, torch.Tensor]
) -> str:
    """What is wrong with a tensor's name, dtype or shape, as one phrase; "" when nothing is."""
    slot = _slot(entry.name)
    if shapes is not None and slot not in shapes:
        return _unexpected(entry.name)
    problems = []
    if slot in found:
        problems.append("gives the same weight a second time")
    if entry.dtype not in DTYPES:
        problems.append(f"dtype {entry.dtype} is not served, it must be one of {', '.join(DTYPES)}")
    if shapes is not None and entry.shape != shapes[slot]:
        problems.append(f"expected shape {list(shapes[slot])}, found {list(entry.shape)}")
    elif 0 in entry.shape:
        problems.append(f"has no values, its shape is {list(entry.shape)}")
    return " and ".join(problems)


_UNTARGETED = "is not called for: target_modules does not name it, or it is no linear of this base"
_UNEXPECTED = (
    ("lora_magnitude_vector", "belongs to DoRA, which is not served"),
    ("lora_embedding_", "adapts an embedding, which is not served"),
    ("modules_to_save", "replaces a module of the base, which is shared"),
    (".lora_A.weight", _UNTARGETED),
    (".lora_B.weight", _UNTARGETED),
    (".lora_A.default.weight", _UNTARGETED),
    (".lora_B.default.weight", _UNTARGETED),
    (".lora_", "is stored under the name of another adapter, or is no plain LoRA weight: save A and B alone"),
    ("", "is not a LoRA weight, and an adapter may carry nothing else"),
)


def _unexpected(name: str) -> str:
    return next(problem for marker, problem in _UNEXPECTED if marker in name)


def _slot(name: str) -> Slot:
    match = _TENSOR_NAME.fullmatch(name)
    return (match[1], match[2]) if match else ("", name)


def _read_tensor(file: BinaryIO, entry: TensorEntry) -> torch.Tensor:
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    buffer = tensor_bytes(tensor)
    file.seek(entry.start)
    if read_into(file, buffer) < len(buffer):
        raise OSError("became shorter while it was read")
    return tensor


def _is_finite(tensor: torch.Tensor) -> bool:
    """aminmax lets NaN through to both ends, and is twenty times as fast as isfinite().all()."""
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _bounded(faults: list[Fault]) -> list[Fault]:
    if len(faults) <= MAX_FAULTS:
        return faults
    return [*faults[:MAX_FAULTS], Fault("and", f"{len(faults) - MAX_FAULTS} more faults like these")]


def _reason(error: OSError) -> str:
    """Without the path: messages reach strangers."""
    return "is missing" if isinstance(error, FileNotFoundError) else (error.strerror or str(error)).lower()
