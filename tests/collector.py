"""An OTLP collector within the test's process: what it got, as plain data."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as services

from tests.client import wait_for


@dataclass
class Span:
    """Times are Unix nanoseconds."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    state: str
    start_ns: int
    end_ns: int
    status: int
    attributes: dict[str, Any]
    service: str


@dataclass
class Collected:
    """`url` is what `tracing.endpoint` is to be."""

    url: str
    spans: list[Span] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def take(self, request: pb.ExportTraceServiceRequest, headers: dict[str, str]) -> None:
        self.headers.append(headers)
        for resource in request.resource_spans:
            service = _attributes(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [_plain(span, service) for span in scope.spans]

    def trace(self, trace_id: str, root: str) -> dict[str, Span]:
        """The spans of a trace by their path of names; waits for the one that ends last."""

        def of_trace() -> list[Span]:
            return [span for span in self.spans if span.trace_id == trace_id]

        wait_for(lambda: root in {span.name for span in of_trace()})
        known = {span.span_id: span for span in of_trace()}

        def path(span: Span) -> str:
            above = known.get(span.parent_id)
            return f"{path(above)} > {span.name}" if above else span.name

        return {path(span): span for span in known.values()}


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def _plain(span: Any, service: str) -> Span:
    return Span(
        span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(),
        span.trace_state, span.start_time_unix_nano, span.end_time_unix_nano, span.status.code,
        _attributes(span.attributes), service,
    )  # fmt: skip


@contextmanager
def grpc_collector() -> Iterator[Collected]:
    server = grpc.server(ThreadPoolExecutor(2))
    found = Collected(f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")

    class Service(services.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            found.take(request, dict(context.invocation_metadata()))
            return pb.ExportTraceServiceResponse()

    services.add_TraceServiceServicer_to_server(Service(), server)
    server.start()
    try:
        yield found
    finally:
        server.stop(0).wait()


@contextmanager
def http_collector() -> Iterator[Collected]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            found.take(pb.ExportTraceServiceRequest.FromString(body), headers)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Collected(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
