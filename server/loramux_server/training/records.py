"""What is kept of files and fine-tuning jobs: values that never change, as the database has them.

`status` is what the job is to be, `paused` and `cancelled` from the moment somebody asked for it; the trainer may still be
about to stop. Names are OpenAI's where OpenAI has them.
"""

from __future__ import annotations

import time
from typing import Any, Literal
from uuid import uuid4

import msgspec

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics"]
Purpose = Literal["fine-tune", "fine-tune-results"]

STATUSES: tuple[Status, ...] = (
    *("validating_files", "queued", "running", "paused"),
    *("succeeded", "failed", "cancelled"),
)
FINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid4().hex[:24]}"


class FileRecord(msgspec.Struct, frozen=True):
    """A file of the files API; its bytes lie under its id."""

    id: str
    filename: str
    purpose: Purpose
    num_bytes: int
    created: float
    owner: str = ""  # the tenant whose it is; "" is the operator


class JobFault(msgspec.Struct, frozen=True):
    """Why a job failed. `param` is the path of the field as the caller wrote it."""

    message: str
    code: str
    param: str | None = None


class JobEvent(msgspec.Struct, frozen=True):
    """`step` is set for metrics of a step."""

    id: str
    created: float
    level: Level
    message: str
    type: EventType = "message"
    data: dict[str, Any] = {}
    step: int | None = None

    @classmethod
    def saying(cls, message: str, level: Level = "info", data: dict[str, Any] | None = None) -> JobEvent:
        return cls(new_id("ftevent-"), time.time(), level, message, data=data or {})

    @classmethod
    def metrics(cls, step: int, message: str, data: dict[str, Any]) -> JobEvent:
        return cls(new_id("ftevent-"), time.time(), "info", message, "metrics", data, step)


class CheckpointRecord(msgspec.Struct, frozen=True):
    """A published checkpoint; `model` is the name it is called by."""

    id: str
    job: str
    step: int
    created: float
    model: str
    generation: str
    metrics: dict[str, float]


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for, checked. `recipe` are the fields that were given; `paths` says where a field was written."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int
    metadata: dict[str, str] | None = None
    recipe: dict[str, Any]
    paths: dict[str, str] = {}


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`queued` is the place in the queue; `name` becomes the model's, and its checkpoints' names begin with it."""

    id: str
    request: JobRequest
    name: str
    created: float
    queued: float
    status: Status = "validating_files"
    validated: bool = False
    initial: str | None = None  # generation of the adapter that is trained further
    started: float | None = None
    finished: float | None = None
    resolved: dict[str, Any] | None = None  # the recipe in numbers, once the data is read
    total_steps: int | None = None
    interruptions: int = 0  # by the worker's end, since the last checkpoint
    trained_tokens: int | None = None
    fine_tuned_model: str | None = None
    result_files: list[str] = []
    error: JobFault | None = None
    owner: str = ""  # the tenant whose it is, and whose its files and models are; "" is the operator

    @property
    def ended(self) -> bool:
        return self.status in FINAL
