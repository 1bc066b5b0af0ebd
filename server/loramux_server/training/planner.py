"""Planner: what a fine-tuning job would be, from its files and fields; nothing is kept of it.

Promises: one plan at a time, on a thread and with a tokenizer of its own, so that requests do not wait for it; the files'
faults are those that the job would end with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loramux_adapters.errors import TrainingError
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.training.outlook import Outlook, outlook
from loramux_adapters.training.recipe import Recipe, TrainingBase
from loramux_server.catalog import AdapterCatalog
from loramux_server.training.files import FileStore
from loramux_server.training.folder import FileField, JobFolder
from loramux_server.training.records import JobRequest

_FIELDS: tuple[FileField, ...] = ("training_file", "validation_file")


class Planner:
    """`tokenizer` gives one that nobody else uses, with the chat template used instead of its own."""

    def __init__(
        self, catalog: AdapterCatalog, files: FileStore, tokenizer: Callable[[], tuple[Any, str | None]]
    ) -> None:
        self._catalog = catalog
        self._files = files
        self._tokenizer = tokenizer
        self._own: tuple[Any, str | None] | None = None
        self._one_at_a_time = asyncio.Lock()

    async def plan(self, asked: JobRequest, recipe: Recipe, initial: AdapterSpec | None) -> Outlook:
        """Raises UnknownFile, TrainingError."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._plan, asked, recipe, initial)

    def _plan(self, asked: JobRequest, recipe: Recipe, initial: AdapterSpec | None) -> Outlook:
        if self._own is None:
            self._own = self._tokenizer()
        tokenizer, template = self._own
        ready = self._catalog.engine.ready
        decoder = ready.decoder
        if decoder is None:
            raise TrainingError("this server does not know its base's shape", param="model")
        with TemporaryDirectory(prefix="plan-", dir=self._catalog.staging) as directory:
            folder = JobFolder(Path(directory) / "job")
            folder.create()
            paths = {field: self._linked(folder, field, getattr(asked, field)) for field in _FIELDS}
            training_file = paths["training_file"]
            assert training_file is not None
            device = ready.device.partition(":")[0]
            return outlook(
                TrainingBase(self._catalog.geometry, decoder.hidden, ready.context_length, device),
                tokenizer,
                recipe,
                training_file,
                decoder=decoder,
                dtype_bytes=4 if ready.dtype == "float32" else 2,
                validation_file=paths["validation_file"],
                initial=initial,
                chat_template=template,
            )

    def _linked(self, folder: JobFolder, field: FileField, file_id: str | None) -> Path | None:
        """The file under its own name, which its faults are told with."""
        if file_id is None:
            return None
        folder.keep_file(field, self._files, file_id)
        (path,) = (folder.path / field).iterdir()
        return path
