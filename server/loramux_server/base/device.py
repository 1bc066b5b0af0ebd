"""Where a base computes and in which type: what was asked for, or what this machine does best."""

from __future__ import annotations

import torch

from loramux_adapters.errors import BaseModelError


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA when torch sees a device. Raises BaseModelError for a device that is not there."""
    if name not in {"auto", "cpu"} and not name.startswith("cuda"):
        raise BaseModelError(f"--device {name}: choose auto, cpu or cuda", param="device")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BaseModelError("--device cuda: torch sees no CUDA device on this machine", param="device")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device, products: str | None = None) -> torch.dtype:
    """The compute dtype. On CPUs without bf16 arithmetic fp32 is faster, unless compiled kernels have `products`."""
    known = {
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
        "half": torch.float16,
        "float32": torch.float32,
        "fp32": torch.float32,
        "float": torch.float32,
    }
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        fast = products is not None or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if name not in known:
        raise BaseModelError(f"--dtype {name}: choose auto, bfloat16, float16 or float32", param="dtype")
    if known[name] == torch.float16 and device.type == "cpu":
        raise BaseModelError(
            "--dtype float16: not supported on the CPU; choose bfloat16 or float32", param="dtype"
        )
    return known[name]
