"""Calls to the server's own endpoints from within its process: the same application, without a
socket and without a key. Batches make theirs with it.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Scope

from packhorse.serve.batches.records import Reply
from packhorse.serve.errors import Internal
from packhorse.serve.messages import Caller

CALLER = "packhorse.caller"
"""The key of a scope that says who calls. Only code of this process can set it: what a client sends
is in the scope's headers and path.
"""


class InProcess:
    """Satisfies `batches.records.Answer`."""

    def __init__(self, app: ASGIApp) -> None:
        """`app` is the users' application, inside all of its middleware."""
        self._app = app

    async def __call__(self, path: str, body: bytes, caller: Caller, request_id: str) -> Reply:
        """POST the JSON body as this caller. Cancelled, the call ends as if its client had left.
        Raises Internal when the answer is a stream.
        """
        incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        async def receive() -> Message:
            return incoming.pop() if incoming else await never

        status, headers, content = 500, dict[str, str](), bytearray()

        async def send(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = {
                    name.decode("latin-1").lower(): value.decode("latin-1")
                    for name, value in message.get("headers", ())
                }
                if headers.get("content-type", "").startswith("text/event-stream"):
                    raise Internal("The answer to this call is a stream, which it cannot be here.")
            else:
                content.extend(message.get("body", b""))

        await self._app(_scope(path, body, caller, request_id), receive, send)
        return Reply(status, headers, bytes(content))


def _scope(path: str, body: bytes, caller: Caller, request_id: str) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "client": None,
        "server": None,
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", request_id.encode()),
        ],
        "state": {},
        CALLER: caller,
    }
