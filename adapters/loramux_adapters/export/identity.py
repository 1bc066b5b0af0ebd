"""The quantization identity of a base, put together from digests taken while its linears stream by.

`nf4.base_identity` holds every linear at once, which an export must not; this gives the same string from one
linear at a time, and from the digests that a killed export left in its journal. A test holds the two equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from loramux_adapters.export.linears import BaseLinear
from loramux_adapters.nf4 import tensor_bytes


def linear_digest(linear: BaseLinear, served_dtype: torch.dtype) -> str:
    """What one linear contributes, in hex: its codes, or its values in the compute dtype where it has no
    codes.
    """
    if linear.codes is not None:
        return linear.codes.digest().hex()
    values = linear.served(served_dtype)
    digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
    digest.update(tensor_bytes(values))
    return digest.hexdigest()


def combined_identity(linears: Iterable[tuple[str, str]]) -> str:
    """The identity of a base from (full module name, digest) of every linear."""
    total = hashlib.sha256()
    for name, digest in sorted(linears):
        total.update(name.encode() + b"\0" + bytes.fromhex(digest))
    return total.hexdigest()
