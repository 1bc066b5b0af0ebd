"""Every error loramux raises on purpose, drawn as one tree.

    LoramuxError
    ├── ConfigError            a flag, environment variable or file setting is wrong
    ├── BaseModelError         the base model cannot be found, read or quantized
    ├── AdapterError
    │   ├── InvalidAdapter     the files do not pass the gate; carries every fault at once
    │   ├── UnknownAdapter     no adapter (or generation) of that name
    │   ├── AdapterConflict    the name is taken, or the change contradicts its state
    │   │   └── NameTaken      by somebody whose adapters the caller cannot see
    │   └── AdapterUnavailable the adapter exists but could not be made resident
    ├── AccessDenied           whoever asks may not do that
    │   └── QuotaExceeded      because he has as much as he may have
    ├── RequestError           a request asks for something it cannot have
    │   ├── ContextLengthExceeded
    │   └── UnknownFile        no uploaded file of that id
    ├── EngineError            the worker failed, is restarting or is draining
    │   ├── Overloaded         too much of something is under way already
    │   │   └── QueueFull      because the engine's queue is full
    │   └── RequestTimeout     an answer was not complete in time
    ├── StorageError           the data directory cannot be read or written
    │   ├── StorageFull        because there is no room left
    │   └── StorageDamaged     because its bytes are not those that were written
    ├── TrainingError          a data set, recipe or job is wrong
    │   └── UnknownJob         no fine-tuning job of that id
    └── ExportError            a merge cannot be planned, written or proven
        └── UnknownExport      no export job of that id

Rules: a message is one sentence (or one line a fault) that names the field and what to do; `param` is the
field's name as the caller wrote it; `code` is stable and machine-readable; errors are picklable, because they
cross the process boundary. What HTTP status each becomes is the server's business, not this file's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class LoramuxError(Exception):
    """Base of all errors. `message` is for people, `code` for programs, `param` names the field at fault."""

    code = "loramux_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.__dict__ | {"message": self.message}))


def _rebuild(cls: type[LoramuxError], state: dict[str, object]) -> LoramuxError:
    error = cls.__new__(cls)
    Exception.__init__(error, state["message"])
    error.__dict__.update(state)
    return error


class ConfigError(LoramuxError, ValueError):
    code = "invalid_config"


class BaseModelError(LoramuxError):
    code = "base_model_error"


class AdapterError(LoramuxError):
    code = "adapter_error"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with an adapter's files: `where` names the config field, tensor or file."""

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


class InvalidAdapter(AdapterError, ValueError):
    """The files do not pass the gate. `faults` lists every one of them, so that one upload tells all."""

    code = "invalid_adapter"
    faults: tuple[Fault, ...] = ()

    def __init__(self, faults: Sequence[Fault], *, name: str | None = None) -> None:
        self.faults = tuple(faults)
        self.name = name
        head = f"adapter '{name}' is refused" if name else "the adapter is refused"
        super().__init__(
            f"{head}: " + "; ".join(str(fault) for fault in self.faults),
            param=self.faults[0].where if len(self.faults) == 1 else None,
        )


class UnknownAdapter(AdapterError, LookupError):
    code = "model_not_found"


class AdapterConflict(AdapterError):
    code = "adapter_conflict"


class NameTaken(AdapterConflict):
    code = "name_taken"


class AdapterUnavailable(AdapterError):
    code = "adapter_unavailable"


class AccessDenied(LoramuxError):
    code = "permission_denied"


class QuotaExceeded(AccessDenied):
    code = "quota_exceeded"


class RequestError(LoramuxError, ValueError):
    code = "invalid_request"


class ContextLengthExceeded(RequestError):
    code = "context_length_exceeded"


class UnknownFile(RequestError, LookupError):
    code = "file_not_found"


class EngineError(LoramuxError):
    code = "engine_unavailable"


class Overloaded(EngineError):
    code = "overloaded"


class QueueFull(Overloaded):
    code = "queue_full"
    retry_after = 1.0  # seconds: places come free with every answer


class RequestTimeout(EngineError):
    code = "request_timeout"


class StorageError(LoramuxError):
    code = "storage_error"


class StorageFull(StorageError):
    code = "storage_full"


class StorageDamaged(StorageError):
    code = "storage_damaged"


class TrainingError(LoramuxError, ValueError):
    code = "invalid_training"


class UnknownJob(TrainingError, LookupError):
    code = "job_not_found"


class ExportError(LoramuxError):
    code = "export_error"


class UnknownExport(ExportError, LookupError):
    code = "export_not_found"
