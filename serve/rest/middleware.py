"""ASGI middleware around the HTTP application, from the outside in: methods and slashes, request
ids, and who may call what.

Pure ASGI: Starlette's BaseHTTPMiddleware would hide a client's disconnect.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from packhorse.serve import messages
from packhorse.serve.access.exposure import Exposure, Sender
from packhorse.serve.access.keys import Keys
from packhorse.serve.errors import ServeError
from packhorse.serve.messages import ANONYMOUS, Caller
from packhorse.serve.pipeline import Pipeline
from packhorse.serve.request_context import request_id_from
from packhorse.serve.rest.errors import error_response, is_anthropic
from packhorse.serve.rest.in_process import CALLER

if TYPE_CHECKING:
    from packhorse.serve.telemetry.tracing import CallSpan, Tracing

logger = logging.getLogger("packhorse.http")

# Operators' calls under vLLM's names.
OPERATORS = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/server_info"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class MethodsAndSlashes:
    """HEAD is answered as GET; the server itself leaves out the body, by the request's method.
    OPTIONS answers with the path's methods. `/v1/models/` is `/v1/models`, without a redirect: that
    would send clients behind a proxy to plain http, and they may lose their key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        has_control = _CONTROL.search(path)
        is_usual = method not in ("HEAD", "OPTIONS") and not path.endswith("/")
        if is_usual and not has_control:
            await self._app(scope, receive, send)
            return
        if method == "OPTIONS" and path == "*":  # about the server as a whole
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        inner = dict(scope)
        if has_control:  # a route also matches before a line end; no path has any
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
            """The 405 of a path that has other methods names them: make that the answer."""
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


class RequestIds:
    """Gives every request an id, the client's own when it sent a harmless one, and returns it in
    `x-request-id`. Logs unexpected exceptions with that id. With tracing, calls to /v1 get a span,
    which is returned in `traceparent`.
    """

    def __init__(self, app: ASGIApp, tracing: Tracing | None = None) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = request_id_from(sent.decode("latin-1"))
        # Streams use the server's own `send`; the framework wraps it several times.
        scope.setdefault("state", {}).update(request_id=request_id, send=send)
        headers = [(b"x-request-id", request_id.encode())]
        if is_anthropic(scope):
            headers.append((b"request-id", request_id.encode()))
        status = 499  # the client left before the answer
        span = None
        if self._tracing is not None and scope["path"].startswith("/v1/"):
            span = scope["state"]["trace"] = self._begin(self._tracing, scope, request_id)
            headers.append((b"traceparent", span.traceparent.encode()))

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # the edge: the framework has answered 500 and passes it on to be logged
            logger.exception("request_id=%s failed unexpectedly", request_id)
        finally:
            if span is not None:
                # No span is named after an unknown path: clients can invent any number of them.
                route = getattr(scope.get("route"), "path", None)
                span.end(
                    f"{scope['method']} {route}" if route else scope["method"],
                    failed=status >= 500,
                    **{"http.route": route, "http.response.status_code": status},
                )

    def _begin(self, tracing: Tracing, scope: Scope, request_id: str) -> CallSpan:
        attributes = {
            "http.request.method": scope["method"],
            "url.path": scope["path"][:256],
            "packhorse.request_id": request_id,
        }
        return tracing.begin(scope["method"], scope["headers"], **attributes)


class Guard:
    """Refuses operators' calls on a server without keys, unless they come from this machine: 403 to
    other machines, to calls that a proxy forwards, and to web pages.

    It stands outside of CORS, whose preflight answers would tell a page that it may call.
    """

    def __init__(self, app: ASGIApp, pipeline: Pipeline, exposure: Exposure) -> None:
        self._app = app
        self._pipeline = pipeline
        self._exposure = exposure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope_of(scope["path"]) == "admin":
            try:
                self._exposure.check(sender_of(scope))
            except ServeError as error:
                self._pipeline.refused(scope.get("state", {}).get("request_id", "-"), error)
                await error_response(error, scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Access:
    """Puts the caller into the request's state, or answers 401, 403 or 429. /health and /ping need
    no key, and neither does /metrics where the settings say so.
    """

    def __init__(self, app: ASGIApp, pipeline: Pipeline, keys: Keys | None) -> None:
        """`keys` None: everybody may do everything."""
        self._app = app
        self._pipeline = pipeline
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _refuse(scope, receive, send, self._app)
            return
        path: str = scope["path"]
        is_open = path in ("/health", "/ping") or path.startswith("/health/")
        if path == "/metrics" and self._keys is not None and self._keys.open_metrics:
            is_open = True
        if is_open:
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        caller = ANONYMOUS
        permit = None
        try:
            if (vouched := scope.get(CALLER)) is not None:  # by code of this process
                caller = vouched
            elif self._keys is not None:
                caller = self._identified(scope, self._keys)
            state["caller"] = caller
            needed = scope_of(path)
            if self._keys is not None:
                self._keys.check_scope(caller, needed)
            # What ends work must not wait for the work's own place.
            is_counted = scope["method"] == "POST" and not path.endswith("/cancel")
            if needed == "inference" and is_counted:
                permit = self._pipeline.enter(
                    caller, uses_engine=not path.startswith(("/v1/files", "/v1/batches"))
                )
        except ServeError as error:
            self._pipeline.refused(state.get("request_id", "-"), error, caller)
            await error_response(error, scope)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            if permit is not None:
                permit.leave()

    def _identified(self, scope: Scope, keys: Keys) -> Caller:
        """Raises Unauthenticated. Anthropic's clients send a key as x-api-key, or as others do."""
        given = None
        for name, value in scope["headers"]:
            if name == b"authorization":
                return keys.caller(value)
            if name == b"x-api-key":
                given = b"Bearer " + value
        return keys.caller(given)


def scope_of(path: str) -> messages.Scope:
    """The scope that a path needs. Unknown paths need `inference`: strangers cannot probe them."""
    if path == "/metrics":
        return "metrics"
    if path == "/admin" or path.startswith("/admin/") or path in OPERATORS:
        return "admin"
    return "inference"


def sender_of(scope: Scope) -> Sender:
    """Where a request comes from."""
    client, server = scope.get("client"), scope.get("server")
    return Sender(
        peer=client[0] if client else None,
        headers=[
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]
        ],
        scheme=scope["scheme"],
        arrived_at=server[0] if server else None,
    )


async def _refuse(scope: Scope, receive: Receive, send: Send, app: ASGIApp) -> None:
    """ASGI scopes other than HTTP requests: they carry no key, and nothing serves them."""
    if scope["type"] == "lifespan":  # the server's own, to its app
        await app(scope, receive, send)
    elif scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})  # 403 to the handshake
    else:
        raise RuntimeError(f"ASGI scopes of type {scope['type']!r} are not served.")
