"""Metrics of drafts, read off each engine step; names are vLLM's. A server that makes none counts nothing."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from loramux_server.engine.messages import EngineStats
from loramux_server.engine.stats import DraftCounts


class SpecDecodeMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._drafts = Counter(
            "loramux_spec_decode_num_drafts_total",
            "Times that a sequence got draft tokens",
            registry=registry,
        )
        self._tokens = Counter(
            "loramux_spec_decode_num_draft_tokens_total", "Draft tokens computed", registry=registry
        )
        self._accepted = Counter(
            "loramux_spec_decode_num_accepted_tokens_total",
            "Draft tokens that were right",
            registry=registry,
        )
        self._seen = DraftCounts()

    def observe(self, stats: EngineStats) -> None:
        now, seen = stats.spec_decode, self._seen
        if now is None or now == seen:
            return
        if now.num_drafts < seen.num_drafts:  # another worker: it counts from its own start
            seen = DraftCounts()
        self._drafts.inc(now.num_drafts - seen.num_drafts)
        self._tokens.inc(now.num_draft_tokens - seen.num_draft_tokens)
        self._accepted.inc(now.num_accepted_tokens - seen.num_accepted_tokens)
        self._seen = now
