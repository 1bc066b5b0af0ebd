"""Step checkpoints: everything a run needs to go on as if it had never stopped, and an adapter besides.

`step-200/` holds PEFT's two files (so it can be served while training goes on), `optimizer.safetensors`, and
`trainer_state.json`: step, recipe, hashes of data and base, loss curve, provenance, sha256 of the files. The random
numbers of a run and the order of its samples are functions of seed and step, so these two are their whole state. Promises:
a directory of that name is complete and durable, or was damaged later, which is noticed. The optimizer's state, three
quarters of the bytes, is kept for the last two checkpoints only.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.errors import LoramuxError, StorageError, TrainingError
from loramux_adapters.files import fsync_directory, replace_file, storage_error, write_file
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.training.layout import CHECKPOINTS, STATE_FILE
from loramux_adapters.weights import LoraWeights

OPTIMIZER_FILE = "optimizer.safetensors"
RESUMABLE = 2  # checkpoints whose optimizer state is kept
FORMAT = 1

_PARTS = (
    ("base", "model", "the base's weights are"),
    ("data", "training_file", "the rows, or how they are tokenized, are"),
    ("initial", "init_from", "the adapter to start from is"),
    ("recipe", "", ""),
)
_NAME = re.compile(r"step-([1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run between two steps. `identity` is what must be equal for a run to go on from it."""

    step: int
    weights: LoraWeights
    optimizer: Mapping[str, torch.Tensor]
    optimizer_numbers: Mapping[str, Mapping[str, float]]
    identity: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]


class Checkpoints:
    """The checkpoints of one run, below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def steps(self) -> list[int]:
        """Published checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(m[1]) for path in self.directory.iterdir() if (m := _NAME.fullmatch(path.name)))

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step}"

    def save(self, snapshot: Snapshot, provenance: Mapping[str, Any]) -> Path:
        """Write beside, then rename; durable on return. `provenance` is for people. Raises StorageError."""
        target = self.path(snapshot.step)
        partial = self.directory / f".{target.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            snapshot.weights.write(partial)
            write_file(partial / OPTIMIZER_FILE, [save(dict(snapshot.optimizer))])
            state = {
                "format": FORMAT,
                "step": snapshot.step,
                "identity": snapshot.identity,
                "optimizer": snapshot.optimizer_numbers,
                "history": list(snapshot.history),
                "provenance": provenance,
                "sha256": {
                    name: _sha256(partial / name) for name in (CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER_FILE)
                },
            }
            write_file(partial / STATE_FILE, [json.dumps(state, allow_nan=False).encode()])
            fsync_directory(partial)
            if target.exists():  # damaged: `latest` passed over it
                shutil.rmtree(target)
            partial.rename(target)
            fsync_directory(self.directory)
        except OSError as error:
            raise storage_error("a checkpoint cannot be written", error) from error
        self._thin()
        return target

    def latest(self, geometry: BaseGeometry) -> tuple[Snapshot | None, list[str]]:
        """The newest checkpoint that is whole, and a sentence for each newer one that is not."""
        problems: list[str] = []
        for step in reversed(self.steps()):
            if not (self.path(step) / OPTIMIZER_FILE).exists():
                continue
            try:
                return self.read(step, geometry), problems
            except (LoramuxError, OSError, ValueError, KeyError, TypeError) as error:
                problems.append(f"checkpoint {self.path(step).name} is damaged and was passed over: {error}")
        return None, problems

    def read(self, step: int, geometry: BaseGeometry) -> Snapshot:
        """Read one back, every byte checked."""
        directory = self.path(step)
        state = json.loads((directory / STATE_FILE).read_bytes())
        if state["format"] != FORMAT or state["step"] != step:
            raise StorageError(f"{STATE_FILE} was written by another version")
        for name, expected in state["sha256"].items():
            if _sha256(directory / name) != expected:
                raise StorageError(f"{name} is not what was written")
        return Snapshot(
            step=step,
            weights=LoraWeights.read(directory, geometry),
            optimizer=load((directory / OPTIMIZER_FILE).read_bytes()),
            optimizer_numbers=state["optimizer"],
            identity=state["identity"],
            history=state["history"],
        )

    def _thin(self) -> None:
        for step in self.steps()[:-RESUMABLE]:
            (self.path(step) / OPTIMIZER_FILE).unlink(missing_ok=True)


def check_output(out: Path, *, resume: bool) -> None:
    """Raises TrainingError rather than write over an adapter, or start anew where a run could go on."""
    if (out / CONFIG_FILE).exists():
        raise TrainingError(f"{out} holds a finished adapter; choose another directory", param="out")
    if not resume and Checkpoints(out / CHECKPOINTS).steps():
        raise TrainingError(
            f"{out} holds the checkpoints of an unfinished run; continue it with resume, or choose another directory",
            param="out",
        )
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is not a directory", param="out")


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises TrainingError naming the first thing that differs between a checkpoint's run and this one."""
    for part, field, what in _PARTS:
        before, after = saved[part], now[part]
        if before == after:
            continue
        if field:
            raise TrainingError(
                f"cannot resume: {what} not what the checkpoint was trained with", param=field
            )
        name = next(key for key in after if before.get(key) != after[key])
        raise TrainingError(
            f"cannot resume: {name} was {json.dumps(before.get(name))} and is {json.dumps(after[name])}",
            param=name,
        )


def publish(directory: Path, weights: LoraWeights, name: str, manifest: Mapping[str, Any]) -> None:
    """The finished adapter: a JSON file `name`, then PEFT's two, the config last. Raises StorageError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / name, [json.dumps(manifest, indent=2, allow_nan=False).encode() + b"\n"])
        weights.write(directory)
    except OSError as error:
        raise storage_error("the adapter cannot be written", error) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
