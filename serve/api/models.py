"""Which models there are, and which of them a request would go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.generate import CallContext, requests_of
from packhorse.serve.messages import Caller
from packhorse.serve.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model, an adapter, or `auto`, as clients see it."""

    id: str
    created: int
    """Unix time in seconds, of the server's start."""
    max_model_len: int
    """The most tokens of prompt and answer together."""
    parent: str | None = None
    """An adapter's base model."""
    runner: Literal["generate", "pooling"] = "generate"
    """What it is for: to generate text, or for embeddings, rerank and classification."""


def list_models(pipeline: Pipeline, caller: Caller) -> list[ModelCard]:
    """What this caller may ask for. Raises Unavailable while the engine loads."""
    return [_card(pipeline, name, caller) for name in pipeline.models.names(caller)]


def get_model(pipeline: Pipeline, name: str, caller: Caller) -> ModelCard:
    """Raises UnknownModel, Forbidden; Unavailable while the engine loads."""
    return _card(pipeline, name, caller)


def _card(pipeline: Pipeline, name: str, caller: Caller) -> ModelCard:
    model = pipeline.models.of(name, caller)
    parent = None if name == model.name else model.name
    engine = model.engine
    runner: Literal["generate", "pooling"] = "pooling" if engine.pooler else "generate"
    return ModelCard(name, pipeline.created_s, engine.max_model_len, parent, runner)


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """Where a chat would go, and why; see routing.base.Decision."""

    model: str
    adapter: str | None
    stage: str
    margin: float | None
    reason: str
    trace: Sequence[Mapping[str, Any]]


def decide_route(pipeline: Pipeline, body: ChatBody, context: CallContext) -> RouteDecision:
    """Route the chat without generating anything. Raises Invalid, UnknownModel, Forbidden."""
    (request,) = requests_of(pipeline, body, context)
    model = pipeline.models.for_request(request)
    decision = model.decide(request)
    return RouteDecision(
        decision.adapter or model.name,
        decision.adapter,
        decision.stage,
        decision.margin,
        decision.reason,
        decision.trace,
    )
