"""The served models as objects, and which of them a request goes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from packhorse.serve.adapters.base import Adapters, Lease
from packhorse.serve.cache.base import Lookups, NoResults
from packhorse.serve.engines.base import Engine
from packhorse.serve.errors import Forbidden, Unavailable, UnknownModel
from packhorse.serve.limits.admission import Admission
from packhorse.serve.messages import ANONYMOUS, Caller, GenerateRequest, Message, RouteStage
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.routing.base import AUTO, Decision, Routing


class Model:
    """One base model with all that is its own: engine, adapters, routing by text, result cache,
    limits, metrics. Its engine comes later than the model does, and may be replaced.
    """

    def __init__(
        self,
        name: str,
        *,
        adapters: Adapters | None = None,
        routing: Routing | None = None,
        cache: Lookups | None = None,
        admission: Admission | None = None,
        metrics: ModelMetrics | None = None,
    ) -> None:
        """`name` is what clients ask for. Without `routing` there is no `auto`, and without a
        `cache` every answer is generated.
        """
        self.name = name
        self.metrics = metrics or ModelMetrics(name)
        self.adapters = adapters
        self.routing = routing
        self.has_cache = cache is not None
        self.cache: Lookups = cache or NoResults()
        self.admission = admission or Admission(metrics=self.metrics)
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """Raises Unavailable while it loads."""
        if self._engine is None:
            raise Unavailable("The engine is still loading; try again soon.", retry_after_s=10)
        return self._engine

    @property
    def is_loading(self) -> bool:
        return self._engine is None

    def attach(self, engine: Engine) -> None:
        """Serve with this engine from now on."""
        self._engine = engine

    def names(self, caller: Caller) -> list[str]:
        """What this caller can ask for, the base first."""
        base = [self.name] if caller.base else []
        auto = [AUTO] if self.routing is not None else []
        adapters = self.adapters.names if self.adapters else ()
        return [*base, *auto, *(name for name in adapters if _may_use(caller, name))]

    def has(self, name: str) -> bool:
        """Whether requests for this name are this model's."""
        if name == self.name or (name == AUTO and self.routing is not None):
            return True
        return self.adapters is not None and name in self.adapters

    def chooses_for(self, name: str) -> bool:
        """Whether the text of requests for this name decides which adapter answers."""
        routing = self.routing
        if routing is None:
            return False
        return name == AUTO or (name == self.name and routing.takes_base_name)

    def decide(self, request: GenerateRequest) -> Decision:
        """Which adapter answers, and why; `has` must hold of the request's name. Raises Forbidden
        where its text leads to what its caller may not use.
        """
        name, routing, caller = request.model, self.routing, request.caller
        if routing is None or not self.chooses_for(name):
            adapter = None if name == self.name else name
            return Decision(adapter, "explicit", None, f"The request names {name!r}.", ())
        messages: Sequence[Message] = request.messages or ()
        if isinstance(request.prompt, str):
            messages = ({"role": "user", "content": request.prompt},)
        decision = routing.decide(messages, may_use=partial(_may_use, caller))
        if decision.adapter is None and not caller.base:
            raise Forbidden(
                "The text of this request leads to the base model, which this key may not use; "
                "name an adapter (GET /v1/models lists those that it may).",
                param="model",
            )
        return decision


@dataclass(frozen=True, slots=True)
class Resolved:
    """Where a request goes: a model, and the right to one of its adapters (None: the base)."""

    model: Model
    lease: Lease | None
    stage: RouteStage


class Models:
    """The models of one server, by the names that clients ask for."""

    def __init__(self, first: Model, *others: Model) -> None:
        """`first` is the one meant where nothing is named."""
        self._models = (first, *others)

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models)

    @property
    def first(self) -> Model:
        return self._models[0]

    def check_loaded(self) -> None:
        """Raises Unavailable while no model has an engine: no name can be judged yet."""
        if all(model.is_loading for model in self._models):
            raise Unavailable("The engine is still loading; try again soon.", retry_after_s=10)

    @property
    def has_adapters(self) -> bool:
        """Whether there could be any."""
        return any(model.adapters is not None for model in self._models)

    @property
    def has_cache(self) -> bool:
        return any(model.has_cache for model in self._models)

    def names(self, caller: Caller = ANONYMOUS) -> list[str]:
        """What this caller can ask for."""
        return [name for model in self._models for name in model.names(caller)]

    def default(self, caller: Caller) -> str:
        """What is meant where a caller names no model."""
        if caller.base:
            return self.first.name
        return next(iter(self.names(caller)), self.first.name)

    def of(self, name: str, caller: Caller = ANONYMOUS) -> Model:
        """The model that answers to a name. Raises UnknownModel for a name that is not served,
        Forbidden for one that this caller may not use, whether it is served or not.
        """
        for model in self._models:
            if name == AUTO and model.routing is not None:
                return model
            if name == model.name:
                if caller.base:
                    return model
                break
        else:
            if _may_use(caller, name):
                for model in self._models:
                    if model.has(name):
                        return model
                raise self._unknown(name, caller)
        raise Forbidden(
            f"This key may not use {name[:80]!r}, or there is no such model; GET /v1/models "
            "lists what it may.",
            param="model",
        )

    def _unknown(self, name: str, caller: Caller) -> UnknownModel:
        known = self.names(caller)
        more = f" and {len(known) - 5} more (GET /v1/models)" if len(known) > 5 else ""
        return UnknownModel(
            f"There is no model {name[:80]!r} here; this server has "
            f"{', '.join(map(repr, known[:5]))}{more}.",
            param="model",
        )

    def for_request(self, request: GenerateRequest) -> Model:
        """The model that decides where a request goes. Raises UnknownModel, Forbidden."""
        for model in self._models:
            if model.chooses_for(request.model):
                return model
        return self.of(request.model, request.caller)

    def resolve(self, request: GenerateRequest) -> Resolved:
        """The model, and the adapter that is named or chosen by text. Raises ServeError."""
        model = self.for_request(request)
        decision = model.decide(request)
        if decision.adapter is None or model.adapters is None:
            return Resolved(model, None, decision.stage)
        return Resolved(model, model.adapters.lease(decision.adapter), decision.stage)


def _may_use(caller: Caller, adapter: str) -> bool:
    return caller.adapters is None or adapter in caller.adapters
