"""Metrics of the prefix cache, read off each engine step; names and units are vLLM's where it has them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from loramux_server.engine.messages import EngineStats


class PrefixCacheMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._queries = Counter(
            "loramux_prefix_cache_queries_total",
            "Prompt tokens looked up in the prefix cache",
            registry=registry,
        )
        self._hits = Counter(
            "loramux_prefix_cache_hits_total", "Prompt tokens found in the prefix cache", registry=registry
        )
        self._blocks = Gauge(
            "loramux_prefix_cache_blocks",
            "KV blocks not in use, kept for prompts that begin alike",
            registry=registry,
        )
        self._seen = (0, 0)

    def observe(self, stats: EngineStats) -> None:
        queries, hits = self._seen
        if stats.prefix_cache_queries < queries:  # another worker: it counts from its own start
            queries = hits = 0
        self._queries.inc(stats.prefix_cache_queries - queries)
        self._hits.inc(stats.prefix_cache_hits - hits)
        self._seen = (stats.prefix_cache_queries, stats.prefix_cache_hits)
        self._blocks.set(stats.kv_blocks_cached)
