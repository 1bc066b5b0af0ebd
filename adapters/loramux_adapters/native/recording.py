"""Calls of kernels, noted down to be repeated. Not what they mean: see the server's engine/tape.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Call = Callable[[], int | None]  # other than 0 or None: there was no memory


class _Recorder(threading.local):
    calls: list[Call] | None = None


recorder = _Recorder()


@contextmanager
def recorded(calls: list[Call]) -> Iterator[None]:
    """Within, this thread's calls of kernels are done and appended; they are good while their tensors' memory is there.

    Of any base's kernels: modeling code may call those of one that was loaded after its own.
    """
    recorder.calls = calls
    try:
        yield
    finally:
        recorder.calls = None
