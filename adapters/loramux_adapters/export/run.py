"""Carrying a plan out: space, shards, assets, proof, report, and the rename that publishes it.

    1 check      free disk space; nothing may be at OUT
    2 begin      OUT.partial/ and its journal, or take both up again (resume)
    3 merge      shard after shard: temporary file, fsync, rename, journal line
    4 identity   the codes that were merged onto are those the adapter was trained on
    5 assets     config, tokenizer, chat template, licence, index
    6 prove      read back and compare with the served function
    7 publish    merge_report.json and README.md, then OUT.partial -> OUT

Promises: OUT appears only when everything passed; killed at any point, a resumed export ends with the same
bytes.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux_adapters.errors import ExportError
from loramux_adapters.export.assets import write_assets
from loramux_adapters.export.identity import combined_identity
from loramux_adapters.export.journal import JOURNAL, FinishedShard, Journal, is_intact
from loramux_adapters.export.merge import TensorMerger
from loramux_adapters.export.plan import ExportPlan
from loramux_adapters.export.report import Facts, write_report
from loramux_adapters.export.shards import TEMPORARY, write_index, write_shard
from loramux_adapters.export.verify import Proof, verify_export
from loramux_adapters.files import fsync_directory

SPARE_BYTES = 64 * 2**20  # config, tokenizer, report, and what a file system keeps for itself

NOT_PROVEN = "export_not_proven"
CANCELLED = "export_cancelled"


@dataclass(frozen=True, slots=True)
class ExportProgress:
    """Where an export is. `phase` is "merge", "verify" or "noise"; bytes count up within the phase."""

    phase: str
    done: int
    total: int


Observer = Callable[[ExportProgress], None]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """A published export. `report` is merge_report.json's content."""

    out: Path
    report: dict[str, Any]
    proof: Proof | None
    seconds: float


def run_export(
    plan: ExportPlan,
    *,
    resume: bool = False,
    observer: Observer = lambda progress: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> ExportResult:
    """Raises ExportError; with code "export_not_proven" or "export_cancelled" OUT.partial is left in place.

    `observer` is called often (every few MiB) from this thread. `cancelled` is asked as often; what is
    finished by then can be resumed.
    """
    started = time.monotonic()
    out, partial = plan.options.out, plan.options.partial
    _check_places(out, partial, resume)
    try:
        _check_space(plan)
        partial.mkdir(parents=True, exist_ok=True)
        with Journal(partial, plan.fingerprint) as journal:
            report, proof = _build(_Steps(plan, journal, observer, cancelled), plan)
            (partial / JOURNAL).unlink()
            fsync_directory(partial)
            partial.rename(out)
            fsync_directory(out.parent)
    except OSError as error:
        raise _explained(error, partial) from error
    return ExportResult(out, report, proof, time.monotonic() - started)


def _build(steps: _Steps, plan: ExportPlan) -> tuple[dict[str, Any], Proof | None]:
    partial = plan.options.partial
    shards = steps.merge()
    identity = steps.identity(shards)
    write_assets(partial, plan)
    write_index(partial, plan)
    proof = steps.prove()
    report = write_report(partial, Facts(plan, shards, identity, proof))
    if proof is not None and proof.failures:
        raise ExportError(
            f"the export is not equal to the served model: {'; '.join(proof.failures)}; it is kept as {partial}, and "
            "--format fp32 would be closer",
            code=NOT_PROVEN,
        )
    return report, proof


class _Steps:
    """Steps 3, 4 and 6 with their progress."""

    def __init__(
        self, plan: ExportPlan, journal: Journal, observer: Observer, cancelled: Callable[[], bool]
    ) -> None:
        self._plan = plan
        self._journal = journal
        self._observer = observer
        self._cancelled = cancelled
        self._directory = plan.options.partial

    def merge(self) -> tuple[FinishedShard, ...]:
        self._sweep()
        finished = {
            name: shard
            for name, shard in self._journal.finished.items()
            if is_intact(self._directory / name, shard)
        }
        missing = [shard for shard in self._plan.shards if shard.name not in finished]
        merger = TensorMerger(self._plan)
        present = sum(shard.num_bytes for shard in self._plan.shards if shard.name in finished)
        advance = self._advance("merge", self._plan.total_bytes, present)
        for shard in missing:
            done = write_shard(self._directory, shard, merger, advance)
            self._journal.add(done)
            finished[shard.name] = done
        return tuple(finished[shard.name] for shard in self._plan.shards)

    def _sweep(self) -> None:
        """Remove what a killed export was writing: half a shard, or one of `replace_file`'s temporary files."""
        for pattern in (f"*{TEMPORARY}", ".*.partial"):
            for leftover in self._directory.glob(pattern):
                leftover.unlink()

    def identity(self, shards: tuple[FinishedShard, ...]) -> str | None:
        """The base's quantization identity, compared with the adapters' stamp. A foreign export is removed."""
        if not self._plan.needs_identity:
            return None
        linears = {f"{module}.weight": module for module in self._plan.skeleton.linears}
        found = combined_identity(
            (linears[outcome.name], outcome.linear_sha256)
            for shard in shards
            for outcome in shard.tensors
            if outcome.linear_sha256 is not None
        )
        self._check_identity(found)
        return found

    def _check_identity(self, found: str) -> None:
        stamp, expected = self._plan.stamp, self._plan.options.base_identity
        options = self._plan.options
        quantizes = f"{options.base_name} quantizes to {found[:12]} on this {options.device}"
        if expected is not None and expected != found:
            shutil.rmtree(self._directory)
            raise ExportError(
                f"this is not the base that is served: {quantizes}, and {expected[:12]} is expected",
                param="base_identity",
                code="base_mismatch",
            )
        if stamp is not None and stamp != found:
            shutil.rmtree(self._directory)
            raise ExportError(
                f"the adapter was trained on another base: its stamp is {stamp[:12]}, {quantizes}",
                param="adapter",
                code="base_mismatch",
            )

    def prove(self) -> Proof | None:
        if not self._plan.options.verify.prompts:
            return None
        return verify_export(self._plan, self._advance)

    def _advance(self, phase: str, total: int, done: int = 0) -> Callable[[int], None]:
        def advance(size: int) -> None:
            nonlocal done
            done += size
            self._observer(ExportProgress(phase, min(done, total), total))
            if self._cancelled():
                raise ExportError(f"cancelled; {self._directory} holds what was finished", code=CANCELLED)

        return advance


def _check_places(out: Path, partial: Path, resume: bool) -> None:
    if out.exists():
        raise ExportError(f"{out} exists already: choose another --out or delete it", param="out")
    if partial.exists() and not resume:
        raise ExportError(
            f"{partial} is left from an earlier export: continue it with --resume or delete it",
            param="resume",
        )


def _check_space(plan: ExportPlan) -> None:
    partial = plan.options.partial
    needed = plan.total_bytes - _present_bytes(partial) + SPARE_BYTES
    if plan.free_bytes < needed:
        raise ExportError(
            f"the export needs {needed / 1e9:.2f} GB, and {partial.parent} has {plan.free_bytes / 1e9:.2f} GB free",
            param="out",
        )


def _present_bytes(partial: Path) -> int:
    """What an earlier attempt has on disk; it is kept or overwritten."""
    if not partial.is_dir():
        return 0
    return sum(path.stat().st_size for path in partial.iterdir() if path.is_file())


def _explained(error: OSError, partial: Path) -> ExportError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExportError(f"the disk is full: free space for {partial} and use --resume", param="out")
    return ExportError(f"{partial} cannot be written: {error.strerror or error}", param="out")
