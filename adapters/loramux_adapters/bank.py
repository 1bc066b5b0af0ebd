"""The tiers of adapter weights: disk -> contiguous host block -> rows of the device pool.

Promises: loading happens on threads (on CUDA the copy runs on a side stream), so that nobody's decode waits for
somebody else's adapter; a generation is used only after every byte of it is in place; weights that overflow the
compute dtype are refused; `set_adapter(rows)` selects, per row of the next forward pass, which resident adapter
applies. All methods but the loader's own work are called by the one thread that owns the device.
Who is evicted when is `residency.py`; what a file must look like is `weights.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import torch

from loramux_adapters.errors import AdapterError, AdapterUnavailable
from loramux_adapters.pool import DevicePool
from loramux_adapters.residency import DeviceTier, Eviction, Slot
from loramux_adapters.weights import LoraWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadEvent:
    """One move between tiers, for logs and metrics."""

    generation: str
    tier: Literal["host", "device"]
    seconds: float
    error: str = ""  # why it failed, as one sentence; "" if it did not


@dataclass(frozen=True)
class HostCopy:
    """An adapter in host memory, ready to copy: one block, and views of it per linear.

    `factors[name]` is (A `[r, in]`, B * scaling, transposed, `[r, out]`) in the compute dtype.
    """

    rows: int
    block: torch.Tensor
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def build(cls, weights: LoraWeights, dtype: torch.dtype, *, pin: bool) -> HostCopy:
        """Fold the scaling into B in fp32, round once, lay everything out contiguously. Raises AdapterUnavailable."""
        sizes = {name: (a.numel(), b.numel()) for name, (a, b) in weights.tensors.items()}
        block = torch.empty(sum(a + b for a, b in sizes.values()), dtype=dtype, pin_memory=pin)
        factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        offset = 0
        for name, (a, b) in weights.tensors.items():
            r = a.shape[0]
            a_view = block[offset : offset + a.numel()].view(r, -1)
            b_view = block[offset + a.numel() : offset + a.numel() + b.numel()].view(r, -1)
            offset += a.numel() + b.numel()
            a_view.copy_(a)
            b_view.copy_((b.float() * weights.spec.scaling(name)).t())
            factors[name] = (a_view, b_view)
        if not bool(torch.isfinite(block).all()):
            raise AdapterUnavailable(
                f"the adapter's weights overflow {dtype}; train or save it with a smaller scale"
            )
        return cls(rows=max(a.shape[0] for a, _ in factors.values()), block=block, factors=factors)

    @property
    def num_bytes(self) -> int:
        return self.block.numel() * self.block.element_size()


def _one_thread_each() -> None:
    """A loader that computes with a thread team of its own would take the cores from the team that decodes."""
    torch.set_num_threads(1)


@dataclass
class _Move:
    """An adapter on its way between tiers."""

    future: Future[HostCopy | None]
    asked: int  # tick of the last step that asked for the adapter


class AdapterBank:
    """Resident adapters of one model, and the selection of them per row."""

    def __init__(
        self,
        pool: DevicePool,
        tier: DeviceTier,
        read: Callable[[str, str], LoraWeights],
        *,
        max_cpu_loras: int,
        dtype: torch.dtype,
    ) -> None:
        """`read(generation, path)` brings and checks the files; it runs on a loader thread."""
        self.pool = pool
        self.tier = tier
        self.max_cpu_loras = max_cpu_loras
        self.device = pool.device
        self.dtype = dtype
        self.events: list[LoadEvent] = []
        self._read = read
        self._host: OrderedDict[str, HostCopy] = OrderedDict()
        self._targets: dict[str, frozenset[str]] = {}
        self._moves: dict[str, _Move] = {}
        self._ready: set[str] = set()
        self._pins: dict[str, str] = {}  # generation -> path, of what is to stay resident
        self._pins_asked = False
        self._executor = ThreadPoolExecutor(
            max_workers=2, thread_name_prefix="adapter-loader", initializer=_one_thread_each
        )
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._events_lock = threading.Lock()

    # --- residency -----------------------------------------------------------------------------------------------

    def prepare(self, generation: str, path: str) -> bool:
        """Bring an adapter one step closer to the device; True once it is usable. Never blocks.

        Raises AdapterError if its files do not load; asking again tries again.
        """
        if generation in self._ready:
            return True
        move = self._moves.get(generation)
        if move is not None:
            move.asked = self.tier.tick
            if not move.future.done():
                return False
            self._finish(generation)
            return generation in self._ready or self.prepare(generation, path)
        self._finish_abandoned()
        copy = self._host.get(generation)
        if copy is None:
            self._moves[generation] = _Move(
                self._executor.submit(self._load, generation, path), self.tier.tick
            )
            return False
        slot = self.tier.place(generation, copy.rows, before_pins=generation not in self._pins)
        self._forget_evicted()
        if slot is None:
            self.tier.wait(generation)
            return False
        self._host.move_to_end(generation)
        self._targets[generation] = frozenset(copy.factors)
        self._moves[generation] = _Move(self._executor.submit(self._copy, slot, copy), self.tier.tick)
        return False

    def pin(self, adapters: Mapping[str, str]) -> None:
        """Keep exactly these, generation -> path, on the device from now on; `keep_pinned` brings them there."""
        self._pins = dict(adapters)
        self._pins_asked = True
        for slot in self.tier.slots.values():
            slot.pinned = slot.pinned and slot.generation in self._pins

    def keep_pinned(self) -> None:
        """Bring the pinned adapters a step nearer. One that cannot be loaded, or is one too many, loses its pin."""
        self._pins_asked = False
        for generation, path in list(self._pins.items()):
            slot = self.tier.get(generation)
            if slot is not None and slot.pinned:
                continue
            try:
                if self.prepare(generation, path):
                    self.tier.pin(generation, True)
            except AdapterError as error:
                logger.warning("adapter %s is not pinned: %s", generation[:12], error.message)
                del self._pins[generation]

    @property
    def is_pinning(self) -> bool:
        """Whether `keep_pinned` has something to do that needs no request to end first."""
        return self._pins_asked or any(generation in self._moves for generation in self._pins)

    def acquire(self, generation: str) -> None:
        """A request starts on a ready adapter; it stays resident until `release`."""
        self.tier.acquire(generation)

    def release(self, generation: str) -> None:
        self.tier.release(generation)

    def accepts(self, generation: str) -> bool:
        """False while the adapter is being drained so that a waiting one gets its turn."""
        return self.tier.accepts(generation)

    def resident(self) -> list[str]:
        return sorted(self._ready)

    def on_host(self) -> list[str]:
        """Least recently used first."""
        return list(self._host)

    def loading(self) -> list[str]:
        return sorted(self._moves)

    @property
    def host_bytes(self) -> int:
        return sum(copy.num_bytes for copy in self._host.values())

    @property
    def device_bytes(self) -> int:
        return self.pool.row_bytes * sum(slot.rows for slot in self.tier.slots.values())

    def take_events(self) -> list[LoadEvent]:
        with self._events_lock:
            events, self.events = self.events, []
        return events

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _load(self, generation: str, path: str) -> HostCopy:
        with self._recorded(generation, "host"):
            weights = self._read(generation, path)
            return HostCopy.build(weights, self.dtype, pin=self.device.type == "cuda")

    def _copy(self, slot: Slot, copy: HostCopy) -> None:
        with self._recorded(slot.generation, "device"):
            if self._stream is not None:
                with torch.cuda.stream(self._stream):
                    self.pool.fill(slot, copy.factors)
                self._stream.synchronize()
            else:
                self.pool.fill(slot, copy.factors)

    def _finish(self, generation: str) -> None:
        try:
            copy = self._moves.pop(generation).future.result()
        except AdapterError:
            if self.tier.get(generation) is not None:
                self.tier.remove(generation)
            raise
        if copy is None:
            self.tier.slots[generation].filling = False
            self._ready.add(generation)
            return
        self._host[generation] = copy
        while len(self._host) > self.max_cpu_loras:
            # One being copied to the device is read by the loader right now; all others are only a cache.
            victim = next((g for g in self._host if g not in self._moves and g != generation), None)
            if victim is None:
                break
            del self._host[victim]
            self.tier.evictions.append(Eviction(victim, "host", "capacity"))

    def _finish_abandoned(self) -> None:
        """A move that nobody asks about any more (its request was aborted) must not keep its slot or its memory."""
        for generation, move in list(self._moves.items()):
            if move.future.done() and self.tier.tick - move.asked > self.tier.patience:
                with suppress(AdapterError):  # whoever asks again tries again
                    self._finish(generation)

    def _forget_evicted(self) -> None:
        for generation in [g for g in self._ready if self.tier.get(g) is None]:
            self._ready.discard(generation)
            self._targets.pop(generation, None)

    @contextmanager
    def _recorded(self, generation: str, tier: Literal["host", "device"]) -> Iterator[None]:
        """Note how the move went. Whatever fails in it is an AdapterError that names no path."""
        started = time.perf_counter()
        problem = ""
        try:
            yield
        except AdapterError as error:
            problem = error.message
            raise
        except (OSError, MemoryError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
            problem = f"adapter {generation[:12]} could not be loaded: {reason or type(error).__name__}"
            raise AdapterUnavailable(problem) from error
        finally:
            with self._events_lock:
                self.events.append(LoadEvent(generation, tier, time.perf_counter() - started, problem))

    # --- selection -----------------------------------------------------------------------------------------------

    def active(self, rows: Sequence[str | None]) -> list[Slot]:
        """Where the adapters of these rows lie, by offset."""
        slots = [self.tier.slots[name] for name in set(rows) if name is not None]
        return sorted(slots, key=lambda slot: slot.offset)

    def targeted(self, slots: Sequence[Slot]) -> frozenset[str]:
        """The linears that one of them changes."""
        return frozenset[str]().union(*(self._targets[slot.generation] for slot in slots))

    def set_adapter(self, rows: Sequence[str | None]) -> None:
        """Choose, for each row of the next pass, its generation, resident and acquired (None: the base alone)."""
        slots = self.active(rows)
        self.pool.select(rows, slots, self.targeted(slots))
