"""/v1/fine_tuning/jobs: train adapters on the resident base while it serves, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import APIRouter, Query
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import RequestError, TrainingError, UnknownAdapter, UnknownFile, UnknownJob
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.training.recipe import Recipe, TrainingBase, resolve
from loramux_adapters.training.start import continued
from loramux_server.api.body import read_object
from loramux_server.api.context import ApiContext
from loramux_server.api.fine_tuning_plan import FineTuningPlan, plan_view
from loramux_server.api.fine_tuning_wire import (
    FineTuningBody,
    FineTuningCheckpoint,
    FineTuningCheckpointList,
    FineTuningEvent,
    FineTuningEventList,
    FineTuningJob,
    FineTuningJobList,
    checkpoint_view,
    continuing,
    event_view,
    job_view,
    located,
    read_request,
)
from loramux_server.api.idempotency import Idempotency, key_of
from loramux_server.api.methods import refuse_others
from loramux_server.api.openapi import describe, describe_answer
from loramux_server.api.stream import DONE, EventStream, encode_event
from loramux_server.catalog import AdapterCatalog
from loramux_server.engine.messages import AdapterRef
from loramux_server.keys.principal import current_access
from loramux_server.training.job import Job
from loramux_server.training.manager import JobManager
from loramux_server.training.planner import Planner
from loramux_server.training.records import JobRequest

FINE_TUNING_BODIES: list[type[BaseModel]] = [FineTuningBody]
FINE_TUNING_ANSWERS: list[type[msgspec.Struct]] = [
    *(FineTuningJob, FineTuningJobList, FineTuningEvent, FineTuningEventList),
    *(FineTuningCheckpoint, FineTuningCheckpointList, FineTuningPlan),
]

T = TypeVar("T")

_EVENTS_AT_ONCE = 500
_FILTER = re.compile(r"metadata\[(.*)\]")


def fine_tuning_router(api: ApiContext, catalog: AdapterCatalog, jobs: JobManager) -> APIRouter:
    router = APIRouter()
    routes = FineTuningRoutes(api, catalog, jobs)
    every = "/v1/fine_tuning/jobs"
    one = f"{every}/{{job_id}}"
    table: list[tuple[str, str, Callable[..., Any], dict[str, Any]]] = [
        ("POST", every, routes.create, describe(FineTuningBody, FineTuningJob)),
        ("GET", every, routes.page, describe_answer(FineTuningJobList)),
        ("GET", one, routes.show, describe_answer(FineTuningJob)),
        ("POST", "/v1/fine_tuning/plan", routes.plan, describe(FineTuningBody, FineTuningPlan)),
        ("POST", f"{one}/cancel", routes.cancel, describe_answer(FineTuningJob)),
        ("POST", f"{one}/pause", routes.pause, describe_answer(FineTuningJob)),
        ("POST", f"{one}/resume", routes.resume, describe_answer(FineTuningJob)),
        ("GET", f"{one}/events", routes.events, describe_answer(FineTuningEventList)),
        ("GET", f"{one}/checkpoints", routes.checkpoints, describe_answer(FineTuningCheckpointList)),
    ]
    for method, path, endpoint, extra in table:
        router.add_api_route(path, endpoint, methods=[method], openapi_extra=extra)
    for path in dict.fromkeys(path for _, path, *_ in table):
        refuse_others(router, path, {method for method, other, *_ in table if other == path})
    return router


class FineTuningRoutes:
    def __init__(self, api: ApiContext, catalog: AdapterCatalog, jobs: JobManager) -> None:
        self._api = api
        self._catalog = catalog
        self._jobs = jobs
        self._repeats = Idempotency()
        self._planner = Planner(catalog, jobs.files, api.texts.another)

    async def create(self, request: Request) -> Response:
        """Queue a job that trains an adapter of the base, or one further, on an uploaded file."""
        values = await read_object(request, self._api.settings.max_body_bytes)

        async def work() -> bytes:
            asked, recipe = read_request(values)
            with ExitStack() as held:
                initial = await self._initial(asked, recipe, held)
                if recipe.init_from is None and initial is not None:
                    asked = continuing(asked)
                await asyncio.to_thread(self._check, asked, recipe, initial)
                job = await self._create(asked, initial)
            return msgspec.json.encode(job_view(job))

        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        answer = await self._repeats.once(key_of(request), digest, work)
        return Response(answer, media_type="application/json")

    async def plan(self, request: Request) -> Response:
        """What a job of this body would be: rows as they are read, steps, memory. Nothing is created."""
        asked, recipe = read_request(await read_object(request, self._api.settings.max_body_bytes))
        with ExitStack() as held:
            initial = await self._initial(asked, recipe, held)
            await asyncio.to_thread(self._check, asked, recipe, initial)
            await self._check_files(asked)
            spec = None if initial is None else await asyncio.to_thread(self._spec, initial)
            try:
                return _json(plan_view(await self._planner.plan(asked, recipe, spec)))
            except TrainingError as error:
                raise located(error, asked.paths) from None

    async def page(
        self,
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    ) -> Response:
        """The jobs, newest first; `metadata[key]=value` and `metadata=null` choose among them."""
        wanted = _metadata_filter(request)
        jobs = [job for job in self._jobs.all(current_access()) if wanted(job)]
        page, has_more = _page(jobs, [job.id for job in jobs], after, limit)
        return _json(FineTuningJobList([job_view(job) for job in page], has_more))

    async def show(self, job_id: str) -> Response:
        """One job."""
        return _json(job_view(self._get(job_id)))

    async def cancel(self, job_id: str) -> Response:
        """End a job; its checkpoints stay."""
        return _json(job_view(await self._jobs.cancel(self._get(job_id).id)))

    async def pause(self, job_id: str) -> Response:
        """Let a job wait, with a checkpoint of what it has done; the next one trains."""
        return _json(job_view(await self._jobs.pause(self._get(job_id).id)))

    async def resume(self, job_id: str) -> Response:
        """Queue a paused job again."""
        return _json(job_view(await self._jobs.resume(self._get(job_id).id)))

    async def events(
        self,
        job_id: str,
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
        stream: bool = False,
    ) -> Response:
        """What happened, newest first; with `stream`, from the beginning on and as it happens, oldest first."""
        job = self._get(job_id)
        if stream:
            return await EventStream.open(request.receive, self._follow(job), ExitStack(), {})
        database = self._jobs.database
        found, has_more = await asyncio.to_thread(database.events, job_id, after=after, limit=limit)
        return _json(FineTuningEventList([event_view(event) for event in found], has_more))

    async def checkpoints(
        self, job_id: str, after: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 10
    ) -> Response:
        """The models that the job has made so far, newest first."""
        found = await self._jobs.checkpoints(self._get(job_id))
        page, has_more = _page(found, [one.id for one in found], after, limit)
        views = [checkpoint_view(one) for one in page]
        first, last = (views[0].id, views[-1].id) if views else (None, None)
        return _json(FineTuningCheckpointList(views, first, last, has_more))

    def _get(self, job_id: str) -> Job:
        """A job never changes hands, so that who may see it may go on to use its id."""
        return self._jobs.get(job_id, current_access())

    async def _follow(self, job: Job) -> AsyncGenerator[bytes, None]:
        place = 0
        async with aclosing(self._jobs.watch(job)) as changes:
            async for _ in changes:
                while found := await asyncio.to_thread(
                    self._jobs.database.events_since, job.id, place, _EVENTS_AT_ONCE
                ):
                    for _, event in found:
                        yield encode_event(event_view(event))
                    place = found[-1][0]
        yield DONE

    async def _create(self, asked: JobRequest, initial: AdapterRef | None) -> Job:
        access = current_access()
        await self._check_files(asked)
        await asyncio.to_thread(self._catalog.quotas.check, access)
        return await self._jobs.create(asked, self._api.models.base_names[0], initial, access)

    async def _check_files(self, asked: JobRequest) -> None:
        """They are there, the caller's, and for training."""
        for field in ("training_file", "validation_file"):
            file_id = getattr(asked, field)
            if file_id is None:
                continue
            try:
                file = await asyncio.to_thread(self._jobs.files.get, file_id, current_access())
            except UnknownFile as error:
                raise UnknownFile(error.message.replace("id:", f"{field}:", 1), param=field) from None
            if file.purpose != "fine-tune":
                raise RequestError(
                    f"{field}: {file_id} is a file for '{file.purpose}', one for 'fine-tune' is needed",
                    param=field,
                )

    async def _initial(self, asked: JobRequest, recipe: Recipe, held: ExitStack) -> AdapterRef | None:
        """The adapter to train further: `model`, or `init_from` beside the base's name. Leased by `held`."""
        target = await self._api.models.lease(asked.model, held)
        if recipe.init_from is None:
            return target.adapter
        path = asked.paths["init_from"]
        if target.adapter is not None:
            message = f"{path}: model names an adapter already, which is trained further; give one of the two"
            raise RequestError(message, param=path)
        try:
            adapter = (await self._api.models.lease(recipe.init_from, held)).adapter
        except UnknownAdapter as error:
            raise UnknownAdapter(f"{path}: {error.message}", param=path) from None
        if adapter is None:
            raise RequestError(f"{path}: names the base, not an adapter", param=path)
        return adapter

    def _check(self, asked: JobRequest, recipe: Recipe, initial: AdapterRef | None) -> None:
        """What can be known to be wrong before the data is read. Raises TrainingError."""
        geometry, ready = self._catalog.geometry, self._api.engine.ready
        device = "cuda" if ready.device.startswith("cuda") else ready.device
        base = TrainingBase(geometry, hidden_size=1024, context_length=ready.context_length, device=device)
        try:
            if initial is not None:
                recipe = continued(recipe, self._spec(initial), geometry)
            validated = asked.validation_file is not None
            resolved, _ = resolve(recipe, base, units=1, validated=validated)
            if resolved.r > self._catalog.limits.max_rank:
                raise TrainingError(
                    f"r: {resolved.r} is more than the {self._catalog.limits.max_rank} that this server serves "
                    "(--max-lora-rank)",
                    param="r",
                )
        except TrainingError as error:
            raise located(error, asked.paths) from None

    def _spec(self, adapter: AdapterRef) -> AdapterSpec:
        config = (self._catalog.registry.store.path(adapter.generation) / CONFIG_FILE).read_bytes()
        return AdapterSpec.from_config(json.loads(config))


def _metadata_filter(request: Request) -> Callable[[Job], bool]:
    pairs: dict[str, str] = {}
    null = False
    for name, value in request.query_params.multi_items():
        if name == "metadata":
            if value != "null":
                raise RequestError("metadata: is null, or written as metadata[key]=value", param="metadata")
            null = True
        elif match := _FILTER.fullmatch(name):
            pairs[match[1]] = value

    def wanted(job: Job) -> bool:
        metadata = job.record.request.metadata
        if null:
            return metadata is None
        return all((metadata or {}).get(key) == value for key, value in pairs.items())

    return wanted


def _page(items: Sequence[T], ids: Sequence[str], after: str | None, limit: int) -> tuple[Sequence[T], bool]:
    """Raises UnknownJob if `after` is none of them."""
    start = 0
    if after is not None:
        if after not in ids:
            raise UnknownJob(f"after: there is no {after[:64]!a} here", param="after")
        start = 1 + ids.index(after)
    return items[start : start + limit], len(items) > start + limit


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
