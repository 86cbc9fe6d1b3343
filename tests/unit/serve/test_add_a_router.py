"""The router of docs/add-a-router.md does what the page says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from packhorse.serve.errors import Conflict, Forbidden
from packhorse.serve.messages import ANONYMOUS, Caller, GenerateRequest, Sampling
from packhorse.serve.models import Model, Models
from packhorse.serve.routing.base import Routing
from tests.conftest import ROOT

PAGE = (ROOT / "docs/add-a-router.md").read_text(encoding="utf-8")


class Adapters:
    """Two adapters, without anything behind them."""

    names = ("clinic", "code")

    def __contains__(self, name: object) -> bool:
        return name in self.names


def router(available: Any) -> Any:
    """The page's class."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/add-a-router.md", "exec"), names)
    return names["CodeFenceRouter"](available)


def ask(text: str, caller: Caller = ANONYMOUS) -> GenerateRequest:
    messages = ({"role": "user", "content": text},)
    return GenerateRequest("id", "auto", Sampling(), messages=messages, caller=caller)


def test_its_model_auto_is_decided_by_it() -> None:
    adapters: Any = Adapters()
    models = Models(Model("demo", adapters=adapters, routing=router(adapters)))
    assert models.names() == ["demo", "auto", "clinic", "code"]
    decision = models.first.decide(ask("Why does ```f(x)``` fail?"))
    assert (decision.adapter, decision.stage) == ("code", "rules")
    assert models.first.decide(ask("Why does it fail?")).adapter is None


def test_it_chooses_no_adapter_that_is_away_or_not_allowed() -> None:
    adapters: Any = Adapters()
    assert Models(
        Model("demo", adapters=adapters, routing=router(frozenset({"clinic"})))
    ).first.decide(ask("```f```")).adapter is None  # fmt: skip
    models = Models(Model("demo", adapters=adapters, routing=router(adapters)))
    key = Caller("key", "tenant", frozenset({"inference"}), adapters=frozenset({"clinic"}))
    decision = models.first.decide(ask("```f```", key))
    assert decision.adapter is None
    assert "code" not in f"{decision.reason} {decision.trace}"
    alone = Caller("key", "tenant", frozenset({"inference"}), base=False, adapters=frozenset())
    with pytest.raises(Forbidden):
        models.first.decide(ask("```f```", alone))


async def test_operators_calls_are_answered() -> None:
    made = router(Adapters())
    assert made.versions()
    assert (await made.reload())["accepted"]
    with pytest.raises(Conflict):
        made.roll_back()


def test_the_page_names_every_member_of_the_protocol() -> None:
    members = {name for name in vars(Routing) if not name.startswith("_")}
    assert members == {"takes_base_name", "decide", "versions", "reload", "roll_back"}
    table = PAGE.partition("The rules of")[0]
    assert all(f"`{name}" in table for name in members)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:serve|tests)/[\w/.]+\.py)`", PAGE))))
def test_the_files_that_the_page_names_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_names_that_the_page_gives_are_in_those_files() -> None:
    for path, name in (
        ("serve/app.py", "def build_router"),
        ("serve/messages.py", "RouteStage ="),
        ("serve/routing/learned.py", "class Table"),
        ("serve/routing/cascade.py", "def decide"),
        ("serve/routing/cross_validation.py", "class SelfTest"),
        ("serve/models.py", "class Model:"),
    ):
        assert name in (ROOT / path).read_text(encoding="utf-8"), path
