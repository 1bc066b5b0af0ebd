"""What verifications found, by generation: outcomes in memory, whole reports on disk.

A generation has no entry if nobody asked for its verification, as for adapters found in folders. It belongs to the
registry of one base, so a report is always about that base. What is saved is durable. No torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from threading import RLock
from typing import Literal

import msgspec

from loramux_adapters.errors import StorageError
from loramux_adapters.registry_db import RegistryDatabase
from loramux_adapters.verify_report import Verdict, VerifyReport

Outcome = Verdict | Literal["skipped"]


@dataclass(frozen=True, slots=True)
class Verification:
    """`report` is None where the uploader chose to do without."""

    checked: float  # seconds since the epoch
    report: VerifyReport | None

    @property
    def outcome(self) -> Outcome:
        return "skipped" if self.report is None else self.report.verdict


class Verifications:
    """Part of a registry; `writing` is the lock that serialises its database."""

    def __init__(self, database: RegistryDatabase, writing: RLock) -> None:
        self._database = database
        self._writing = writing
        self._outcomes: dict[str, Outcome] = msgspec.convert(database.outcomes(), dict[str, Outcome])

    def outcome(self, generation: str) -> Outcome | None:
        """Never touches the disk."""
        return self._outcomes.get(generation)

    def get(self, generation: str) -> Verification | None:
        """Reads the disk. Raises StorageError if that fails."""
        with self._writing:
            row = self._database.verification(generation)
        if row is None:
            return None
        checked, report = row
        try:
            return Verification(checked, VerifyReport.from_json(json.loads(report)) if report else None)
        except ValueError as error:
            raise StorageError(f"the verification of {generation[:12]} cannot be read: {error}") from error

    def save(self, generation: str, report: VerifyReport | None) -> None:
        """Replace what is known of a generation; None, for skipped, replaces nothing."""
        verification = Verification(time.time(), report)
        with self._writing:
            if report is None and generation in self._outcomes:
                return
            text = json.dumps(report.to_json(), allow_nan=False) if report is not None else ""
            self._database.save_verification(generation, verification.checked, verification.outcome, text)
            self._outcomes[generation] = verification.outcome

    def forget(self, generations: Iterable[str]) -> None:
        with self._writing:
            known = [generation for generation in generations if generation in self._outcomes]
            if known:
                self._database.forget_verifications(known)
            for generation in known:
                del self._outcomes[generation]
