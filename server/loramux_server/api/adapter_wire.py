"""What is said about adapters on the wire: the bodies clients send and the objects they get.

Bodies are strict, and a field that is not known is refused: a misspelt `overwrite` must not be ignored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loramux_adapters.errors import RequestError
from loramux_adapters.verifications import Outcome
from loramux_adapters.verify_report import VerifyReport
from loramux_server.api.models import SYSTEM_PROMPT
from loramux_server.api.params import first_fault
from loramux_server.api.protocol import SamplingBody
from loramux_server.publishing import Options

AnyBody = TypeVar("AnyBody", bound=BaseModel)

# The fields of a request that an adapter may bring defaults for.
DEFAULTABLE = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
)


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class AdapterOptions(Body):
    """What may be said about an adapter at any time."""

    pinned: bool | None = None
    description: str | None = None
    metadata: dict[str, Any] | None = None
    default_sampling: dict[str, Any] | None = None

    def options(self) -> Options:
        if self.default_sampling:
            check_default_sampling(self.default_sampling)
        if not isinstance((self.metadata or {}).get(SYSTEM_PROMPT, ""), str):
            param = f"metadata.{SYSTEM_PROMPT}"
            raise RequestError(f"{param}: must be a string; it begins conversations", param=param)
        return Options(
            pinned=self.pinned,
            description=self.description,
            metadata=self.metadata,
            default_sampling=self.default_sampling,
        )


class NewAdapter(AdapterOptions):
    """The fields of an upload."""

    name: str = Field(min_length=1)
    overwrite: bool = False
    verify: bool = True
    allow_noop: bool = False

    def options(self) -> Options:
        return replace(
            super().options(), overwrite=self.overwrite, verify=self.verify, allow_noop=self.allow_noop
        )


class PulledAdapter(NewAdapter):
    """POST /v1/adapters with a JSON body: the server fetches the files."""

    source: str = Field(min_length=1)


class RollbackBody(Body):
    generation: str | None = Field(None, min_length=1, max_length=64)


class PlanBody(Body):
    """Either the name of an adapter, or an adapter_config.json."""

    name: str | None = None
    config: dict[str, Any] | None = None


class LoadLoraBody(BaseModel):
    """vLLM's; what it has beside these is accepted and has no effect, as there."""

    model_config = ConfigDict(strict=True)

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False


class UnloadLoraBody(BaseModel):
    model_config = ConfigDict(strict=True)

    lora_name: str = Field(min_length=1)


class GenerationEntry(msgspec.Struct):
    """A generation that the name can be rolled back to."""

    generation: str
    created: int
    source: str
    origin: str | None


class Verification(msgspec.Struct):
    """`skipped` if the uploader chose so. Lists have the verdict only."""

    verdict: Outcome
    checked_at: int | UnsetType = UNSET
    report: VerifyReport | UnsetType = UNSET


class Adapter(msgspec.Struct, tag_field="object", tag="adapter"):
    """A registered adapter. What describes its files is null if they cannot be read any more."""

    id: str
    generation: str
    state: Literal["available", "loading", "ready", "failed"]
    failure: str | None
    tier: Literal["disk", "host", "device"]
    in_flight: int
    created: int
    updated: int
    source: str
    origin: str | None
    rank: int | None
    target_modules: list[str] | None
    dtype: str | None
    bytes: int | None
    base_model: str | None
    verification: Verification | None  # null: nobody asked for it, as for adapters from folders
    pinned: bool
    description: str
    metadata: dict[str, Any]
    default_sampling: dict[str, Any]
    generations: list[GenerationEntry]
    requests: int = 0  # since the server started
    last_used: int | None = None
    warnings: list[str] | UnsetType = UNSET


class AdapterList(msgspec.Struct, tag_field="object", tag="list"):
    data: list[Adapter]
    first_id: str | None
    last_id: str | None
    has_more: bool


class AdapterDeleted(msgspec.Struct, tag_field="object", tag="adapter.deleted"):
    id: str
    in_flight: int  # requests that still run on it
    deleted: bool = True


class TierPlan(msgspec.Struct):
    """What an adapter would take of a tier, and who would make room for it now; null: those in use leave none."""

    slots: int
    slots_used: int
    resident: bool
    bytes: int
    would_evict: list[str] | None


class DevicePlan(TierPlan):
    rows: int = 0
    rows_used: int = 0
    rows_needed: int = 0


class AdapterPlan(msgspec.Struct, tag_field="object", tag="adapter.plan"):
    """`fits` is whether it can ever be served here; `reason` says why not."""

    fits: bool
    reason: str | None
    rank: int
    device: DevicePlan
    host: TierPlan


def parse(model: type[AnyBody], values: object) -> AnyBody:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise first_fault(error) from None


def check_default_sampling(values: dict[str, Any]) -> None:
    """Raises RequestError, so that a wrong default fails its upload and not every later request."""
    for name in values:
        if name not in DEFAULTABLE:
            param = f"default_sampling.{name[:64]}"
            raise RequestError(f"{param}: is not one of {', '.join(DEFAULTABLE)}", param=param)
    try:
        SamplingBody.model_validate({"model": "any", **values})
    except ValidationError as error:
        fault = first_fault(error)
        param = f"default_sampling.{fault.param}"
        raise RequestError(f"default_sampling.{fault.message}", param=param) from None
