"""What every path of an HTTP server is asked for: HEAD, OPTIONS, and a slash at its end.

Pure ASGI, around everything else, so that what is inside sees plain paths and methods.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Manners:
    """HEAD is GET without the body (which the server itself leaves out, by the request's method);
    OPTIONS names the methods; `/v1/models/` is `/v1/models`, without a redirect, which would send
    clients behind a proxy to plain http and may lose their key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        is_odd = _CONTROL.search(path)
        if (
            method not in ("HEAD", "OPTIONS") and not path.endswith("/") and not is_odd
        ):  # nearly all
            await self._app(scope, receive, send)
            return
        if method == "OPTIONS" and path == "*":  # of the server as a whole
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        inner = dict(scope)
        if is_odd:  # routes match before a line's end, too: nothing is called like this
            path = inner["path"] = _CONTROL.sub("\ufffd", path)
        if len(path) > 1 and path.endswith("/") and not path.endswith("//"):
            inner["path"] = path[:-1]
            inner["raw_path"] = (scope.get("raw_path") or path.encode()).removesuffix(b"/")
        if method == "HEAD":
            inner["method"] = "GET"
        if method != "OPTIONS":
            await self._app(inner, receive, send)
            return

        is_answered = False

        async def send_options(message: Message) -> None:
            """A path that has other methods says which: that is the answer."""
            nonlocal is_answered
            if message["type"] == "http.response.start" and message["status"] == 405:
                kept = (b"allow", b"x-request-id", b"vary")
                headers = [pair for pair in message.get("headers", ()) if pair[0].lower() in kept]
                await send({"type": "http.response.start", "status": 204, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
                is_answered = True
            elif not is_answered:
                await send(message)

        await self._app(inner, receive, send_options)
