"""The files of a training job, read and tokenized in a process of their own. No torch.

A child and not a thread: reading is Python, and a thread of it would hold the interpreter's lock for milliseconds between
any two operations of a decoding step. Promises: the child runs at low priority and ends with its parent, or when it is
closed; what goes wrong in it is raised by `result`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from loramux_adapters.errors import LoramuxError, TrainingError
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.training.inputs import TrainingInputs, read_inputs
from loramux_adapters.training.recipe import Recipe, TrainingBase

_NICE = 10
_CONTEXT = multiprocessing.get_context("spawn")  # a fork would inherit the device and the socket


@dataclass(frozen=True)
class TokenizerSource:
    """Where the base's tokenizer is, and the file of a chat template used instead of its own."""

    model: str
    revision: str | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class ReadRequest:
    """What `read_inputs` takes, with the tokenizer yet to be loaded."""

    base: TrainingBase
    tokenizer: TokenizerSource
    recipe: Recipe
    training_file: str
    validation_file: str | None
    initial: AdapterSpec | None


class Reading:
    """One request under way in a child."""

    def __init__(self, request: ReadRequest) -> None:
        self._answer, answer = _CONTEXT.Pipe(duplex=False)
        with answer:
            self._child = _CONTEXT.Process(target=_child, args=(request, answer), daemon=True)
            self._child.start()

    def done(self) -> bool:
        return self._answer.poll()  # also when the child has ended without a word

    def result(self) -> TrainingInputs:
        """Waits if it is not done. Raises what the child raised."""
        try:
            answer = self._answer.recv()
        except EOFError:
            self._child.join()
            raise TrainingError(
                f"the process that reads the training files ended with exit code {self._child.exitcode}",
                param="training_file",
                code="reading_failed",
            ) from None
        if isinstance(answer, LoramuxError):
            raise answer
        assert isinstance(answer, TrainingInputs)
        return answer

    def close(self) -> None:
        """Leave no child, done or not."""
        self._child.kill()
        self._child.join()
        self._answer.close()


def read(request: ReadRequest) -> TrainingInputs:
    """In the calling process. Raises TrainingError."""
    from transformers import AutoTokenizer

    source = request.tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.model, revision=source.revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(
            f"cannot read the tokenizer of '{source.model}': {reason}", param="model"
        ) from error
    template = None
    if source.chat_template is not None:
        try:
            template = Path(source.chat_template).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingError(
                f"the chat template {source.chat_template} cannot be read: {error}", param="model"
            ) from error
    return read_inputs(
        request.base,
        tokenizer,
        request.recipe,
        Path(request.training_file),
        validation_file=None if request.validation_file is None else Path(request.validation_file),
        initial=request.initial,
        chat_template=template,
    )


def _child(request: ReadRequest, answer: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent says when
        signal.signal(name, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    try:
        answer.send(read(request))
    except LoramuxError as error:
        answer.send(error)
    except MemoryError:
        answer.send(TrainingError("not enough memory to read the files", code="not_enough_memory"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
