"""Who may call what: keys, scopes, and how many calls at once, before a body is read.

Pure ASGI, for the reason that RequestIds gives. Inside it, and outside of everything that costs
more.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from serve import messages
from serve.auth import Keys, check_scope
from serve.errors import ServeError
from serve.messages import ANONYMOUS, Caller
from serve.rest.errors import error_response
from serve.service import Service


class Access:
    """Puts the caller into the request's state, or answers 401, 403 or 429. /health is open, and
    /metrics if the settings say so.
    """

    def __init__(self, app: ASGIApp, service: Service, keys: Keys | None) -> None:
        """`keys` None: everybody may do everything."""
        self._app = app
        self._service = service
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope.get("path", "")
        is_open = path == "/health" or path.startswith("/health/")
        if path == "/metrics" and self._keys is not None and self._keys.open_metrics:
            is_open = True
        if scope["type"] != "http" or is_open:
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
    if path == "/admin" or path.startswith("/admin/"):
        return "admin"
    return "inference"
