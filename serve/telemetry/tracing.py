"""OpenTelemetry: the spans of a call, exported by OTLP. The only user of opentelemetry.

Imported only if `tracing.endpoint` is set. It does not change the process's tracer provider. vLLM's
tracer stays off: it would set that provider, and `RequestOutput` has the same times. Spans are made
when a call ends, from recorded times. The exporter has its own thread, and a collector that is down
costs only spans.

Called by `app` (set-up), `rest` and `rpc` (a span per call).
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

    from packhorse.serve.settings.tracing import TracingSettings

_CONTEXT = TraceContextTextMapPropagator()
# The SDK would log invalid tracestate headers, which any client may send.
logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)
LAST_SPANS_S = 2.0
# Header names as HTTP (str, bytes) and gRPC have them.
_CARRIED = {
    name: field for field in ("traceparent", "tracestate") for name in (field, field.encode())
}


class Span:
    """One span; satisfies messages.Trace. `span` makes a child."""

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
        """End the span. `failed`: by the server's fault."""
        self._span.update_name(name)
        self._span.set_attributes({k: v for k, v in attributes.items() if v is not None})
        if failed:
            self._span.set_status(otel.StatusCode.ERROR)
        self._span.end()


class Tracing:
    """Makes the spans of calls."""

    def __init__(self, exporter: SpanExporter, *, sample_ratio: float, service_name: str) -> None:
        """`sample_ratio` (0 to 1): the share of traced calls among those without a traceparent."""
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
        """Begin the span of a call. `sent_with` are its headers or metadata; traceparent and
        tracestate are read from them, and invalid ones are ignored.
        """
        span = self._tracer.start_span(
            name,
            _CONTEXT.extract(_carrier(sent_with)),
            kind=otel.SpanKind.SERVER,
            attributes=attributes,
        )
        return CallSpan(self._tracer, span, time.time_ns() - time.monotonic_ns())

    async def close(self) -> None:
        """Export the remaining spans, within LAST_SPANS_S: the exporter would try for longer."""
        last = threading.Thread(target=self._provider.force_flush, daemon=True)
        last.start()
        await asyncio.to_thread(last.join, LAST_SPANS_S)


def _carrier(sent_with: Iterable[tuple[str | bytes, str | bytes]]) -> dict[str, str]:
    """The trace headers. By W3C's rules a list may be in several headers, and two traceparents are
    invalid.
    """
    carrier: dict[str, str] = {}
    for name, value in sent_with:
        field = _CARRIED.get(name)
        if field is not None:
            text = value.decode("latin-1") if isinstance(value, bytes) else value
            carrier[field] = f"{carrier[field]},{text}" if field in carrier else text
    return carrier


def tracing_of(settings: TracingSettings) -> Tracing:
    """The tracing of these settings, whose endpoint is set."""
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
