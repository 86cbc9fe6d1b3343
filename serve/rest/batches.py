"""/v1/files and /v1/batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, BinaryIO
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from packhorse.serve.api.batches import BatchBody, Batches, Page, off, page_of
from packhorse.serve.api.generate import RefusalsCounted
from packhorse.serve.errors import Cancelled, DeadlineExceeded, Invalid, TooLarge, UnsupportedCoding
from packhorse.serve.pipeline import Pipeline
from packhorse.serve.rest.openapi import body_document, documented
from packhorse.serve.rest.requests import BodyLimits, read_body
from packhorse.serve.rest.responses import json_response
from packhorse.serve.settings.http import HttpSettings

READ_BYTES = 2**18
FORM_BYTES = 64 * 1024
"""What a form may have besides its file."""
MAX_FIELD_BYTES = 1024
FIELDS = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]"})
UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"const": "batch"},
                    },
                }
            }
        },
    }
}


def _query(*names: str) -> dict[str, Any]:
    schemas: dict[str, Any] = {
        "limit": {"type": "integer", "minimum": 1, "maximum": 100},
        "order": {"enum": ["asc", "desc"]},
    }
    return {
        "parameters": [
            {"name": name, "in": "query", "schema": schemas.get(name, {"type": "string"})}
            for name in names
        ]
    }


def routes(pipeline: Pipeline, settings: HttpSettings, batches: Batches | None) -> APIRouter:
    """The endpoints; `batches` None: each of them says that the server has none."""
    router = APIRouter()
    limits = BodyLimits(settings, pipeline.admission.bodies)

    def known() -> Batches:
        if batches is None:
            raise off()
        return batches

    def counted(request: Request) -> RefusalsCounted:
        return RefusalsCounted(pipeline, request.state.request_id, request.state.caller)

    def page(request: Request, highest: int, default: int) -> Page:
        asked = request.query_params
        return page_of(
            asked.get("after"), asked.get("limit"), asked.get("order"),
            default=default, highest=highest,
        )  # fmt: skip

    @router.post("/v1/files", responses=documented("File"), openapi_extra=UPLOAD)
    async def upload_file(request: Request) -> Response:
        with counted(request):
            return json_response(await _upload(request, known(), settings.stalled_client_timeout_s))

    @router.get(
        "/v1/files",
        responses=documented("Files"),
        openapi_extra=_query("purpose", "after", "limit", "order"),
    )
    async def list_files(request: Request) -> Response:
        asked = page(request, 10_000, 10_000)
        purpose = request.query_params.get("purpose")
        return json_response(known().files(request.state.caller, asked, purpose))

    @router.get("/v1/files/{file_id}", responses=documented("File"))
    async def retrieve_file(request: Request, file_id: str) -> Response:
        return json_response(known().file(request.state.caller, file_id))

    @router.delete("/v1/files/{file_id}", responses=documented("FileDeleted"))
    async def delete_file(request: Request, file_id: str) -> Response:
        return json_response(await known().delete_file(request.state.caller, file_id))

    @router.get("/v1/files/{file_id}/content", responses=_content_documented())
    async def file_content(request: Request, file_id: str) -> Response:
        caller = request.state.caller
        document = known().file(caller, file_id)
        content = await known().open_content(caller, file_id)
        headers = {
            "content-length": str(document["bytes"]),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(document['filename'])}",
        }
        return StreamingResponse(_pieces(content), headers=headers, media_type="application/jsonl")

    @router.post(
        "/v1/batches", responses=documented("Batch"), openapi_extra=body_document(BatchBody)
    )
    async def create_batch(request: Request) -> Response:
        with counted(request):
            body = await read_body(request, BatchBody, limits, settings.unknown_fields)
            document = await known().create(request.state.caller, body)
        headers = {"x-packhorse-ignored": ", ".join(body.ignored)} if body.ignored else None
        return json_response(document, headers)

    @router.get(
        "/v1/batches", responses=documented("Batches"), openapi_extra=_query("after", "limit")
    )
    async def list_batches(request: Request) -> Response:
        return json_response(known().batches(request.state.caller, page(request, 100, 20)))

    @router.get("/v1/batches/{batch_id}", responses=documented("Batch"))
    async def retrieve_batch(request: Request, batch_id: str) -> Response:
        return json_response(known().batch(request.state.caller, batch_id))

    @router.post("/v1/batches/{batch_id}/cancel", responses=documented("Batch"))
    async def cancel_batch(request: Request, batch_id: str) -> Response:
        with counted(request):
            return json_response(await known().cancel(request.state.caller, batch_id))

    return router


def _content_documented() -> dict[int | str, dict[str, Any]]:
    responses = documented("File")
    responses[200] = {
        "description": "the file's bytes",
        "content": {"application/jsonl": {"schema": {"type": "string", "format": "binary"}}},
    }
    return responses


async def _pieces(content: BinaryIO) -> AsyncIterator[bytes]:
    """The rest of the file, which is closed at the end."""
    try:
        while piece := await asyncio.to_thread(content.read, READ_BYTES):
            yield piece
    finally:
        content.close()


async def _upload(request: Request, batches: Batches, stalled_s: float) -> dict[str, Any]:
    """Read a form with a file, which goes to the disk as it comes. Raises Invalid, TooLarge,
    UnsupportedCoding, Overloaded, Conflict, DeadlineExceeded, Unavailable or Cancelled.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedCoding("Files are taken without Content-Encoding; send it as it is.")
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise Invalid("Send multipart/form-data with the parts file and purpose.")
    largest = batches.max_file_bytes + FORM_BYTES
    too_large = TooLarge(
        f"The file is above the limit of {batches.max_file_bytes} bytes; split it."
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > largest:
        raise too_large
    upload = batches.begin_upload(request.state.caller)
    try:
        form = _Form(boundary)
        size = 0
        async with aclosing(_arriving(request, stalled_s)) as parts:
            async for part in parts:
                size += len(part)
                if size > largest:
                    raise too_large
                for piece in form.read(part):
                    await upload.write(piece)
        form.end()
        return await batches.keep(upload, form.fields, form.filename)
    finally:
        await upload.abandon()


async def _arriving(request: Request, stalled_s: float) -> AsyncGenerator[bytes, None]:
    """The parts of a body. Raises DeadlineExceeded when none comes for so long, or Cancelled."""
    parts = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(stalled_s):
                part = await anext(parts)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise DeadlineExceeded(
                f"Nothing of the file came for {stalled_s:g} s; send it faster."
            ) from None
        except ClientDisconnect as error:
            raise Cancelled("The client closed the connection.") from error
        yield part


class _Form:
    """A form with one file, read in the pieces in which it arrives."""

    def __init__(self, boundary: bytes) -> None:
        """Raises Invalid."""
        self.fields: dict[str, str] = {}
        self.filename = ""
        self._has_file = False
        self._is_whole = False
        self._headers: dict[bytes, bytes] = {}
        self._header = [bytearray(), bytearray()]
        self._name: str | None = None
        self._value = bytearray()
        self._pieces: list[bytes] = []
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._headers.clear,
            "on_header_field": partial(self._add_header, 0),
            "on_header_value": partial(self._add_header, 1),
            "on_header_end": self._header_end,
            "on_headers_finished": self._begin,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._whole,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        except FormParserError as error:
            raise self._invalid(error) from error

    def read(self, part: bytes) -> list[bytes]:
        """Read a part of the body, and return what it has of the file. Raises Invalid."""
        self._pieces = []
        try:
            self._parser.write(part)
        except FormParserError as error:
            raise self._invalid(error) from error
        return self._pieces

    def end(self) -> None:
        """The body has ended. Raises Invalid when the form has not, or has no file."""
        if not self._is_whole:
            raise Invalid("The form ends before its last boundary; send all of it.")
        if not self._has_file:
            raise Invalid("file: the form has no such part; send one.", param="file")

    def _invalid(self, error: FormParserError) -> Invalid:
        return Invalid(f"The body is not valid multipart/form-data: {error}.")

    def _add_header(self, part: int, data: bytes, start: int, end: int) -> None:
        self._header[part] += data[start:end]

    def _header_end(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = [bytearray(), bytearray()]

    def _begin(self) -> None:
        _, options = parse_options_header(
            self._headers.get(b"content-disposition", b"").decode("latin-1")
        )
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._value = bytearray()
        if self._name == "file":
            if self._has_file:
                raise Invalid("file: the form has two; send one.", param="file")
            self._has_file = True
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._pieces.append(data[start:end])
        elif self._name in FIELDS:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise Invalid(
                    f"{self._name}: above the limit of {MAX_FIELD_BYTES} bytes.", param=self._name
                )

    def _end(self) -> None:
        if self._name in FIELDS:
            self.fields[self._name] = self._value.decode("utf-8", "replace")
        self._name = None

    def _whole(self) -> None:
        self._is_whole = True
