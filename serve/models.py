"""The models of a server: the base, its adapters, and `auto`; who may use which, and which of them
a request goes to.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from packhorse.serve.adapters.base import Adapters, Lease
from packhorse.serve.errors import Forbidden, UnknownModel
from packhorse.serve.messages import ANONYMOUS, Caller, GenerateRequest, Message, RouteStage
from packhorse.serve.routing.base import AUTO, Decision, Routing


def may_use(caller: Caller, adapter: str) -> bool:
    return caller.adapters is None or adapter in caller.adapters


class Models:
    """One base model and, on top of it, adapters or none."""

    def __init__(
        self, base: str, adapters: Adapters | None = None, routing: Routing | None = None
    ) -> None:
        """`base` is the name that clients ask for. Without `routing` there is no `auto`."""
        self.base = base
        self._adapters = adapters
        self._routing = routing

    @property
    def has_adapters(self) -> bool:
        """Whether there could be any."""
        return self._adapters is not None

    def names(self, caller: Caller = ANONYMOUS) -> list[str]:
        """What this caller can ask for, the base first."""
        base = [self.base] if caller.base else []
        auto = [AUTO] if self._routing is not None else []
        adapters = self._adapters.names if self._adapters else ()
        return [*base, *auto, *(name for name in adapters if may_use(caller, name))]

    def default(self, caller: Caller) -> str:
        """What is meant where a caller names no model."""
        if caller.base:
            return self.base
        return next(iter(self.names(caller)), self.base)

    def check(self, name: str, caller: Caller = ANONYMOUS) -> None:
        """Raises UnknownModel for a name that is not served, Forbidden for one that this caller may
        not use, whether it is served or not.
        """
        if name == AUTO and self._routing is not None:
            return
        if name == self.base and caller.base:
            return
        if name == self.base or not may_use(caller, name):
            raise Forbidden(
                f"This key may not use {name[:80]!r}, or there is no such model; GET /v1/models "
                "lists what it may.",
                param="model",
            )
        if self._adapters is None or name not in self._adapters:
            known = self.names(caller)
            more = f" and {len(known) - 5} more (GET /v1/models)" if len(known) > 5 else ""
            raise UnknownModel(
                f"There is no model {name[:80]!r} here; this server has "
                f"{', '.join(map(repr, known[:5]))}{more}.",
                param="model",
            )

    def decide(self, request: GenerateRequest) -> Decision:
        """Where the request goes, and why. Raises UnknownModel, Forbidden."""
        name, routing, caller = request.model, self._routing, request.caller
        by_text = name == AUTO or (name == self.base and routing and routing.takes_base_name)
        if not by_text or routing is None:
            self.check(name, caller)
            adapter = None if name == self.base else name
            return Decision(adapter, "explicit", None, f"The request names {name!r}.", ())
        messages: Sequence[Message] = request.messages or ()
        if isinstance(request.prompt, str):
            messages = ({"role": "user", "content": request.prompt},)
        decision = routing.decide(messages, may_use=partial(may_use, caller))
        if decision.adapter is None and not caller.base:
            raise Forbidden(
                "The text of this request leads to the base model, which this key may not use; "
                "name an adapter (GET /v1/models lists those that it may).",
                param="model",
            )
        return decision

    def lease(self, request: GenerateRequest) -> tuple[Lease | None, RouteStage]:
        """The adapter that the request names, or its text chooses; None is the base. Raises
        ServeError.
        """
        decision = self.decide(request)
        if decision.adapter is None or self._adapters is None:
            return None, decision.stage
        return self._adapters.lease(decision.adapter), decision.stage
