"""The protocol of routing, as the pipeline and operators use it; implemented by Router. How to
write another one: docs/add-a-router.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from packhorse.serve.messages import RouteStage

AUTO = "auto"  # the `model` of requests that are routed by their text

Step = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a conversation goes, and why.

    `adapter` None is the base. `stage` is the stage that decided, "default" when none did. `margin`
    is that of the learned stage, if it ran and the caller may know its best adapter. `reason` is
    one sentence; `trace` has one plain dict for each rule tried, each score and each access check.
    """

    adapter: str | None
    stage: RouteStage
    margin: float | None
    reason: str
    trace: tuple[Step, ...]


class Routing(Protocol):
    @property
    def takes_base_name(self) -> bool:
        """Whether requests that name the base model are routed by their text, too."""
        ...

    def decide(
        self, messages: Sequence[Mapping[str, Any]], *, may_use: Callable[[str], bool]
    ) -> Decision:
        """The adapter for a conversation, or None for the base. Runs on the event loop, so it must
        take less than a millisecond. `may_use` says whether the caller may use an adapter. Raises
        Forbidden where the routes say so.
        """
        ...

    def versions(self) -> list[dict[str, Any]]:
        """The version in use, then the earlier ones, newest first; each with its report."""
        ...

    async def reload(self) -> dict[str, Any]:
        """Build a new version from the files as they are now; says whether it is in use, with
        its report. Raises Invalid for wrong files; the old version stays then.
        """
        ...

    def roll_back(self) -> dict[str, Any]:
        """Return to the version before. Raises Conflict when there is none."""
        ...
