"""The stages in order: rules, learned table, default. A pure function of the conversation and of
what the caller may use, called on the event loop. Requests that name their adapter are not routed.

`Decision.trace` mentions only adapters that the caller may use: no name, rule or score reveals
another.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from itertools import islice
from typing import Any

from packhorse.serve.errors import Forbidden
from packhorse.serve.messages import RouteStage
from packhorse.serve.routing.base import Decision, Step
from packhorse.serve.routing.config import Routes
from packhorse.serve.routing.learned import EXPLAINED, Table
from packhorse.serve.routing.rules import Rules, Texts


class Cascade:
    """The stages of one routes file and one learned table."""

    def __init__(self, routes: Routes, table: Table | None, rules: Rules | None = None) -> None:
        """`rules` are those of `routes`, if they are compiled already: it takes milliseconds for
        each expression. Raises Invalid for an expression that is refused.
        """
        self.routes = routes
        self.table = table
        self.rules = Rules(routes) if rules is None else rules

    def decide(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        may_use: Callable[[str], bool],
        available: Container[str],
    ) -> Decision:
        """Choose among the adapters that requests can name now (`available`).

        Raises Forbidden, where the routes say `forbidden: refuse`, for an adapter that the caller
        may not use.
        """
        texts = Texts(messages)
        trace: list[Step] = []
        rule, tried = self.rules.first(texts, lambda name: name in available)
        for each in tried:
            target = each.rule.adapter
            if target is None or may_use(target):
                trace.append(
                    {"stage": "rules", "rule": each.rule.name, "adapter": target,
                     "outcome": each.outcome}
                )  # fmt: skip
        if rule is not None:
            if rule.adapter is None:
                reason = f"The rule {rule.name!r} matched; it sends to the base."
                return Decision(None, "rules", None, reason, tuple(trace))
            if not may_use(rule.adapter):
                return self._forbidden("rules", trace)
            trace.append({"stage": "access", "adapter": rule.adapter, "outcome": "allowed"})
            reason = f"The rule {rule.name!r} matched; it sends to {rule.adapter!r}."
            return Decision(rule.adapter, "rules", None, reason, tuple(trace))
        why, margin = "No rule matched", None
        if self.table is not None and self.routes.learned.enabled:
            text = texts.raw(self.routes.learned.over)
            if text.strip():
                found = self._learned(self.table, text, trace, may_use, available)
                if found.adapter is not None or found.stage == "learned":
                    return found
                why, margin = found.reason, found.margin
            else:
                why = "There is no text to decide by"
        return self._by_default(why, margin, trace, may_use, available)

    def _learned(
        self,
        table: Table,
        text: str,
        trace: list[Step],
        may_use: Callable[[str], bool],
        available: Container[str],
    ) -> Decision:
        """The learned stage's Decision. Stage "default" means that it abstains; `_by_default` then
        completes the reason's sentence.
        """
        verdict = table.judge(text)
        shown = ((name, score) for name, score in verdict.scores if may_use(name))
        for name, score in islice(shown, EXPLAINED):
            trace.append(
                {"stage": "learned", "adapter": name, "score": round(score, 4),
                 "threshold": round(table.thresholds[name], 4)}
            )  # fmt: skip
        allowed = may_use(verdict.best)
        margin = verdict.margin if allowed else None
        if verdict.adapter is None:
            why = "No rule matched and no adapter's examples are like this text"
            return Decision(None, "default", margin, why, ())
        if not allowed:
            return self._forbidden("learned", trace)
        if verdict.adapter not in available:
            why = f"The text is like the examples of {verdict.adapter!r}, which is not loaded"
            return Decision(None, "default", margin, why, ())
        trace.append({"stage": "access", "adapter": verdict.adapter, "outcome": "allowed"})
        reason = (
            f"The text is like the examples of {verdict.adapter!r}: margin {verdict.margin:.2f}, "
            f"above its threshold of {verdict.threshold:.2f}."
        )
        return Decision(verdict.adapter, "learned", margin, reason, tuple(trace))

    def _by_default(
        self,
        why: str,
        margin: float | None,
        trace: list[Step],
        may_use: Callable[[str], bool],
        available: Container[str],
    ) -> Decision:
        default = self.routes.default
        if default is not None and default in available and may_use(default):
            trace.append({"stage": "access", "adapter": default, "outcome": "allowed"})
            reason = f"{why}; the default is {default!r}."
            return Decision(default, "default", margin, reason, tuple(trace))
        # A default that cannot be used is not an error: the base answers.
        return Decision(None, "default", margin, f"{why}; the base answers.", tuple(trace))

    def _forbidden(self, stage: RouteStage, trace: list[Step]) -> Decision:
        trace.append({"stage": "access", "adapter": None, "outcome": "not allowed"})
        if self.routes.forbidden == "refuse":
            raise Forbidden(
                "This conversation belongs to an adapter that the key may not use; ask the "
                "operator for access, or name the model that is to answer."
            )
        reason = "The text belongs to an adapter that this key may not use; the base answers."
        return Decision(None, stage, None, reason, tuple(trace))
