"""What is written once about each request, at its end: metrics, one log line, spans."""

from __future__ import annotations

import logging
import time

from packhorse.serve.errors import ErrorKind, Internal, ServeError
from packhorse.serve.ignored import counted
from packhorse.serve.messages import ANONYMOUS, Caller
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.request_context import RequestContext
from packhorse.serve.telemetry.logs import RequestLog

logger = logging.getLogger("packhorse.request")


class Accounting:
    """Of one server. Every protocol's requests end here, so their counts and lines are the same."""

    def __init__(self, log: RequestLog | None = None) -> None:
        self._log = log or RequestLog()

    def refused(
        self, metrics: ModelMetrics, request_id: str, error: ServeError, caller: Caller = ANONYMOUS
    ) -> None:
        """Write about a request that was refused before it had a context."""
        metrics.requests.labels(error.kind).inc()
        self._log.line(request_id, caller, error.kind)

    def of(self, context: RequestContext, metrics: ModelMetrics) -> Account:
        """For an exit stack: what is written when the request ends."""
        return Account(self._log, context, metrics)


class Account:
    """Around all that is done for a request. An error decides the outcome; without one it is the
    context's, or `cancelled` when the request was left unfinished.
    """

    __slots__ = ("_context", "_log", "_metrics")

    def __init__(self, log: RequestLog, context: RequestContext, metrics: ModelMetrics) -> None:
        self._log = log
        self._context = context
        self._metrics = metrics

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Raises Internal in the place of an exception that is no ServeError."""
        context = self._context
        if isinstance(error, ServeError):
            context.outcome = str(error.kind)
        elif isinstance(error, Exception):
            context.outcome = str(ErrorKind.INTERNAL)
            logger.error(
                "request_id=%s failed unexpectedly", context.request.request_id, exc_info=error
            )
        self._write(context.outcome or str(ErrorKind.CANCELLED))
        if isinstance(error, Exception) and not isinstance(error, ServeError):
            raise Internal(
                "The server failed on this request; the request id leads to its log."
            ) from error

    def _write(self, outcome: str) -> None:
        context, metrics = self._context, self._metrics
        context.outcome = outcome
        request, route, timings = context.request, context.route, context.timings
        metrics.requests_by_outcome[outcome].inc()
        metrics.request_seconds.observe(time.monotonic() - timings.arrived_s)
        usage, ignored = context.usage, context.ignored
        timings.export_spans(request, route, context.cache_status, usage, outcome)
        self._log.ended(
            request,
            outcome,
            model=route.model,
            adapter=route.adapter.engine_name if route.adapter else None,
            route=route.stage,
            cache=context.cache_status,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            **({"ignored": counted(ignored, metrics)} if ignored else {}),
            **timings.fields(),
        )
