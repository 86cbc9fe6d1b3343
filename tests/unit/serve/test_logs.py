"""Lines of the log: requests are JSON, prompts are not there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from packhorse.serve.messages import ANONYMOUS, GenerateRequest, Sampling
from packhorse.serve.telemetry import logs
from packhorse.serve.telemetry.logs import Lines, RequestLog

ASKED = GenerateRequest(
    "r-1", "demo", Sampling(), messages=({"role": "user", "content": "a secret, 秘密"},)
)


class Traced:
    trace_id = "0" * 31 + "7"

    def span(self, *_: Any, **__: Any) -> Traced:
        return self


def line_of(record: logging.LogRecord, *, as_json: bool = False) -> str:
    return Lines(as_json=as_json).format(record)


@pytest.fixture
def roots() -> Iterator[None]:
    """Whatever a test does to logging is undone."""
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_request_is_one_json_object(caplog: pytest.LogCaptureFixture, as_json: bool) -> None:
    caplog.set_level(logging.INFO)
    RequestLog().ended(ASKED, "ok", model="demo", prompt_tokens=7, total_s=0.25)
    line = json.loads(line_of(caplog.records[0], as_json=as_json))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "packhorse.request",
        "request_id": "r-1",
        "key": "-",
        "tenant": "anonymous",
        "outcome": "ok",
        "model": "demo",
        "prompt_tokens": 7,
        "total_s": 0.25,
    }


def test_prompts_are_there_only_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    RequestLog().ended(ASKED, "ok")
    RequestLog(prompts=True).ended(ASKED, "ok")
    silent, telling = (line_of(record) for record in caplog.records)
    assert "secret" not in silent
    assert json.loads(telling)["prompt"][0]["content"] == "a secret, 秘密"


def test_a_traced_request_names_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    traced = GenerateRequest("r-2", "demo", Sampling(), prompt="x", trace=Traced())
    RequestLog().ended(traced, "ok")
    assert json.loads(line_of(caplog.records[0]))["trace_id"] == Traced.trace_id


def test_other_lines_are_text_or_json(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("reason")
    except ValueError:
        logging.getLogger("packhorse.x").exception("It %s", "failed")
    record = caplog.records[0]
    assert " ERROR packhorse.x It failed\nTraceback" in line_of(record)
    line = json.loads(line_of(record, as_json=True))
    assert (line["level"], line["logger"], line["message"]) == ("error", "packhorse.x", "It failed")
    assert line["exception"].endswith("ValueError: reason")


@pytest.mark.usefixtures("roots")
@pytest.mark.parametrize("prompts", [False, True])
def test_logging_prompts_is_said_loudly(capsys: pytest.CaptureFixture[str], prompts: bool) -> None:
    logs.set_up("info", "text", prompts=prompts)
    said = capsys.readouterr().err
    assert ("WARNING packhorse PROMPTS ARE LOGGED" in said) is prompts


def test_a_line_without_a_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    RequestLog().line("r-3", ANONYMOUS, "invalid")
    assert json.loads(line_of(caplog.records[0]))["outcome"] == "invalid"


@pytest.mark.usefixtures("roots")
def test_addresses_of_downloads_are_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    """They may be signed."""
    logs.set_up("info", "text", prompts=False)
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).info("HTTP Request: GET https://cdn.example/x?Signature=s")
    assert "Signature" not in capsys.readouterr().err
