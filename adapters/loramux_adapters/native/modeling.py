"""Puts the kernels behind transformers' modeling code: its RMS norms, its rotary embedding, its gated MLPs.

The code stays as it is; what it calls is replaced, where a probe with the module's own weights shows the same numbers: a
norm and an MLP by a subclass of their class, the rotary function of the modeling module by one that calls the kernel for
tensors it takes and the original for all others. Kernels run in inference mode only: training and whoever differentiates
get transformers' operators, whose results a recomputation repeats bit for bit. What is not recognized (Gemma's activation,
say) stays with torch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from loramux_adapters.native.library import Native, takes

logger = logging.getLogger(__name__)

# What a module raises that is called otherwise than these, or gives something else.
_OTHER = (TypeError, ValueError, RuntimeError, AttributeError)

# Of a probe's results, in bf16: how many may differ, since sums are added in another order, and by how much.
_EQUAL_SHARE, _LARGEST_DIFFERENCE = 0.98, 2**-6


def put_behind(model: nn.Module, native: Native) -> None:
    """Give the modules of a loaded bf16 model on the CPU their kernels. Again for another model: no harm."""
    swapped = {"norms": 0, "MLPs": 0}
    with torch.inference_mode():
        for module in model.modules():
            around_one = _is_norm(module, native)
            if around_one is not None:
                module.__class__ = _native_norm(type(module), native, around_one)
                swapped["norms"] += 1
            elif _is_gated(module, native):
                module.__class__ = _native_mlp(type(module), native)
                swapped["MLPs"] += 1
        rotary = _swap_rotary(model, native)
    said = ", ".join(f"{count} {what}" for what, count in swapped.items())
    logger.info("CPU kernels: %s, rotary embedding %s", said, "too" if rotary else "by torch")


def _same(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        return False
    close = torch.allclose(ours.float(), expected.float(), rtol=_LARGEST_DIFFERENCE, atol=0.0)
    return close and float((ours == expected).float().mean()) >= _EQUAL_SHARE


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


# --- norms ------------------------------------------------------------------------------------------------------------


def _epsilon(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return None


def _is_norm(module: nn.Module, native: Native) -> bool | None:
    """Whether the weight of this RMS norm is what it differs from one by; None if it is not a norm that is known."""
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if (
        not type(module).__name__.endswith("RMSNorm")
        or epsilon is None
        or not isinstance(weight, torch.Tensor)
    ):
        return None
    if weight.ndim != 1 or weight.shape[0] % 16 or not takes(weight):
        return None
    x = _random(64, weight.shape[0])
    try:
        expected = module(x)
    except _OTHER:  # another signature: whatever it does, it is not what is replaced
        return None
    for around_one in (False, True):
        if _same(native.rms_norm(x, weight, epsilon, around_one=around_one), expected):
            return around_one
    return None


def _native_norm(cls: type[nn.Module], native: Native, around_one: bool) -> type[nn.Module]:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        fits = hidden_states.shape[-1] == self.weight.shape[0]
        if torch.is_inference_mode_enabled() and fits and takes(hidden_states, self.weight):
            epsilon = _epsilon(self)
            assert epsilon is not None
            return native.rms_norm(hidden_states, self.weight, epsilon, around_one=around_one)
        result: torch.Tensor = cls.forward(self, hidden_states)
        return result

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


# --- gated MLPs -------------------------------------------------------------------------------------------------------


def _is_gated(module: nn.Module, native: Native) -> bool:
    """Whether it computes down(silu(gate(x)) * up(x)), and nothing else."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    gate_proj, _, _, act_fn = parts
    if not isinstance(gate_proj, nn.Linear) or not all(isinstance(part, nn.Module) for part in parts):
        return False
    gate, up = _random(1, 64, 64), _random(1, 64, 64).roll(1)
    if gate_proj.out_features % 16 or not _same(native.gate(gate, up), act_fn(gate) * up):  # type: ignore[misc]
        return False
    return all(
        _computes_gated(module, native, scale * _random(1, 4, gate_proj.in_features)) for scale in (1, 2**10)
    )


def _computes_gated(module: Any, native: Native, x: torch.Tensor) -> bool:
    """For this x, which may be larger than what a clamp lets through."""
    try:
        expected = module(x).float()
        ours = module.down_proj(native.gate(module.gate_proj(x), module.up_proj(x))).float()
    except _OTHER:  # it has the parts, and does something else with them
        return False
    return bool((ours - expected).norm() < _LARGEST_DIFFERENCE * expected.norm())


def _native_mlp(cls: type[nn.Module], native: Native) -> type[nn.Module]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.is_inference_mode_enabled() and takes(x) and x.ndim == 3 and x.shape[0] == 1:
            gate, up = self.gate_proj(x), self.up_proj(x)
            if gate.shape == up.shape and takes(gate, up):
                result: torch.Tensor = self.down_proj(native.gate(gate, up))
                return result
        result = cls.forward(self, x)
        return result

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


# --- rotary embedding -------------------------------------------------------------------------------------------------

_ROTARY = "apply_rotary_pos_emb"
Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _swap_rotary(model: nn.Module, native: Native) -> bool:
    modeling = sys.modules[type(model).__module__]
    found: Rotary | None = getattr(modeling, _ROTARY, None)
    if found is None:
        return False
    original: Rotary = getattr(found, "loramux_original", found)
    replacement = _native_rotary(original, native)
    q, k, angles = _random(1, 7, 3, 64), _random(1, 7, 1, 64), _random(1, 7, 32).float()
    cosine, sine = (torch.cat((f(angles), f(angles)), dim=-1).bfloat16() for f in (torch.cos, torch.sin))
    arguments = (q.transpose(1, 2), k.transpose(1, 2), cosine, sine)
    try:
        pairs = list(zip(replacement(*arguments), original(*arguments), strict=True))
    except _OTHER:  # another signature, or another result
        return False
    if not all(_same(ours, expected) for ours, expected in pairs):
        return False
    setattr(modeling, _ROTARY, replacement)
    return True


def _native_rotary(original: Rotary, native: Native) -> Rotary:
    @wraps(original)
    def rotary(*given: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if len(given) == 4 and not options and torch.is_inference_mode_enabled():
            q, k, cosine, sine = given
            if takes(*given) and _rotates(q, k, cosine, sine):
                return native.rotate(q, cosine, sine), native.rotate(k, cosine, sine)
        return original(*given, **options)

    rotary.loramux_original = original  # type: ignore[attr-defined]
    return rotary


def _rotates(q: torch.Tensor, k: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> bool:
    """q and k `[1, heads, T, size]`, cosine and sine `[1, T, size]`, whole."""
    tokens, size = q.shape[-2:]
    return (
        q.ndim == k.ndim == 4
        and q.shape[0] == k.shape[0] == 1
        and k.shape[2:] == (tokens, size)
        and cosine.shape == sine.shape == (1, tokens, size)
        and cosine.is_contiguous()
        and sine.is_contiguous()
        and size % 32 == 0
    )
