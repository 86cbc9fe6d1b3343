"""What the server knows of one request: what was asked, and how far it has come."""

from __future__ import annotations

import re
import uuid

from packhorse.serve.adapters.base import Lease
from packhorse.serve.ignored import told
from packhorse.serve.messages import CacheStatus, Chunk, GenerateRequest, Prompt, Route, Usage
from packhorse.serve.telemetry.request_timings import RequestTimings

NOT_RENDERED = Prompt((), 0)
# What goes into logs and headers as it is.
CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def request_id_from(sent: str | bytes | None) -> str:
    """The client's own id when it is harmless, or else a new one."""
    if isinstance(sent, str) and CLIENT_ID.fullmatch(sent):
        return sent
    return uuid.uuid4().hex


class RequestContext:
    """Made when a request has a model and a route; the pipeline and the cache write their results
    here, and accounting reads them at the end.
    """

    __slots__ = (
        "cache_status",
        "cached_tokens",
        "completion_tokens",
        "lease",
        "outcome",
        "prompt",
        "reasoning_tokens",
        "request",
        "route",
        "timings",
        "unfinished",
    )

    def __init__(
        self, request: GenerateRequest, route: Route, lease: Lease | None, timings: RequestTimings
    ) -> None:
        self.request = request
        self.route = route
        self.lease = lease
        self.timings = timings
        self.prompt = NOT_RENDERED
        self.cache_status: CacheStatus = "bypass"
        self.unfinished = request.sampling.n
        """Choices whose last chunk has not come."""
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0
        self.outcome: str | None = None
        """ok, or the kind of error; None while the request runs."""

    def count(self, chunk: Chunk) -> None:
        """Add a chunk of the answer to the usage."""
        self.completion_tokens += len(chunk.token_ids)
        if chunk.cached_tokens:
            self.cached_tokens = chunk.cached_tokens
        if chunk.finish_reason is not None:
            self.unfinished -= 1
            self.reasoning_tokens += chunk.reasoning_tokens
            self.timings.engine = chunk.times

    @property
    def usage(self) -> Usage:
        """Tokens so far; complete after the last chunk."""
        return Usage(
            len(self.prompt.token_ids),
            self.completion_tokens,
            self.cached_tokens,
            self.reasoning_tokens,
        )

    @property
    def ignored(self) -> tuple[str, ...]:
        """Fields of the request without effect: unknown ones, and those of no use to this model."""
        names = (*self.request.ignored, *self.prompt.ignored)
        return told(names) if names else ()
