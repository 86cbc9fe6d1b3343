"""Which models a caller may use, the base among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from packhorse.serve.errors import Forbidden
from packhorse.serve.messages import Caller, GenerateRequest, Message, Sampling
from packhorse.serve.models import Model, Models
from packhorse.serve.routing.base import Decision


class Adapters:
    """Two, and nothing behind them."""

    names = ("clinic", "code")

    def __contains__(self, name: object) -> bool:
        return name in self.names


class Routing:
    """To the adapter that the text names, if the caller may use it; else to the base."""

    takes_base_name = False

    def decide(self, messages: Sequence[Message], *, may_use: Callable[[str], bool]) -> Decision:
        text = messages[-1]["content"]
        adapter = text if text in Adapters.names and may_use(text) else None
        return Decision(adapter, "rules" if adapter else "default", None, "", ())


def caller(**fields: Any) -> Caller:
    return Caller("key", "tenant", frozenset({"inference"}), **fields)


def ask(model: str, text: str, caller: Caller) -> GenerateRequest:
    messages = ({"role": "user", "content": text},)
    return GenerateRequest("id", model, Sampling(), messages=messages, caller=caller)


MODELS = Models(Model("base", adapters=Adapters(), routing=Routing()))  # type: ignore[arg-type]
CLINIC_ALONE = caller(base=False, adapters=frozenset({"clinic"}))


def decide(request: GenerateRequest) -> Decision:
    return MODELS.for_request(request).decide(request)


def test_a_key_can_be_kept_from_the_base() -> None:
    assert MODELS.names(CLINIC_ALONE) == ["auto", "clinic"]
    assert MODELS.names(caller()) == ["base", "auto", "clinic", "code"]
    with pytest.raises(Forbidden, match="may not use 'base'"):
        MODELS.of("base", CLINIC_ALONE)
    MODELS.of("base", caller())
    assert decide(ask("clinic", "hello", CLINIC_ALONE)).adapter == "clinic"
    with pytest.raises(Forbidden):
        decide(ask("base", "clinic", CLINIC_ALONE))


def test_nor_does_routing_lead_it_there() -> None:
    assert decide(ask("auto", "clinic", CLINIC_ALONE)).adapter == "clinic"
    for text in ("hello", "code"):
        with pytest.raises(Forbidden, match="leads to the base model"):
            decide(ask("auto", text, CLINIC_ALONE))
    assert decide(ask("auto", "hello", caller())).adapter is None


def test_the_bases_name_may_mean_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Routing, "takes_base_name", True)
    assert decide(ask("base", "clinic", CLINIC_ALONE)).adapter == "clinic"
    with pytest.raises(Forbidden):
        decide(ask("base", "hello", CLINIC_ALONE))


def test_what_is_meant_without_a_name() -> None:
    assert MODELS.default(caller()) == "base"
    alone = Models(Model("base", adapters=Adapters()))  # type: ignore[arg-type]
    assert alone.default(CLINIC_ALONE) == "clinic"
    assert alone.default(caller(base=False, adapters=frozenset())) == "base"
