"""What is said about fine-tuning jobs on the wire, in OpenAI's shapes: a new one's body, and the objects that tell of it.

A field that is not known is refused: a misspelt one must not be ignored for hours of training. What a recipe may say is
`Recipe`'s knowledge; it may stand under `method.supervised.hyperparameters`, under the older `hyperparameters`, or at the
top, where OpenAI's client puts its `extra_body`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, StringConstraints

from loramux_adapters.errors import RequestError, TrainingError
from loramux_adapters.training.recipe import DEFAULT_SEED, Recipe
from loramux_server.api.adapter_wire import Body, parse
from loramux_server.api.errors import unsupported
from loramux_server.training.job import Job
from loramux_server.training.records import (
    CheckpointRecord,
    EventType,
    JobEvent,
    JobRequest,
    Level,
    Status,
)

ORGANIZATION = "org-loramux"  # clients want one
MAX_METADATA = 16

_METHOD = "method.supervised.hyperparameters"
_MULTIPLIED = ("batch_size", "learning_rate_multiplier", "n_epochs")  # OpenAI's own hyperparameters

MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
FileId = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class SupervisedMethod(Body):
    hyperparameters: dict[str, Any] | None = None


class Method(Body):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedMethod | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class FineTuningBody(Body):
    """POST /v1/fine_tuning/jobs. The fields of a recipe may stand beside these, too."""

    model: str = Field(min_length=1, max_length=256)
    training_file: FileId
    validation_file: FileId | None = None
    suffix: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    seed: int | None = Field(None, ge=0, lt=2**31)
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=MAX_METADATA)
    method: Method | None = None
    hyperparameters: dict[str, Any] | None = None
    integrations: list[dict[str, Any]] | None = None


def read_request(values: Mapping[str, object]) -> tuple[JobRequest, Recipe]:
    """What a body asks for. Raises RequestError or TrainingError, whose `param` is the path of the field."""
    extras = {name: value for name, value in values.items() if name in Recipe.model_fields and name != "seed"}
    body = parse(FineTuningBody, {name: value for name, value in values.items() if name not in extras})
    _refuse(body)
    groups: list[tuple[str, Mapping[str, object]]] = [("", extras)]
    supervised = body.method.supervised if body.method else None
    if supervised is not None and supervised.hyperparameters is not None:
        groups.append((_METHOD, supervised.hyperparameters))
    if body.hyperparameters is not None:
        groups.append(("hyperparameters", body.hyperparameters))
    recipe, fields, paths = _recipe(body, groups)
    seed = DEFAULT_SEED if recipe.seed == "auto" else recipe.seed
    request = JobRequest(
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=seed,
        metadata=body.metadata,
        recipe={**fields, "seed": seed},
        paths=paths,
    )
    return request, recipe


def continuing(request: JobRequest) -> JobRequest:
    """The same request, where `model` names an adapter that is to be trained further."""
    return msgspec.structs.replace(
        request,
        recipe={**request.recipe, "init_from": request.model},
        paths={**request.paths, "init_from": "model"},
    )


def _refuse(body: FineTuningBody) -> None:
    """What OpenAI has and this server does not."""
    if body.integrations:
        raise unsupported("integrations", "'integrations' is not supported by this server; leave it out")
    if body.method is None:
        return
    for kind in ("dpo", "reinforcement"):
        if body.method.type == kind:
            message = f"method.type: '{kind}' is not supported by this server; 'supervised' is"
            raise unsupported("method.type", message)
        if getattr(body.method, kind) is not None:
            raise unsupported(f"method.{kind}", f"'method.{kind}' is not supported by this server")


def _recipe(
    body: FineTuningBody, groups: list[tuple[str, Mapping[str, object]]]
) -> tuple[Recipe, dict[str, Any], dict[str, str]]:
    """All hyperparameters together, as given, and where each of them stood."""
    fields: dict[str, Any] = {}
    paths: dict[str, str] = {}
    if body.seed is not None:
        fields["seed"], paths["seed"] = body.seed, "seed"
    for where, group in groups:
        for name, value in group.items():
            path = f"{where}.{name}" if where else name
            if name in fields:
                raise RequestError(f"{path[:128]}: is given as {paths[name]} already", param=path[:128])
            if value is not None:
                fields[name], paths[name] = value, path
    try:
        return Recipe.parse(fields), fields, paths
    except TrainingError as error:
        raise located(error, paths) from None


def located(error: TrainingError, paths: Mapping[str, str]) -> TrainingError:
    """The same fault under the path that the caller wrote."""
    return TrainingError(error.message, param=paths.get(error.param or "", error.param), code=error.code)


class JobError(msgspec.Struct):
    code: str
    message: str
    param: str | None


class SupervisedView(msgspec.Struct):
    hyperparameters: dict[str, Any]


class MethodView(msgspec.Struct):
    supervised: SupervisedView
    type: Literal["supervised"] = "supervised"


class FineTuningJob(msgspec.Struct, tag_field="object", tag="fine_tuning.job"):
    """`hyperparameters` are in numbers as soon as the data is read; before that, what was given, and "auto"."""

    id: str
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    status: Status
    hyperparameters: dict[str, Any]
    method: MethodView
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    error: JobError | None
    estimated_finish: int | None
    metadata: dict[str, str] | None
    integrations: list[dict[str, Any]] = []
    organization_id: str = ORGANIZATION


class FineTuningJobList(msgspec.Struct, tag_field="object", tag="list"):
    data: list[FineTuningJob]
    has_more: bool


class FineTuningEvent(msgspec.Struct, tag_field="object", tag="fine_tuning.job.event"):
    id: str
    created_at: int
    level: Level
    message: str
    type: EventType
    data: dict[str, Any]


class FineTuningEventList(msgspec.Struct, tag_field="object", tag="list"):
    """Newest first."""

    data: list[FineTuningEvent]
    has_more: bool


class CheckpointMetrics(msgspec.Struct):
    step: int
    train_loss: float | None
    train_mean_token_accuracy: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None


class FineTuningCheckpoint(msgspec.Struct, tag_field="object", tag="fine_tuning.job.checkpoint"):
    id: str
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: CheckpointMetrics


class FineTuningCheckpointList(msgspec.Struct, tag_field="object", tag="list"):
    """Newest first."""

    data: list[FineTuningCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


def job_view(job: Job) -> FineTuningJob:
    record, request = job.record, job.record.request
    hyperparameters = _hyperparameters(request, record.resolved)
    finish = job.progress.finish if job.progress is not None and record.status == "running" else None
    return FineTuningJob(
        id=record.id,
        created_at=int(record.created),
        finished_at=None if record.finished is None else int(record.finished),
        model=request.model,
        fine_tuned_model=record.fine_tuned_model,
        status=record.status,
        hyperparameters=hyperparameters,
        method=MethodView(SupervisedView(hyperparameters)),
        training_file=request.training_file,
        validation_file=request.validation_file,
        result_files=record.result_files,
        trained_tokens=record.trained_tokens,
        seed=request.seed,
        error=None
        if record.error is None
        else JobError(record.error.code, record.error.message, record.error.param),
        estimated_finish=None if finish is None else int(finish),
        metadata=request.metadata,
    )


def _hyperparameters(request: JobRequest, resolved: Mapping[str, Any] | None) -> dict[str, Any]:
    asked = {name: value for name, value in request.recipe.items() if name != "seed"}
    shown = {**dict.fromkeys(_MULTIPLIED, "auto"), **asked}
    if resolved is None:
        return shown
    if shown["learning_rate_multiplier"] == "auto":
        shown["learning_rate_multiplier"] = 1.0
    return {**shown, **{name: value for name, value in resolved.items() if name != "seed"}}


def event_view(event: JobEvent) -> FineTuningEvent:
    return FineTuningEvent(event.id, int(event.created), event.level, event.message, event.type, event.data)


def checkpoint_view(checkpoint: CheckpointRecord) -> FineTuningCheckpoint:
    measured = {**dict.fromkeys(CheckpointMetrics.__struct_fields__), **checkpoint.metrics}
    return FineTuningCheckpoint(
        id=checkpoint.id,
        created_at=int(checkpoint.created),
        fine_tuning_job_id=checkpoint.job,
        fine_tuned_model_checkpoint=checkpoint.model,
        step_number=checkpoint.step,
        metrics=msgspec.convert({**measured, "step": checkpoint.step}, CheckpointMetrics),
    )
