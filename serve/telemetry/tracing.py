"""OpenTelemetry: the spans of a call, exported by OTLP. The only user of opentelemetry.

Off unless `tracing.endpoint` is set; then nothing of this is imported or run. The process's own
tracer provider is left alone, and vLLM's tracer stays off: it would set that provider, and its
spans come from `RequestOutput` as well. Spans are made when a call ends, from times that were
written down; the exporter has a thread of its own, and a collector that is down costs spans only.

Called by `main` (set-up), `rest` and `rpc` (a span a call).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from opentelemetry import trace as otel
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from packhorse.serve.settings.sections import TracingSettings

_CONTEXT = TraceContextTextMapPropagator()
# It quotes what it does not understand of tracestate, which anybody may send.
logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)
LAST_SPANS_S = 2.0
# As HTTP has them, and gRPC.
_CARRIED = {
    name: field for field in ("traceparent", "tracestate") for name in (field, field.encode())
}


class Span:
    """One span; satisfies messages.Trace. Those below it are made with `span`."""

    __slots__ = ("_offset_ns", "_span", "_tracer")

    def __init__(self, tracer: otel.Tracer, span: otel.Span, offset_ns: int) -> None:
        """`offset_ns` + time.monotonic_ns() is Unix time."""
        self._tracer, self._span, self._offset_ns = tracer, span, offset_ns

    @property
    def trace_id(self) -> str:
        return f"{self._span.get_span_context().trace_id:032x}"

    def span(self, name: str, start_s: float, end_s: float, /, **attributes: Any) -> Span:
        if not self._span.get_span_context().trace_flags.sampled:
            return self
        made = self._tracer.start_span(
            name,
            otel.set_span_in_context(self._span),
            attributes={key: value for key, value in attributes.items() if value is not None},
            start_time=self._unix_ns(start_s),
        )
        made.end(self._unix_ns(max(start_s, end_s)))
        return Span(self._tracer, made, self._offset_ns)

    def _unix_ns(self, monotonic_s: float) -> int:
        return int(monotonic_s * 1e9) + self._offset_ns


class CallSpan(Span):
    """The span of one call, as its server sees it."""

    __slots__ = ()

    @property
    def traceparent(self) -> str:
        """W3C's header, for the answer."""
        carrier: dict[str, str] = {}
        _CONTEXT.inject(carrier, otel.set_span_in_context(self._span))
        return carrier["traceparent"]

    def end(self, name: str, *, failed: bool, **attributes: Any) -> None:
        """It is over. `failed`: by the server's fault."""
        self._span.update_name(name)
        self._span.set_attributes({k: v for k, v in attributes.items() if v is not None})
        if failed:
            self._span.set_status(otel.StatusCode.ERROR)
        self._span.end()


class Tracing:
    """Makes the spans of calls."""

    def __init__(self, exporter: SpanExporter, *, sample_ratio: float, service_name: str) -> None:
        """Of the calls that bring no decision with them, `sample_ratio` are traced (0 to 1)."""
        resource = {"service.name": service_name, "service.version": version("packhorse")}
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(sample_ratio),
            resource=Resource.create(resource),
            shutdown_on_exit=False,  # `close` does, with a limit
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("packhorse", version("packhorse"))

    def begin(
        self, name: str, sent_with: Iterable[tuple[str | bytes, str | bytes]], **attributes: Any
    ) -> CallSpan:
        """A call has come. `sent_with`: its headers or metadata, of which traceparent and
        tracestate are read; damaged ones are passed over.
        """
        span = self._tracer.start_span(
            name,
            _CONTEXT.extract(_carrier(sent_with)),
            kind=otel.SpanKind.SERVER,
            attributes=attributes,
        )
        return CallSpan(self._tracer, span, time.time_ns() - time.monotonic_ns())

    async def close(self) -> None:
        """Export what is left, for a moment at most: the exporter itself would try for longer."""
        last = threading.Thread(target=self._provider.force_flush, daemon=True)
        last.start()
        await asyncio.to_thread(last.join, LAST_SPANS_S)


def _carrier(sent_with: Iterable[tuple[str | bytes, str | bytes]]) -> dict[str, str]:
    """W3C: a list may come in several headers, and two parents are none."""
    carrier: dict[str, str] = {}
    for name, value in sent_with:
        field = _CARRIED.get(name)
        if field is not None:
            text = value.decode("latin-1") if isinstance(value, bytes) else value
            carrier[field] = f"{carrier[field]},{text}" if field in carrier else text
    return carrier


def tracing_of(settings: TracingSettings) -> Tracing:
    """What the settings ask for; they have an endpoint."""
    headers = {name: value.get_secret_value() for name, value in settings.headers.items()}
    endpoint = settings.endpoint or ""
    exporter: SpanExporter
    if settings.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as by_grpc

        exporter = by_grpc.OTLPSpanExporter(
            endpoint, insecure=endpoint.startswith("http://"), headers=headers
        )
    else:
        from opentelemetry.exporter.otlp.proto.http import trace_exporter as by_http

        exporter = by_http.OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces", headers=headers)
    return Tracing(exporter, sample_ratio=settings.sample_ratio, service_name=settings.service_name)
