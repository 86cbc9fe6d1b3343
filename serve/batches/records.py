"""The data of files and batches, as they are kept on disk and shown to their tenant.

Called by every file of this room, and by the API layer, which words it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from packhorse.serve.messages import Caller

Purpose = Literal["batch", "batch_output"]
Status = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling",
    "cancelled",
]  # fmt: skip
ENDED: frozenset[Status] = frozenset({"completed", "failed", "expired", "cancelled"})

# The endpoints whose calls a batch may make: those that infer, and read one JSON body.
ENDPOINTS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings",
    "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/v1/classify", "/classify",
    "/pooling",
)  # fmt: skip


class Owner(msgspec.Struct, frozen=True):
    """Who a batch runs as. The rights of the key are looked up when a line runs; no key is kept."""

    name: str
    tenant: str


class FileRecord(msgspec.Struct, frozen=True):
    """A file of a tenant. Times are Unix time in seconds."""

    id: str
    tenant: str
    filename: str
    purpose: Purpose
    bytes: int
    created_at: int
    expires_at: int


class LineFault(msgspec.Struct, frozen=True):
    """Why a batch failed. `line` counts from 1; None: it is not about one line."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class TokenUsage(msgspec.Struct):
    """Tokens of a batch's answers so far."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def add(self, usage: object) -> None:
        """Add the `usage` of an answer, in OpenAI's or Anthropic's words; anything else is none."""
        if not isinstance(usage, dict):
            return
        self.input_tokens += _count(usage, "prompt_tokens", "input_tokens")
        self.output_tokens += _count(usage, "completion_tokens", "output_tokens")
        for names, field, wanted in (
            (("prompt_tokens_details", "input_tokens_details"), "cached_tokens", "cached_tokens"),
            (
                ("completion_tokens_details", "output_tokens_details"),
                "reasoning_tokens",
                "reasoning_tokens",
            ),
        ):
            for name in names:
                if isinstance(details := usage.get(name), dict):
                    setattr(self, field, getattr(self, field) + _count(details, wanted))


def _count(document: dict[str, Any], *names: str) -> int:
    found = (document.get(name) for name in names)
    return next((value for value in found if type(value) is int), 0)


class Progress(msgspec.Struct):
    """How many lines a batch has, and how many have an answer or an error."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchRecord(msgspec.Struct):
    """A batch. The ids of its output and error file are given when it is made, and shown when the
    files are there. Times are Unix time in seconds.
    """

    id: str
    owner: Owner
    input_file_id: str
    endpoint: str
    completion_window: str
    created_at: int
    expires_at: int
    output_id: str
    error_id: str
    status: Status = "validating"
    outcome: Status | None = None
    """What it ends as, once it is being finalized."""
    output_ttl_s: int | None = None
    metadata: dict[str, str] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    progress: Progress = msgspec.field(default_factory=Progress)
    usage: TokenUsage = msgspec.field(default_factory=TokenUsage)
    faults: list[LineFault] = msgspec.field(default_factory=list)
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


class Reply(NamedTuple):
    """What an endpoint answers to one line."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


# Makes one call as a caller: (endpoint, JSON body, caller, request id) -> its reply. Cancelling it
# aborts the call.
Answer = Callable[[str, bytes, Caller, str], Awaitable[Reply]]
# The caller that an owner is now. Raises ServeError when its key is gone or may not infer.
CallerOf = Callable[[Owner], Caller]
