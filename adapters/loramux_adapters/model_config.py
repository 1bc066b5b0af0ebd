"""What transformers says about a model's config.json, as one sentence.

A config is a stranger's file, and modeling code computes with its values before it judges them: zero attention heads are a
division by zero, a list for a number is a TypeError. Promises: whatever such a file makes it raise becomes a BaseModelError.
Says nothing about weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError

from loramux_adapters.errors import BaseModelError

# That happen while computing with a value; their messages name neither the file nor the field.
_COMPUTING = (ArithmeticError, AttributeError, LookupError, TypeError)
CONFIG_FAULTS: tuple[type[Exception], ...] = (
    *_COMPUTING,
    *(OSError, RuntimeError, ValueError, StrictDataclassError),
)


@contextmanager
def faults_said(what: str) -> Iterator[None]:
    """`what` begins the sentence, as in "cannot read the model 'x'"."""
    try:
        yield
    except CONFIG_FAULTS as error:
        raise BaseModelError(f"{what}: {reason(error)}", param="model") from error


def reason(error: BaseException) -> str:
    """In one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"its config.json does not fit together ({said})" if isinstance(error, _COMPUTING) else said
