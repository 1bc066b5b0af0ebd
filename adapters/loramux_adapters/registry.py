"""AdapterRegistry: which generation a name means, what it meant before, and who is using it right now.

Reads never touch the disk: every record lives in memory, and a record handed out never changes. A change is
durable before it is visible. A generation stays in the store while a name, its history or a lease needs it.
What an `Access` may not see is to it as if it did not exist; whose a record is never changes.
One process owns the registry; its methods may be called from any thread. No torch.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from loramux_adapters.access import OPERATOR, Access
from loramux_adapters.errors import AdapterConflict, StorageError, UnknownAdapter
from loramux_adapters.leases import Claim, Lease
from loramux_adapters.names import check_name, split_pin
from loramux_adapters.registry_db import AdapterRecord, HistoryEntry, RegistryDatabase, Scanned, Source, State
from loramux_adapters.store import GenerationStore
from loramux_adapters.verifications import Verifications

__all__ = ["AdapterRecord", "AdapterRegistry", "HistoryEntry", "Lease", "Scanned", "Source", "State"]

KEEP_HISTORY = 10


class AdapterRegistry:
    """Names over a GenerationStore. `reserved` are names no adapter may take: the base model's."""

    def __init__(
        self,
        db_path: Path,
        store: GenerationStore,
        *,
        reserved: Collection[str] = (),
        keep_history: int = KEEP_HISTORY,
    ) -> None:
        self.store = store
        self._reserved = frozenset(reserved)
        self._keep_history = keep_history
        self._writing = threading.RLock()  # serialises changes; held during disk writes
        self._reading = threading.Lock()  # guards the four below; held for an instant
        self._database = RegistryDatabase(db_path)
        self.verifications = Verifications(self._database, self._writing)
        self._records = {record.name: record for record in self._database.records()}
        self._names = sorted(self._records)
        self._in_flight: Counter[tuple[str, str]] = Counter()  # by name and generation
        self._states: dict[str, tuple[State, str]] = {}

    def close(self) -> None:
        with self._writing:
            self._database.close()

    def check_name(self, name: str) -> str:
        """The name itself, if an adapter may have it; whether it is taken is another question."""
        return check_name(name, self._reserved)

    def put(
        self,
        name: str,
        generation: str,
        *,
        source: Source,
        origin: str = "",
        access: Access = OPERATOR,
        overwrite: bool = True,
        pinned: bool | None = None,
        description: str | None = None,
        metadata: Mapping[str, object] | None = None,
        default_sampling: Mapping[str, object] | None = None,
    ) -> AdapterRecord:
        """Point a name at a published generation. What is None keeps its value, or gets the default.

        Without `overwrite` a taken name is a conflict, unless it means this very generation already.
        """
        self.check_name(name)
        with self._writing:
            if generation not in self.store:
                raise StorageError(f"generation {generation[:12]} is not in the adapter store")
            now = time.time()
            current = self._records.get(name)
            if current is None:
                current = AdapterRecord(
                    name, generation, source, origin, access.owner, now, now, False, "", {}, {}, ()
                )
            else:
                access.check_change(name, current.owner)
                if not overwrite and current.generation != generation:
                    raise AdapterConflict(
                        f"name: '{name}' is taken; set overwrite to replace it", param="name"
                    )
            record = current.changed(pinned, description, metadata, default_sampling)
            return self._point(record, HistoryEntry(generation, source, origin, now))

    def check_change(self, name: str, access: Access) -> None:
        """Raises NameTaken or AccessDenied if the name exists and may not be changed; `put` asks again."""
        with self._reading:
            record = self._records.get(name)
        if record is not None:
            access.check_change(name, record.owner)

    def update(
        self,
        name: str,
        access: Access = OPERATOR,
        *,
        pinned: bool | None = None,
        description: str | None = None,
        metadata: Mapping[str, object] | None = None,
        default_sampling: Mapping[str, object] | None = None,
    ) -> AdapterRecord:
        """Change what is not None; the generation stays."""
        with self._writing:
            record = self._changeable(name, access).changed(pinned, description, metadata, default_sampling)
            return self._save(replace(record, updated=time.time()))

    def rollback(
        self, name: str, generation_prefix: str | None = None, access: Access = OPERATOR
    ) -> AdapterRecord:
        """Point the name back at a generation of its history, by default the one before the current.

        The generation rolled back from becomes the one before, so a second rollback undoes the first.
        """
        with self._writing:
            record = self._changeable(name, access)
            if generation_prefix is not None:
                entry = record.find(generation_prefix)
            elif len(record.history) > 1:
                entry = record.history[1]
            else:
                raise UnknownAdapter(f"name: '{name}' has no earlier generation", param="name")
            if entry.generation not in self.store:
                raise StorageError(f"generation {entry.generation[:12]} is not in the adapter store")
            return self._point(record, replace(entry, created=time.time()))

    def delete(self, name: str, access: Access = OPERATOR) -> AdapterRecord:
        """Forget a name and its history. Leases keep what they hold; `sweep` removes the rest."""
        with self._writing:
            record = self._changeable(name, access)
            self._database.delete(name)
            with self._reading:
                del self._records[name]
                del self._names[bisect.bisect_left(self._names, name)]
            return record

    def get(self, name: str, access: Access = OPERATOR) -> AdapterRecord:
        """The record of exactly this name."""
        with self._reading:
            return self._seen(self._lookup(name, "name", access))

    def resolve(self, model: str, access: Access = OPERATOR) -> AdapterRecord:
        """What a request means by 'name', or by 'name@<8 or more hex digits>' for one of its generations."""
        with self._reading:
            return self._resolve(model, access)

    def lease(self, model: str, access: Access = OPERATOR) -> Lease:
        """Resolve and claim in one step, so that what was resolved cannot be swept before it is used."""
        with self._reading:
            record = self._resolve(model, access)
            self._in_flight[record.name, record.generation] += 1
        return Lease(record, partial(self._release, (record.name, record.generation)))

    def hold(self, generation: str) -> Claim:
        """Keep a generation that no name means yet, beginning before it is stored; at the claim's end it is deleted
        unless a name, history or lease refers to it."""
        with self._writing, self._reading:
            self._in_flight["", generation] += 1
        return Claim(partial(self._let_go, generation))

    def in_flight(self, generation: str) -> int:
        with self._reading:
            return sum(count for (_, leased), count in self._in_flight.items() if leased == generation)

    def in_use(self, name: str) -> int:
        """Leases taken under this name, of any of its generations, also since it was deleted."""
        with self._reading:
            return sum(count for (leased, _), count in self._in_flight.items() if leased == name)

    def list(
        self, after: str | None = None, limit: int = 100, access: Access = OPERATOR
    ) -> tuple[AdapterRecord, ...]:
        """Up to `limit` records in the order of their names, beginning behind the name `after`."""
        with self._reading:
            start = 0 if after is None else bisect.bisect_right(self._names, after)
            records = (self._records[name] for name in self._names[start:])
            visible = (record for record in records if access.sees(record.owner))
            return tuple(self._seen(record) for record in islice(visible, limit))

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def set_state(self, generation: str, state: State, failure: str = "") -> None:
        """What the engine says of a generation. Kept in memory: after a restart all are available."""
        with self._reading:
            self._states[generation] = (state, failure)

    def sweep(self, *, min_age: float = 600.0) -> tuple[str, ...]:
        """Delete the generations that no name, history or lease refers to; see `GenerationStore.sweep`."""
        with self._writing:
            removed = self.store.sweep(self._referenced(), min_age=min_age)
            self._forget(removed)
            return removed

    def scanned(self) -> dict[str, Scanned]:
        """By path, the adapter folders that scans have imported."""
        with self._writing:
            return self._database.scanned()

    def save_scanned(self, path: str, scanned: Scanned | None) -> None:
        with self._writing:
            self._database.save_scanned(path, scanned)

    def _lookup(self, name: str, param: str, access: Access) -> AdapterRecord:
        record = self._records.get(name)
        if record is None or not access.sees(record.owner):
            raise UnknownAdapter(f"{param}: there is no adapter named {name[:200]!a}", param=param)
        return record

    def _changeable(self, name: str, access: Access) -> AdapterRecord:
        record = self.get(name, access)
        access.check_change(name, record.owner)
        return record

    def _resolve(self, model: str, access: Access) -> AdapterRecord:
        name, pin = split_pin(model)
        record = self._lookup(name, "model", access)
        if pin is not None:
            entry = record.find(pin, param="model")
            record = replace(record, generation=entry.generation, source=entry.source, origin=entry.origin)
        return self._seen(record)

    def _seen(self, record: AdapterRecord) -> AdapterRecord:
        state = self._states.get(record.generation)
        return record if state is None else replace(record, state=state[0], failure=state[1])

    def _point(self, record: AdapterRecord, entry: HistoryEntry) -> AdapterRecord:
        older = tuple(old for old in record.history if old.generation != entry.generation)
        return self._save(
            replace(
                record,
                generation=entry.generation,
                source=entry.source,
                origin=entry.origin,
                updated=entry.created,
                history=(entry, *older)[: self._keep_history],
            )
        )

    def _save(self, record: AdapterRecord) -> AdapterRecord:
        record = replace(record, state="available", failure="")
        self._database.save(record)
        with self._reading:
            if record.name not in self._records:
                bisect.insort(self._names, record.name)
            self._records[record.name] = record
            return self._seen(record)

    def _referenced(self) -> set[str]:
        with self._reading:
            named = {entry.generation for record in self._records.values() for entry in record.history}
            return named.union(generation for _, generation in self._in_flight)

    def _forget(self, generations: Collection[str]) -> None:
        with self._reading:
            for generation in generations:
                self._states.pop(generation, None)
        self.verifications.forget(generations)

    def _let_go(self, generation: str) -> None:
        with self._writing:
            self._release(("", generation))
            if generation not in self._referenced():
                with suppress(StorageError):  # then a sweep will
                    self.store.delete(generation)
                    self._forget([generation])

    def _release(self, leased: tuple[str, str]) -> None:
        with self._reading:
            self._in_flight -= Counter([leased])  # which forgets what falls to zero
