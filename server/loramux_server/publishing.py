"""From staged files to a name: gate, store, verify, publish.

Promises: a name never points at what was refused; until the name does, the stored generation is a candidate that goes
when its publication fails, unless something else refers to it; no memory holds an adapter while it waits for its
verification. Disk work runs on threads, verification in the worker. HTTP is `api/`, what names mean is the registry's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from loramux_adapters.access import Access
from loramux_adapters.adapter_files import GateLimits
from loramux_adapters.errors import AccessDenied, AdapterConflict, EngineError, InvalidAdapter, UnknownAdapter
from loramux_adapters.files import storage_error
from loramux_adapters.leases import Claim
from loramux_adapters.probe import Probe
from loramux_adapters.registry import AdapterRecord, AdapterRegistry, Source
from loramux_adapters.sources import Staged
from loramux_adapters.spec import BaseGeometry
from loramux_server.engine.interface import EngineClient
from loramux_server.engine.messages import AdapterRef
from loramux_server.metrics import Metrics
from loramux_server.pins import Pins
from loramux_server.quotas import Quotas

MAX_GATES = 2  # adapters read into memory at once


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a client says about an adapter. None keeps what is there, or means the default."""

    overwrite: bool = False
    verify: bool = True
    allow_noop: bool = False  # publish it though it changes nothing
    within_quota: bool = True  # False: counted, never refused
    pinned: bool | None = None
    description: str | None = None
    metadata: Mapping[str, object] | None = None
    default_sampling: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Published:
    """What a name means now, and what its uploader should know though it refuses nothing."""

    record: AdapterRecord
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Candidate:
    """A stored generation that no name means yet. It stays until `claim` ends."""

    generation: str
    rank: int
    source: Source
    origin: str
    warnings: tuple[str, ...]
    claim: Claim


def check_pinning(options: Options, access: Access) -> None:
    """Places that are pinned are taken from everybody. Raises AccessDenied."""
    if options.pinned and not access.is_operator:
        raise AccessDenied("pinned: only an admin key may keep an adapter on the device", param="pinned")


class Publisher:
    def __init__(
        self,
        registry: AdapterRegistry,
        engine: EngineClient,
        metrics: Metrics,
        geometry: BaseGeometry,
        probe: Probe,
        pins: Pins,
        quotas: Quotas,
        changing: Lock,
    ) -> None:
        """`changing` guards what may be pinned against other changes of names."""
        self._registry = registry
        self._engine = engine
        self._metrics = metrics
        self._geometry = geometry
        self._probe = probe
        self._pins = pins
        self._quotas = quotas
        self._changing = changing
        self._gates = asyncio.Semaphore(MAX_GATES)

    async def publish(
        self, name: str, stage: Callable[[], Staged], options: Options, limits: GateLimits, access: Access
    ) -> Published:
        """Pass what `stage` brings through the gate, verify it and point the name at it. `stage` runs on a thread.

        Raises InvalidAdapter with every fault or with what verification found, AdapterConflict for the name or the pin,
        AccessDenied for what `access` may not do, QuotaExceeded, RequestError, StorageError, EngineError if the worker
        cannot verify now, and AdapterUnavailable when a source cannot be reached.
        """
        self._registry.check_name(name)
        await asyncio.to_thread(self._check, name, None, options, access)
        if options.verify and self._engine.state not in ("ready", "draining"):
            raise EngineError(f"the engine is {self._engine.state}, and verifies uploads; try again shortly")
        with await asyncio.to_thread(self._stage, name, stage) as staged:
            async with self._gates:
                candidate = await asyncio.to_thread(self._store, name, staged, options, limits)
        try:
            await self._verify(name, candidate.generation, options)
            record = await asyncio.to_thread(self._point, name, candidate, options, access)
        finally:
            await asyncio.to_thread(candidate.claim.release)
        return Published(record, candidate.warnings)

    async def _verify(self, name: str, generation: str, options: Options) -> None:
        report = None
        if options.verify:
            path = await asyncio.to_thread(self._registry.store.path, generation)
            report = await self._engine.verify(AdapterRef(generation, str(path)), self._probe)
            with self._counting(name):
                report.require(allow_noop=options.allow_noop)
        await asyncio.to_thread(self._registry.verifications.save, generation, report)

    # --- the blocking parts ----------------------------------------------------------------------------------------

    def _stage(self, name: str, stage: Callable[[], Staged]) -> Staged:
        try:
            with self._counting(name):
                return stage()
        except OSError as error:
            raise storage_error("the adapter cannot be stored", error) from error

    @contextmanager
    def _counting(self, name: str) -> Iterator[None]:
        try:
            yield
        except InvalidAdapter as error:
            self._metrics.adapter_rejected()
            raise InvalidAdapter(error.faults, name=name) from None

    def _store(self, name: str, staged: Staged, options: Options, limits: GateLimits) -> _Candidate:
        from loramux_adapters.weights import LoraWeights

        with self._counting(name):
            weights = LoraWeights.read(staged.directory, self._geometry, limits=limits)
        generation = weights.generation
        if not options.overwrite:
            self._check_free(name, generation)
        claim = self._registry.hold(generation)
        try:
            origin = {"source": staged.source, "origin": staged.origin}
            self._registry.store.publish(weights, {**staged.info, **origin})
        except BaseException:
            claim.release()
            raise
        warnings = weights.spec.warnings(self._geometry)
        return _Candidate(generation, weights.rank, staged.source, staged.origin, warnings, claim)

    def _check_free(self, name: str, generation: str) -> None:
        """`put` decides; this spares storing and verifying what it would refuse."""
        try:
            current = self._registry.get(name)
        except UnknownAdapter:
            return
        if current.generation != generation:
            raise AdapterConflict(f"name: '{name}' is taken; set overwrite to replace it", param="name")

    def _check(self, name: str, generation: str | None, options: Options, access: Access) -> None:
        """May it be published, as far as is known? `_point` decides."""
        check_pinning(options, access)
        self._registry.check_change(name, access)
        if options.within_quota:
            self._quotas.check(access, name, generation)

    def _point(self, name: str, candidate: _Candidate, options: Options, access: Access) -> AdapterRecord:
        with self._changing:
            self._check(name, candidate.generation, options, access)
            # A name that is pinned already stays so, and its new generation may be larger.
            stays = options.pinned is None and name in self._registry and self._registry.get(name).pinned
            if options.pinned or stays:
                self._pins.check(name, candidate.rank)
            return self._registry.put(
                name,
                candidate.generation,
                source=candidate.source,
                origin=candidate.origin,
                access=access,
                overwrite=options.overwrite,
                pinned=options.pinned,
                description=options.description,
                metadata=options.metadata,
                default_sampling=options.default_sampling,
            )
