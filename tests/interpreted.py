"""Triton kernels without a GPU: a process of its own in which they are interpreted.

How kernels run is decided when Triton is first imported, and bitsandbytes imports it, so that the tests' own process is no
place for it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import pytest
import torch


class Interpreter:
    """Calls functions of modules in the other process. Tensors are copied there and back."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def __call__(self, module: str, function: str, *arguments: Any, **keywords: Any) -> tuple[Any, list[Any]]:
        """What the function returned, and its positional arguments as it left them."""
        sent = io.BytesIO()
        torch.save((list(arguments), keywords), sent)
        received = self._pool.submit(_call, module, function, sent.getvalue()).result(timeout=300)
        result, left = torch.load(io.BytesIO(received), weights_only=False)
        return result, left


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(
            1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
    ):
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(int).result(timeout=300)  # it has started, with that in its environment
        patch.undo()
        yield Interpreter(pool)


def _call(module: str, function: str, arguments: bytes) -> bytes:
    given, keywords = torch.load(io.BytesIO(arguments), weights_only=False)
    result = getattr(import_module(module), function)(*given, **keywords)
    returned = io.BytesIO()
    torch.save((result, given), returned)
    return returned.getvalue()
