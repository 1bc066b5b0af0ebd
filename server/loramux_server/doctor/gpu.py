"""The device: what torch sees of it, and whether bitsandbytes' 4-bit kernels compute on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from loramux_server.doctor.finding import Finding, fault, note, ok

GIB = 2**30
_LEAST_CAPABILITY = (7, 5)
_LARGEST_ERROR = 0.15  # of NF4, relative to the largest weight of a block of 64
_CPU_ADVICE = "for a GPU, install its driver and a torch built for CUDA"


def gpu(device: str) -> Iterator[Finding]:
    """`device` is what the server will be asked for: auto, cpu or cuda."""
    import torch

    wanted = device != "cpu"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        found = "torch sees no CUDA device" if built else "this torch is built without CUDA"
        if device.startswith("cuda"):
            advice = "look whether nvidia-smi lists it" if built else "install a torch that is built for CUDA"
            yield fault("gpu", found, f"{advice}, or serve with --device cpu")
        elif wanted:
            yield note("gpu", f"{found}: the CPU is used", _CPU_ADVICE)
    elif wanted:
        for index in range(torch.cuda.device_count()):
            yield from _device(torch, index)
    yield bitsandbytes("cuda" if wanted and torch.cuda.is_available() else "cpu")


def _device(torch: Any, index: int) -> Iterator[Finding]:
    name = f"gpu {index}"
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    free, total = torch.cuda.mem_get_info(index)
    found = (
        f"{properties.name}, compute capability {capability[0]}.{capability[1]}, CUDA {torch.version.cuda}, "
        f"driver {_driver(torch)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    )
    if capability < _LEAST_CAPABILITY:
        yield fault(name, found, "choose a GPU of compute capability 7.5 (Turing) or newer, or --device cpu")
    else:
        yield ok(name, found)
    if free < total // 2:
        yield note(
            name,
            "more than half of its memory is in use by others",
            "stop them (nvidia-smi lists them), or lower --gpu-memory-utilization",
        )


def _driver(torch: Any) -> str:
    code = torch._C._cuda_getDriverVersion()
    return f"for CUDA {code // 1000}.{code % 1000 // 10}"


def bitsandbytes(device: str) -> Finding:
    """Quantize a weight, and look at what comes back."""
    check = "bitsandbytes"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # advice about optional kernels
    try:
        import torch
        from bitsandbytes import functional

        weight = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        back = functional.dequantize_4bit(packed, state)
        error = float((back - weight).abs().max())
    # A broken installation of compiled code fails in any way it likes.
    except Exception as problem:  # noqa: BLE001
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        return fault(
            check,
            f"does not compute on {device}: {reason}",
            "install a bitsandbytes that fits this torch and its CUDA version: pip install -U bitsandbytes",
        )
    if not error <= _LARGEST_ERROR:
        return fault(
            check,
            f"NF4 on {device} is off by {error:.2f}",
            "its kernels do not fit this device: pip install -U bitsandbytes",
        )
    return ok(check, f"NF4 computes on {device}")
