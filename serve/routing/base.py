"""What the service and operators ask of routing; the Router is the real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from packhorse.serve.messages import RouteStage

AUTO = "auto"  # the `model` of a request that leaves the choice to its text

Step = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a conversation goes, and why.

    `adapter` None is the base. `stage` is the one that decided, and "default" when none did.
    `margin` is the learned stage's, when it was asked and its best adapter may be named. `reason`
    is one sentence; `trace` has one plain dict per rule tried, per score and per access check.
    """

    adapter: str | None
    stage: RouteStage
    margin: float | None
    reason: str
    trace: tuple[Step, ...]


class Routing(Protocol):
    @property
    def takes_base_name(self) -> bool:
        """Whether requests for the base's own name are routed by their text, too."""
        ...

    def decide(
        self, messages: Sequence[Mapping[str, Any]], *, may_use: Callable[[str], bool]
    ) -> Decision:
        """Which adapter, or None for the base. Costs less than a millisecond. Raises Forbidden, by
        the routes' own setting.
        """
        ...

    def generations(self) -> list[dict[str, Any]]:
        """The routing in use first, then what came before it, each with its report."""
        ...

    async def reload(self) -> dict[str, Any]:
        """Build from the files as they are now; whether it is in use, and its report. Raises
        Invalid for files that are wrong; the old routing stays then.
        """
        ...

    def roll_back(self) -> dict[str, Any]:
        """Return to the routing before. Raises Conflict when there is none."""
        ...
