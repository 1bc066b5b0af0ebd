"""The autograd mode of one slice of training. Does not outlive the slice: whoever runs between two has its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loramux_adapters.errors import TrainingError


@contextmanager
def computing(*, grad: bool) -> Iterator[None]:
    """The autograd mode of one slice, whatever the caller is in; an engine may run in inference mode.

    Raises TrainingError when device memory runs out: the run has failed, the base and whoever else uses it have not.
    """
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = (str(error) or "no memory is left").splitlines()[0]
            raise TrainingError(
                f"not enough device memory to train ({reason}); try a smaller batch_size with more "
                "gradient_accumulation_steps, or a smaller max_seq_length",
                code="out_of_memory",
            ) from None  # the traceback would keep the layer's activations alive
