"""Every Packhorse metric, declared once. Names carry units; labels come from closed sets, never
from a request.

vLLM's own `vllm:*` series live in the same registry, so one scrape shows both. Called by `service`
(counting) and `rest` (exposition).
"""

from __future__ import annotations

import prometheus_client
from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

REQUESTS = Counter(
    "packhorse_requests_total",
    "Requests, by how they ended: ok, or the kind of error.",
    ["outcome"],
)
IN_FLIGHT = Gauge(
    "packhorse_requests_in_flight", "Requests between admission and the engine's last token."
)
TOKENS = Counter(
    "packhorse_tokens_total", "Tokens read (prompt) and written (completion).", ["direction"]
)
FIRST_TOKEN_SECONDS = Histogram(
    "packhorse_first_token_seconds",
    "Streams: from the request's arrival to its first chunk.",
    buckets=_SECONDS,
)
REQUEST_SECONDS = Histogram(
    "packhorse_request_seconds",
    "From the request's arrival to its end, however it ended.",
    buckets=_SECONDS,
)
READY = Gauge("packhorse_ready", "1 while new requests are taken, 0 while starting or draining.")


def exposition() -> tuple[bytes, str]:
    """The whole registry in Prometheus' text format, and its content type."""
    return prometheus_client.generate_latest(), prometheus_client.CONTENT_TYPE_LATEST
