"""Files and batches: what is asked, and the documents that answer, in OpenAI's words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, BinaryIO, ClassVar, Literal, NamedTuple, TypeVar

import msgspec
from pydantic import Field, field_validator

from packhorse.serve.api.validation import LenientBody, Unsupported
from packhorse.serve.batches.records import ENDPOINTS, BatchRecord, FileRecord
from packhorse.serve.batches.store import BatchStore, Upload
from packhorse.serve.errors import Invalid, NotFound
from packhorse.serve.messages import Caller

HOUR_S, MONTH_S = 3600, 30 * 24 * 3600
UNITS_S = {"m": 60, "h": 3600, "d": 24 * 3600}
MAX_FILENAME = 255
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f/\\\ud800-\udfff]")

Item = TypeVar("Item", BatchRecord, FileRecord)


class ExpiresAfter(LenientBody):
    """How long a file is kept."""

    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(ge=HOUR_S, le=MONTH_S)


class BatchBody(LenientBody):
    """POST /v1/batches."""

    unsupported: ClassVar = {
        "model": Unsupported((), "the body of each line names its model"),
    }

    input_file_id: str = Field(min_length=1, max_length=128)
    endpoint: str
    completion_window: str = "24h"
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = (
        Field(default_factory=dict, max_length=16)
    )
    output_expires_after: ExpiresAfter | None = None

    @field_validator("endpoint")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in ENDPOINTS:
            raise ValueError(f"should be one of {', '.join(ENDPOINTS)}")
        return value

    @field_validator("completion_window")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        if not re.fullmatch(r"[1-9][0-9]{0,5}[mhd]", value):
            raise ValueError("should be a time such as 24h, 30m or 7d")
        return value

    @property
    def window_s(self) -> int:
        """completion_window in seconds."""
        return int(self.completion_window[:-1]) * UNITS_S[self.completion_window[-1]]


class Page(NamedTuple):
    """Which part of a list is asked for: `limit` items after the one with this id."""

    after: str | None
    limit: int
    is_newest_first: bool = True


class Batches:
    """The files and batches of a server."""

    def __init__(self, store: BatchStore, *, max_window_s: int, max_file_bytes: int) -> None:
        """`max_window_s` bounds completion_window."""
        self._store = store
        self._max_window_s = max_window_s
        self.max_file_bytes = max_file_bytes

    def begin_upload(self, caller: Caller) -> Upload:
        """Raises Overloaded, Conflict."""
        return self._store.begin_upload(caller)

    async def keep(self, upload: Upload, fields: dict[str, str], filename: str) -> dict[str, Any]:
        """The document of an uploaded file. `fields` are those that came with it. Raises Invalid,
        Unavailable.
        """
        purpose = fields.get("purpose", "batch")
        if purpose != "batch":
            raise Invalid(
                f"purpose={purpose[:40]!r}: this server keeps files for batches alone; send batch.",
                param="purpose",
            )
        if not upload.size:
            raise Invalid("file: it is empty; send at least one line.", param="file")
        ttl_s = _expires_after(fields)
        name = _CONTROL.sub("_", filename)[-MAX_FILENAME:] or "file.jsonl"
        return file_document(await upload.finish(name, ttl_s))

    def file(self, caller: Caller, file_id: str) -> dict[str, Any]:
        """Raises NotFound."""
        return file_document(self._store.file(caller, file_id))

    def files(self, caller: Caller, page: Page, purpose: str | None) -> dict[str, Any]:
        """Raises Invalid."""
        found = self._store.files(caller)
        if purpose is not None:
            found = [file for file in found if file.purpose == purpose]
        return _list(found, page, file_document)

    async def open_content(self, caller: Caller, file_id: str) -> BinaryIO:
        """Raises NotFound."""
        return await self._store.open_content(caller, file_id)

    async def delete_file(self, caller: Caller, file_id: str) -> dict[str, Any]:
        """Raises NotFound, Conflict."""
        await self._store.delete_file(caller, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    async def create(self, caller: Caller, body: BatchBody) -> dict[str, Any]:
        """Raises Invalid, NotFound, Conflict, Overloaded."""
        if body.window_s > self._max_window_s:
            raise Invalid(
                f"completion_window={body.completion_window}: the longest here is "
                f"{self._max_window_s // 60}m; ask for less.",
                param="completion_window",
            )
        expires = body.output_expires_after
        batch = await self._store.create(
            caller,
            input_file_id=body.input_file_id,
            endpoint=body.endpoint,
            completion_window=body.completion_window,
            window_s=body.window_s,
            output_ttl_s=expires.seconds if expires else None,
            metadata=body.metadata or None,
        )
        return batch_document(batch)

    def batch(self, caller: Caller, batch_id: str) -> dict[str, Any]:
        """Raises NotFound."""
        return batch_document(self._store.batch(caller, batch_id))

    def batches(self, caller: Caller, page: Page) -> dict[str, Any]:
        """Raises Invalid."""
        return _list(self._store.batches(caller), page, batch_document)

    async def cancel(self, caller: Caller, batch_id: str) -> dict[str, Any]:
        """Raises NotFound, Conflict."""
        return batch_document(await self._store.cancel(caller, batch_id))


def off() -> NotFound:
    """The error of a server without a folder for files."""
    return NotFound(
        "This server keeps no files and runs no batches; its operator can set batches.folder."
    )


def page_of(
    after: str | None, limit: str | None, order: str | None, *, default: int, highest: int
) -> Page:
    """The page that query parameters ask for. Raises Invalid."""
    size = default
    if limit is not None:
        if not re.fullmatch(r"[0-9]{1,9}", limit) or not 1 <= int(limit) <= highest:
            raise Invalid(
                f"limit={limit[:20]!r} is not a number from 1 to {highest}.", param="limit"
            )
        size = int(limit)
    if order not in (None, "asc", "desc"):
        raise Invalid(f"order={str(order)[:20]!r} is not asc or desc.", param="order")
    return Page(after or None, size, order != "asc")


def _list(newest: Sequence[Item], page: Page, document: Any) -> dict[str, Any]:
    """Raises Invalid for an id that is not in the list."""
    items = list(newest) if page.is_newest_first else list(reversed(newest))
    start = 0
    if page.after is not None:
        places = [place for place, item in enumerate(items) if item.id == page.after]
        if not places:
            raise Invalid(
                f"after={page.after[:80]!r} is no id of this list; send the last_id of a page.",
                param="after",
            )
        start = places[0] + 1
    shown = items[start : start + page.limit]
    return {
        "object": "list",
        "data": list(map(document, shown)),
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
        "has_more": start + page.limit < len(items),
    }


def _expires_after(fields: dict[str, str]) -> int | None:
    """Seconds that a file is to be kept, of a form's `expires_after[seconds]`. Raises Invalid."""
    seconds = fields.get("expires_after[seconds]")
    if fields.get("expires_after[anchor]", "created_at") != "created_at":
        raise Invalid("expires_after[anchor]: should be created_at.", param="expires_after")
    if seconds is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", seconds) or not HOUR_S <= int(seconds) <= MONTH_S:
        raise Invalid(
            f"expires_after[seconds]={seconds[:20]!r} is not a number from {HOUR_S} to {MONTH_S}.",
            param="expires_after",
        )
    return int(seconds)


def file_document(file: FileRecord) -> dict[str, Any]:
    """OpenAI's file object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def batch_document(batch: BatchRecord) -> dict[str, Any]:
    """OpenAI's batch object."""
    usage = batch.usage
    faults = [{"object": "error", **msgspec.to_builtins(fault)} for fault in batch.faults]
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": faults} if faults else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "in_progress_at": batch.in_progress_at,
        "expires_at": batch.expires_at,
        "finalizing_at": batch.finalizing_at,
        "completed_at": batch.completed_at,
        "failed_at": batch.failed_at,
        "expired_at": batch.expired_at,
        "cancelling_at": batch.cancelling_at,
        "cancelled_at": batch.cancelled_at,
        "request_counts": msgspec.to_builtins(batch.progress),
        "usage": {
            "input_tokens": usage.input_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.input_tokens + usage.output_tokens,
        },
        "metadata": batch.metadata,
    }
