"""The collectors about HTTP: requests by method, route and status, how long they took, how many are open.

Promises: `route` is a template of ours, `method` one that HTTP knows and `status` one that was sent, so the number of series
is bounded by the routes there are.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from loramux_server.observed import ObservedRequest

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class HttpMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "loramux_http_requests_total",
            "HTTP requests answered; status 499: the client left first",
            ["method", "route", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "loramux_http_request_duration_seconds",
            "From the request's headers to the end of the answer",
            ["route"],
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self._open = Gauge(
            "loramux_http_requests_in_flight",
            "HTTP requests that are not answered in full",
            registry=registry,
        )

    def began(self) -> None:
        self._open.inc()

    def ended(self, request: ObservedRequest) -> None:
        self._open.dec()
        method = request.method if request.method in _METHODS else "_other"
        self._requests.labels(method, request.route, str(request.status)).inc()
        self._seconds.labels(request.route).observe(request.seconds)
