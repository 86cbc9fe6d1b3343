"""Who may call what: keys, scopes, and how many calls at once, before a body is read; and whose
operators' calls are answered without keys.

Pure ASGI, for the reason that RequestIds gives. Inside it, and outside of everything that costs
more.
"""

from __future__ import annotations

from packhorse.serve import messages
from packhorse.serve.access.exposure import Exposure, Sender
from packhorse.serve.access.keys import Keys, check_scope
from packhorse.serve.errors import ServeError
from packhorse.serve.messages import ANONYMOUS, Caller
from packhorse.serve.rest.errors import error_response
from packhorse.serve.service import Service
from starlette.types import ASGIApp, Receive, Scope, Send

# Operators' calls by vLLM's names.
OPERATORS = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/server_info"}


class Guard:
    """Answers 403 to operators' calls of strangers on a server without keys: other machines, what
    proxies pass on, web pages.

    Outside of CORS, so that no page is told in advance that it may.
    """

    def __init__(self, app: ASGIApp, service: Service, exposure: Exposure) -> None:
        self._app = app
        self._service = service
        self._exposure = exposure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope_of(scope["path"]) == "admin":
            try:
                self._exposure.check(sender_of(scope))
            except ServeError as error:
                self._service.refused(scope.get("state", {}).get("request_id", "-"), error)
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Access:
    """Puts the caller into the request's state, or answers 401, 403 or 429. /health and /ping are
    open, and /metrics if the settings say so.
    """

    def __init__(self, app: ASGIApp, service: Service, keys: Keys | None) -> None:
        """`keys` None: everybody may do everything."""
        self._app = app
        self._service = service
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
        place = None
        try:
            if self._keys is not None:
                caller = self._identified(scope, self._keys)
            state["caller"] = caller
            needed = scope_of(path)
            check_scope(caller, needed)
            if needed == "inference" and scope["method"] == "POST":
                place = self._service.enter(caller)
        except ServeError as error:
            self._service.refused(state.get("request_id", "-"), error, caller)
            await error_response(error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            if place is not None:
                place.leave()

    def _identified(self, scope: Scope, keys: Keys) -> Caller:
        """Raises Unauthenticated."""
        for name, value in scope["headers"]:
            if name == b"authorization":
                return keys.caller(value)
        return keys.caller(None)


def scope_of(path: str) -> messages.Scope:
    """What a path needs. Unknown ones need what most do, so that they tell strangers nothing."""
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
    """What is no request has no key, and nothing here is made of it."""
    if scope["type"] == "lifespan":  # the server's own, to its app
        await app(scope, receive, send)
    elif scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})  # 403 to the handshake
    else:
        raise RuntimeError(f"ASGI scopes of type {scope['type']!r} are not served.")
