"""One upload through the real staging, gate and store, and what must hold whatever it was.

Accepted: the store has a generation that reads back equal, finite and as the config says, and the safetensors library sees
the very same tensors. Refused: an InvalidAdapter whose sentences fit a message. Never another exception, nothing left
behind, nothing opened outside the folder (also not to read), nothing unpickled, no process, no connection, and no memory
on the word of a header: the address space is closed a little above what is in use.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from loramux_adapters.adapter_files import WEIGHTS_FILE, GateLimits
from loramux_adapters.bank import HostCopy
from loramux_adapters.errors import AdapterUnavailable, InvalidAdapter
from loramux_adapters.gate import MAX_FAULTS
from loramux_adapters.sources import Staged, stage_archive, stage_directory
from loramux_adapters.store import GenerationStore
from loramux_adapters.weights import LoraWeights
from tests.fuzz.uploads import ARCHIVE, GEOMETRY, PREFIX, TRAP

LIMITS = GateLimits(
    max_rank=64,
    max_config_bytes=64 * 1024,
    max_header_bytes=64 * 1024,
    max_tensors=64,
    max_file_bytes=256 * 1024,
)
MEMORY_BYTES = 512 * 1024**2  # beyond what is in use; a zstd window alone may be 128 MiB
MAX_SECONDS = 5.0  # of processor time: hundreds of times what an upload of this size takes
STORE_EVERY = 100  # uploads between two looks into every folder of the store
MAX_MESSAGE = 64 * 1024


class Violation(Exception):
    """Something that must never happen did."""


@dataclass(frozen=True)
class Verdict:
    """What became of an upload: its generation, or why it has none."""

    generation: str = ""
    refusal: str = ""


class Sandbox:
    """A store and a staging folder below `root`; hostile names in uploads lead to TRAP, which must never exist."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"
        self._incoming = self.data / "incoming"
        self._staging = self.data / "staging"
        self._trip_wire = TripWire(self.data)
        self._judged = 0
        for folder in (self._incoming, self._staging):
            folder.mkdir(parents=True)
        self.store = GenerationStore(self.data / "generations")

    def judge(self, parts: Mapping[str, bytes]) -> Verdict:
        """Raises Violation; whatever else comes out is one too."""
        incoming = self._incoming / "upload"
        incoming.mkdir()
        for name, content in parts.items():
            (incoming / name).write_bytes(content)
        started = time.process_time()
        try:
            with self._trip_wire:
                verdict = self._publish(incoming)
        finally:
            shutil.rmtree(incoming)
        if time.process_time() - started > MAX_SECONDS:
            raise Violation(f"took {time.process_time() - started:.1f} s of processor time")
        self._judged += 1
        self._nothing_left()
        return verdict

    def _publish(self, incoming: Path) -> Verdict:
        try:
            with self._stage(incoming) as staged:
                weights = LoraWeights.read(staged.directory, GEOMETRY, limits=LIMITS)
                raw = (staged.directory / WEIGHTS_FILE).read_bytes()
            generation = self.store.publish(weights, {"source": "upload"})
        except InvalidAdapter as error:
            return Verdict(refusal=self._presentable(error))
        check_weights(weights, raw)
        self.store.verify(generation)
        again = LoraWeights.read(self.store.path(generation), GEOMETRY)
        check_weights(again, (self.store.path(generation) / WEIGHTS_FILE).read_bytes())
        if again.generation != generation or weights.generation != generation:
            raise Violation("what the store gives back is another generation")
        if not self.store.delete(generation):
            raise Violation("what was published was not in the store")
        return Verdict(generation=generation)

    def _stage(self, incoming: Path) -> Staged:
        if (incoming / ARCHIVE).exists():
            return stage_archive(incoming / ARCHIVE, self._staging, limits=LIMITS)
        return stage_directory(incoming, self._staging, roots=(incoming,), limits=LIMITS)

    def _presentable(self, error: InvalidAdapter) -> str:
        message = str(error)
        if not error.faults or len(error.faults) > MAX_FAULTS + 1:
            raise Violation(f"{len(error.faults)} faults in one error")
        if not message.isprintable() or len(message) > MAX_MESSAGE:
            raise Violation(
                f"a sentence of {len(message)} characters that does not fit a message: {message[:200]!a}"
            )
        if str(self.data) in message:
            raise Violation(f"the sentence names this machine's folders: {message[:200]}")
        return message

    def _nothing_left(self) -> None:
        left = [
            *self._incoming.iterdir(),
            *self._staging.iterdir(),
            *(self.store.root / ".partial").iterdir(),
            *(self.store if self._judged % STORE_EVERY == 0 else ()),
            *(entry for entry in self.root.iterdir() if entry != self.data),
            *([TRAP] if os.path.lexists(TRAP) else ()),
        ]
        if left:
            raise Violation(f"left behind: {left}")


@contextlib.contextmanager
def open_sandbox() -> Iterator[Sandbox]:
    """In memory where the system has such a folder: most of the time would go into waiting for a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="loramux-fuzz-", dir=memory if os.access(memory, os.W_OK) else None
    ) as folder:
        yield Sandbox(Path(folder).resolve())


def check_weights(weights: LoraWeights, raw: bytes) -> None:
    """Exactly the tensors the config calls for, finite, and those that another reader of the file sees."""
    spec = weights.spec
    if tuple(weights.tensors) != spec.targets(GEOMETRY):
        raise Violation("the tensors are not those of the targeted modules")
    theirs = {name.replace(".default", "").removeprefix(PREFIX): tensor for name, tensor in load(raw).items()}
    if len(theirs) != 2 * len(weights.tensors):
        raise Violation("the file has tensors that were not read")
    for module, (a, b) in weights.tensors.items():
        out_features, in_features = GEOMETRY.linear_shapes[module]
        rank = spec.rank(module)
        if (*a.shape, *b.shape) != (rank, in_features, out_features, rank):
            raise Violation(f"{module}: shapes {list(a.shape)}, {list(b.shape)} for rank {rank}")
        for kind, ours in (("lora_A", a), ("lora_B", b)):
            other = theirs[f"{module}.{kind}.weight"]
            if not torch.isfinite(ours).all() or ours.dtype != other.dtype or not torch.equal(ours, other):
                raise Violation(f"{module}.{kind}: not finite, or not what the safetensors library reads")
    for dtype in (torch.float32, torch.bfloat16):
        with contextlib.suppress(
            AdapterUnavailable
        ):  # finite as stored, too large in the dtype of the computation
            if not torch.isfinite(HostCopy.build(weights, dtype, pin=False).block).all():
                raise Violation("weights that are not finite reached the host tier")


class TripWire:
    """While it is armed, on this thread: no write outside `allowed`, no read outside but of Python's own files."""

    _WRITES = (
        "os.mkdir",
        "os.rename",
        "os.symlink",
        "os.link",
        "os.truncate",
        "os.remove",
        "os.rmdir",
        "os.chmod",
    )
    _NEVER = (
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.fork",
        "os.posix_spawn",
        "socket.connect",
        "socket.bind",
    )
    _armed: dict[int, TripWire] = {}  # noqa: RUF012 (one hook for all, because a hook cannot be taken away)

    def __init__(self, allowed: Path) -> None:
        self._allowed = f"{allowed}{os.sep}"
        self._own = tuple({os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)})
        self.tripped: list[str] = []

    def __enter__(self) -> TripWire:
        if not hasattr(sys, "_loramux_trip_wire"):
            sys.addaudithook(TripWire._hook)
            sys._loramux_trip_wire = True  # type: ignore[attr-defined]
        self._armed[threading.get_ident()] = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        del self._armed[threading.get_ident()]
        tripped, self.tripped = self.tripped, []
        if tripped and kind is None:
            raise Violation(f"outside the data directory: {'; '.join(tripped[:5])}")

    @staticmethod
    def _hook(event: str, arguments: tuple[Any, ...]) -> None:
        wire = TripWire._armed.get(threading.get_ident()) if TripWire._armed else None
        if wire is not None:
            wire._look(event, arguments)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)) if flags else False
            self._path(event, path, writes=writes)
        elif event in self._WRITES:
            # A path beside a folder's descriptor is relative to that folder, which was opened before.
            beside = (
                any(isinstance(extra, int) and extra >= 0 for extra in arguments[1:]) and event != "os.mkdir"
            )
            for path in () if beside else arguments:
                self._path(event, path, writes=True)
        elif event in self._NEVER or event == "pickle.find_class":
            self.tripped.append(f"{event} {arguments!a}"[:200])

    def _path(self, event: str, path: object, *, writes: bool) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        absolute = os.path.abspath(os.fsdecode(path))
        inside = f"{absolute}{os.sep}".startswith(self._allowed)
        # A relative path that is only read may be beside a folder's descriptor.
        foreign = os.path.isabs(os.fsdecode(path)) and not absolute.startswith(self._own)
        if not inside and (writes or foreign):
            self.tripped.append(f"{event} {absolute}"[:200])


@contextlib.contextmanager
def bounded_memory(extra: int = MEMORY_BYTES) -> Iterator[None]:
    """Inside, an allocation that would take the process's address space more than `extra` bytes further fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
