"""When the steps of one request were taken: told at its end, as spans and as fields of its line.

Nothing is told on the way, so that a request that nobody traces pays for a few readings of the
clock. Times are time.monotonic()'s; 0.0 is for steps that were not taken.
"""

from __future__ import annotations

import time

from packhorse.serve.messages import CacheMark, EngineTimes, GenerateRequest, Route, Trace, Usage


class Timeline:
    """Made when the request arrives at the service. Whoever takes a step writes its time here."""

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
        """Begun; `rendered_s` is its end, and so below."""
        self.rendered_s = 0.0
        self.lookup_s = 0.0
        self.looked_up_s = 0.0
        self.prepared_s = 0.0
        """All that needs no place in the engine is done."""
        self.launched_s = 0.0
        """It has its place, and its turn on the adapter: the engine gets it now."""
        self.first_s = 0.0
        self.engine: EngineTimes | None = None

    def fields(self) -> dict[str, float]:
        """For the request's line, in seconds; only what happened."""
        found = {"route_s": self.routed_s - self.arrived_s}
        if self.launched_s:
            found["before_engine_s"] = self.launched_s - self.arrived_s
        if self.launched_s and self.engine is not None and self.engine.scheduled_s:
            found["queue_s"] = self.engine.scheduled_s - self.engine.queued_s
        if self.first_s:
            found["first_token_s"] = self.first_s - self.arrived_s
        found["total_s"] = time.monotonic() - self.arrived_s
        return {name: round(max(seconds, 0.0), 6) for name, seconds in found.items()}

    def tell(
        self, request: GenerateRequest, route: Route, mark: CacheMark, usage: Usage, outcome: str
    ) -> None:
        """The spans, under the call's own; for a request that has ended now."""
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
                **named, **{"packhorse.cache": mark},
            )  # fmt: skip
        if self.prepared_s and (self.launched_s or mark in ("miss", "bypass")):
            trace.span("admission", self.prepared_s, self.launched_s or now_s, **named)
        if self.launched_s:
            self._tell_engine(trace, request, route, usage, outcome, now_s)
        elif mark == "coalesced":
            trace.span("shared_generation", self.prepared_s or self.arrived_s, now_s, **named)

    def _tell_engine(
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
                "gen_ai.operation.name": "text_completion" if request.messages is None else "chat",
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
