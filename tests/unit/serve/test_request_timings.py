"""What a request's times become: fields of its line, and spans."""

from __future__ import annotations

from typing import Any

import pytest

from packhorse.serve.messages import EngineTimes, GenerateRequest, Route, Sampling, Usage
from packhorse.serve.telemetry.request_timings import RequestTimings


class Spans:
    """Keeps (path, start, end)."""

    trace_id = "1" * 32

    def __init__(self, found: list[tuple[str, float, float]], path: str = "") -> None:
        self.found, self.path = found, path
        self.attributes: dict[str, Any] = {}

    def span(self, name: str, start_s: float, end_s: float, /, **attributes: Any) -> Spans:
        self.found.append((self.path + name, start_s, end_s))
        return Spans(self.found, f"{self.path}{name} > ")


def timings(**times: Any) -> RequestTimings:
    made = RequestTimings()
    made.arrived_s = 100.0
    for name, value in times.items():
        setattr(made, name, value)
    return made


WHOLE = {
    "routed_s": 100.5, "render_s": 101.0, "rendered_s": 102.0, "lookup_s": 102.0,
    "looked_up_s": 103.0, "prepared_s": 103.0, "launched_s": 104.0, "first_s": 107.0,
    "engine": EngineTimes(104.0, 105.0, 106.5, 109.0),
}  # fmt: skip


def told(mark: Any, **times: Any) -> list[tuple[str, float, float]]:
    found: list[tuple[str, float, float]] = []
    asked = GenerateRequest("r", "demo", Sampling(), prompt="x", trace=Spans(found))
    timings(**times).export_spans(asked, Route("demo"), mark, Usage(3, 4), "ok")
    return found


def test_a_whole_request() -> None:
    assert told("miss", **WHOLE) == [
        ("route", 100.0, 100.5),
        ("render", 101.0, 102.0),
        ("cache", 102.0, 103.0),
        ("admission", 103.0, 104.0),
        ("engine", 104.0, 109.0),
        ("engine > engine.queue", 104.0, 105.0),
        ("engine > engine.prefill", 105.0, 106.5),
        ("engine > engine.decode", 106.5, 109.0),
    ]


def test_a_hit_has_no_engine() -> None:
    names = [name for name, *_ in told("hit", **{**WHOLE, "launched_s": 0.0, "engine": None})]
    assert names == ["route", "render", "cache"]


def test_who_joins_waits_for_anothers_generation() -> None:
    """And the engine's times are that one's."""
    names = [name for name, *_ in told("coalesced", **{**WHOLE, "launched_s": 0.0})]
    assert names == ["route", "render", "cache", "shared_generation"]


def test_one_that_is_refused_at_admission() -> None:
    times = {**WHOLE, "launched_s": 0.0, "engine": None}
    assert [name for name, *_ in told("miss", **times)][-1] == "admission"


def test_an_engine_that_died_has_no_times() -> None:
    assert [name for name, *_ in told("bypass", **{**WHOLE, "engine": None})][-1] == "engine"


def test_fields_are_what_happened() -> None:
    fields = timings(**WHOLE).fields()
    assert {name: fields[name] for name in ("route_s", "before_engine_s", "queue_s")} == {
        "route_s": 0.5,
        "before_engine_s": 4.0,
        "queue_s": 1.0,
    }
    assert fields["first_token_s"] == pytest.approx(7.0)
    assert set(timings(routed_s=100.5).fields()) == {"route_s", "total_s"}
