"""The times of the steps of one request; exported at its end, as spans and as fields of its log
line.

Nothing is exported earlier, so a request without a trace pays only for reading the clock. All times
are those of time.monotonic(); 0.0 means that the step was not taken.
"""

from __future__ import annotations

import time

from packhorse.serve.messages import CacheStatus, EngineTimes, GenerateRequest, Route, Trace, Usage


class RequestTimings:
    """Made when the request arrives at the pipeline. The code of each step writes its time here."""

    __slots__ = (
        "arrived_s",
        "engine",
        "first_s",
        "launched_s",
        "looked_up_s",
        "lookup_s",
        "prepared_s",
        "render_s",
        "rendered_s",
        "routed_s",
    )

    def __init__(self) -> None:
        self.arrived_s = time.monotonic()
        self.routed_s = 0.0
        self.render_s = 0.0
        """The begin of rendering; `rendered_s` is its end. `lookup_s` and `looked_up_s` likewise.
        """
        self.rendered_s = 0.0
        self.lookup_s = 0.0
        self.looked_up_s = 0.0
        self.prepared_s = 0.0
        """The request is ready for admission."""
        self.launched_s = 0.0
        """The request was admitted, has passed the LoRA queue, and goes to the engine now."""
        self.first_s = 0.0
        self.engine: EngineTimes | None = None

    def fields(self) -> dict[str, float]:
        """Durations in seconds for the request's log line; only of steps that were taken."""
        found = {"route_s": self.routed_s - self.arrived_s}
        if self.launched_s:
            found["before_engine_s"] = self.launched_s - self.arrived_s
        if self.launched_s and self.engine is not None and self.engine.scheduled_s:
            found["queue_s"] = self.engine.scheduled_s - self.engine.queued_s
        if self.first_s:
            found["first_token_s"] = self.first_s - self.arrived_s
        found["total_s"] = time.monotonic() - self.arrived_s
        return {name: round(max(seconds, 0.0), 6) for name, seconds in found.items()}

    def export_spans(
        self,
        request: GenerateRequest,
        route: Route,
        status: CacheStatus,
        usage: Usage,
        outcome: str,
    ) -> None:
        """Export the spans of a request that has ended now, below the span of its call."""
        trace, now_s = request.trace, time.monotonic()
        if trace is None:
            return
        adapter = route.adapter.name if route.adapter else None
        named = {"packhorse.request_id": request.request_id}
        trace.span(
            "route", self.arrived_s, self.routed_s,
            **named, **{"packhorse.route.stage": route.stage, "packhorse.adapter": adapter},
        )  # fmt: skip
        if self.render_s:
            trace.span(
                "render", self.render_s, self.rendered_s or now_s,
                **named, **{"gen_ai.usage.input_tokens": usage.prompt_tokens},
            )  # fmt: skip
        if self.lookup_s:
            trace.span(
                "cache", self.lookup_s, self.looked_up_s or now_s,
                **named, **{"packhorse.cache": status},
            )  # fmt: skip
        if self.prepared_s and (self.launched_s or status in ("miss", "bypass")):
            trace.span("admission", self.prepared_s, self.launched_s or now_s, **named)
        if self.launched_s:
            self._export_engine_spans(trace, request, route, usage, outcome, now_s)
        elif status == "coalesced":
            trace.span("shared_generation", self.prepared_s or self.arrived_s, now_s, **named)

    def _export_engine_spans(
        self,
        trace: Trace,
        request: GenerateRequest,
        route: Route,
        usage: Usage,
        outcome: str,
        now_s: float,
    ) -> None:
        times = self.engine
        ended_s = times.last_token_s if times and times.last_token_s else now_s
        engine = trace.span(
            "engine", self.launched_s, max(ended_s, self.launched_s),
            **{
                "packhorse.request_id": request.request_id,
                "gen_ai.operation.name": _operation(request),
                "gen_ai.request.model": request.model,
                "gen_ai.response.model": route.name,
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
                "packhorse.outcome": outcome,
            },
        )  # fmt: skip
        if times is None or not times.scheduled_s:
            return
        engine.span("engine.queue", times.queued_s, times.scheduled_s)
        if times.first_token_s:
            engine.span("engine.prefill", times.scheduled_s, times.first_token_s)
            engine.span("engine.decode", times.first_token_s, times.last_token_s)


def _operation(request: GenerateRequest) -> str:
    """OpenTelemetry's word for what is asked."""
    if request.pooling is not None:
        return "embeddings"
    return "text_completion" if request.messages is None else "chat"
