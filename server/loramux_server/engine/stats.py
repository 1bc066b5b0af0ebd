"""What each step says of the engine's state: part of `StepOutput`, and what /metrics is made of. No torch."""

from __future__ import annotations

from typing import Literal

import msgspec


class AdapterLoad(msgspec.Struct):
    """One adapter moved into host memory or a device slot (or failed to)."""

    generation: str
    tier: Literal["host", "device"]
    seconds: float
    ok: bool
    error: str = ""  # if not ok: one sentence


class AdapterEviction(msgspec.Struct):
    """One adapter left a tier to make room."""

    generation: str
    tier: Literal["host", "device"]
    reason: Literal["capacity", "fairness"]


class DeviceSlot(msgspec.Struct, array_like=True):
    """One adapter's place among the rank rows of the device."""

    generation: str
    offset: int
    rows: int
    references: int  # requests running on it
    pinned: bool
    filling: bool  # being copied, not usable yet


class DraftCounts(msgspec.Struct, frozen=True):
    """Since the start: how often a sequence got drafts, how many those were, and how many of them were right."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class EngineStats(msgspec.Struct):
    """State of the engine after a step; gauges of /metrics."""

    step: int
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    batch_tokens: int
    batch_adapters: int
    preemptions: int
    device_adapters: list[str]
    host_adapters: list[str]  # least recently used first
    loading_adapters: list[str] = []
    device_slots: list[DeviceSlot] = []  # least recently used first
    host_bytes: int = 0
    device_bytes: int = 0  # of the rank rows in use
    kv_blocks_cached: int = 0  # not in use, kept for prompts that begin alike
    prefix_cache_queries: int = 0  # tokens looked up since the start
    prefix_cache_hits: int = 0  # tokens found since the start
    spec_decode: DraftCounts | None = None  # if the engine makes drafts
    step_seconds: float = 0.0  # what this step took
    device_memory_held: int = 0  # bytes of CUDA memory: by the worker's allocator
    device_memory_free: int = 0
