"""The format of log lines, and the one line of every request.

A request's line is always one JSON object, so that it can be searched and counted. All other lines
are text or, with `log_format: json`, JSON objects too. No line contains prompts, unless
`log_prompts` is set. Called by `server` (set-up) and by `accounting` (a line per request).
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from packhorse.serve.messages import Caller, GenerateRequest

logger = logging.getLogger("packhorse.request")

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def set_up(level: str, form: Literal["text", "json"], *, prompts: bool) -> None:
    """Log to stderr from now on. Warns when prompts are logged."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines(as_json=form == "json"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # vLLM logs while it is imported, before it reads its own log level.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    # uvicorn's "Started server process" lines repeat ours.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # The hub's client logs the URL of each file; a signed URL is as secret as a token.
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if prompts:
        logging.getLogger("packhorse").warning(
            "PROMPTS ARE LOGGED: log_prompts is on, and every request's text goes into this log. "
            "It is for debugging; never use it where others' requests are served"
        )


class Lines(logging.Formatter):
    """Formats lines of requests as JSON, and other lines as text or JSON."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__(TEXT)
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        request: dict[str, Any] | None = getattr(record, "request", None)
        if request is None and not self._as_json:
            return super().format(record)
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        head = {"time": at, "level": record.levelname.lower(), "logger": record.name}
        if request is not None:
            return _json({**head, **request})
        line = {**head, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _json(line)


class RequestLog:
    """Writes the lines of requests."""

    def __init__(self, *, prompts: bool = False) -> None:
        """`prompts`: include their texts."""
        self._prompts = prompts

    def ended(self, request: GenerateRequest, outcome: str, **fields: Any) -> None:
        """The line of a request that the pipeline has accepted."""
        if request.trace is not None:
            fields["trace_id"] = request.trace.trace_id
        if self._prompts:
            fields["prompt"] = request.prompt if request.messages is None else request.messages
        self.line(request.request_id, request.caller, outcome, **fields)

    def line(self, request_id: str, caller: Caller, outcome: str, **fields: Any) -> None:
        """The line of any request, also of one with a bad body."""
        line = {
            "request_id": request_id,
            "key": caller.name,
            "tenant": caller.tenant,
            "outcome": outcome,
            **fields,
        }
        logger.info("request_id=%s outcome=%s", request_id, outcome, extra={"request": line})


_encoder = msgspec.json.Encoder(enc_hook=repr)


def _json(line: dict[str, Any]) -> str:
    return _encoder.encode(line).decode()
