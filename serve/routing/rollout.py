"""Safe changes of the routing: a new version is built and tested, then used or refused.

The router has one Rollout. A request reads `current` once and decides with it, so it never sees
half a change. Versions live in memory only: a restart builds the routing again, with a trained
table from `table_cache` if it has one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from packhorse.serve.errors import Conflict, Invalid
from packhorse.serve.routing.cascade import Cascade
from packhorse.serve.routing.config import Routes
from packhorse.serve.routing.cross_validation import NONE, SelfTest
from packhorse.serve.routing.examples import duplicates
from packhorse.serve.routing.learned import Table
from packhorse.serve.routing.rules import Rules
from packhorse.serve.routing.train import Job, Train
from packhorse.serve.routing.train_process import train

MIN_EXAMPLES = 10
MAX_EXAMPLES = 50_000
HISTORY = 5
# The number of duplicates in a report.
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of a version before it is used.

    `self_test` is None without a learned table; `notes` say why, and which adapters have no
    examples. `duplicates` are prompts that several adapters have (20 of `num_duplicates`).
    """

    self_test: SelfTest | None
    duplicates: tuple[tuple[str, tuple[str, ...]], ...] = ()
    num_duplicates: int = 0
    notes: tuple[str, ...] = ()
    train_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RoutesVersion:
    """Rules and a learned table that are used together. `created_s` is Unix time."""

    number: int
    routes: Routes
    report: Report
    created_s: float
    cascade: Cascade = field(repr=False)

    def without_table(self, why: Sequence[str]) -> RoutesVersion:
        """This version with rules and default only, and the reasons in its notes."""
        notes = (*self.report.notes, *why, "The learned stage is off.")
        report = replace(self.report, notes=notes)
        return replace(self, report=report, cascade=Cascade(self.routes, None, self.cascade.rules))


async def build(
    routes: Routes,
    examples: Mapping[str, Sequence[str]],
    none_examples: Sequence[str],
    *,
    number: int,
    train: Train = train,
    clock: Callable[[], float] = time.time,
) -> RoutesVersion:
    """Validate, train and test. `examples` has a list for every adapter; an adapter whose list is
    empty is reached by rules and by its name only.

    Raises Invalid for routes that name an unknown adapter, for an expression that `rules` refuses,
    and for too few or too many examples; and what `train` raises.
    """
    unknown = [name for name in routes.adapters if name not in examples]
    if unknown:
        known = ", ".join(sorted(examples)) or "none"
        raise Invalid(
            f"The routes name the adapter {unknown[0]!r}, which does not exist; there are: {known}."
            " Add the adapter first, or correct the name."
        )
    # In threads: these steps would block the event loop for too long.
    rules = await asyncio.to_thread(Rules, routes)
    with_examples = {name: list(prompts) for name, prompts in examples.items() if prompts}
    notes = [
        f"{name!r} has no examples: only rules and its name lead to it."
        for name in examples
        if name not in with_examples
    ]
    if not none_examples and with_examples:
        notes.append(
            "There are no none_examples: what the base should answer itself is known only as what "
            "is unlike every adapter's examples."
        )
    twice = await asyncio.to_thread(
        duplicates, {**with_examples, NONE + " (the base)": list(none_examples)}
    )
    report = Report(
        self_test=None,
        duplicates=tuple((text, tuple(names)) for text, names in twice[:SHOWN]),
        num_duplicates=len(twice),
        notes=tuple(notes),
    )
    table = None
    why_not = _why_no_table(routes, with_examples, none_examples)
    if why_not is not None:
        report = replace(report, notes=(*notes, why_not))
    else:
        started_s = time.monotonic()
        job = Job(with_examples, list(none_examples), routes.learned.wrong_route_rate)
        trained = await train(job)
        table = await asyncio.to_thread(Table, trained.table)
        report = replace(report, self_test=trained.self_test, train_s=time.monotonic() - started_s)
    return RoutesVersion(number, routes, report, clock(), Cascade(routes, table, rules))


def _why_no_table(
    routes: Routes, examples: Mapping[str, Sequence[str]], none_examples: Sequence[str]
) -> str | None:
    """A note when no table is to be trained. Raises Invalid for a table that cannot be trained."""
    if not routes.learned.enabled:
        return "The learned stage is switched off (learned.enabled)."
    if not examples:
        return "The learned stage is off: no adapter has examples."
    if len(examples) == 1 and not none_examples:
        return "The learned stage is off: it needs two adapters with examples, or none_examples."
    named = {**examples, "none_examples": none_examples} if none_examples else examples
    for name, prompts in named.items():
        if len(prompts) < MIN_EXAMPLES:
            raise Invalid(
                f"{name!r} has {len(prompts)} examples, below the minimum of {MIN_EXAMPLES}; add "
                "some (hundreds are good), or remove them all to route by rules only."
            )
    total = sum(map(len, named.values()))
    if total > MAX_EXAMPLES:
        raise Invalid(
            f"{total} examples in all are above the limit of {MAX_EXAMPLES}; a few hundred for "
            "each adapter are enough."
        )
    return None


def shortcomings(new: RoutesVersion, current: RoutesVersion | None) -> list[str]:
    """Reasons not to use a version: its self-test compared with the limits of its routes and
    with the version in use. Empty: use it.
    """
    test, accept = new.report.self_test, new.routes.learned.accept
    if test is None:
        return []
    found = []
    if test.right < accept.min_right:
        found.append(
            f"Of held-out examples {test.right:.1%} reach their adapter, below min_right="
            f"{accept.min_right:.1%}."
        )
    sent = [("of adapters' held-out examples", test.wrong), ("of none's", test.none_sent)]
    found += [
        f"{share:.1%} {whose} go to a wrong adapter, above max_wrong={accept.max_wrong:.1%}."
        for whose, share in sent
        if share is not None and share > accept.max_wrong
    ]
    old = current.report.self_test if current is not None else None
    if old is None:
        return found
    for name, before in old.adapters.items():
        after = test.adapters.get(name)
        if after is not None and after.right < before.right - accept.tolerance:
            found.append(
                f"{name!r} gets {after.right:.1%} of its held-out examples and had "
                f"{before.right:.1%}; the tolerance is {accept.tolerance:.1%}."
            )
    if test.wrong > old.wrong + accept.tolerance:
        found.append(
            f"{test.wrong:.1%} go to a wrong adapter, and {old.wrong:.1%} did; the tolerance is "
            f"{accept.tolerance:.1%}."
        )
    return found


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """Whether a version is now in use, and the reasons if not."""

    accepted: bool
    reasons: tuple[str, ...]
    report: Report


class Rollout:
    """The version in use and the earlier ones. For one event loop: no method awaits."""

    def __init__(self, first: RoutesVersion) -> None:
        """A first version that fails its self-test is used without its learned table."""
        reasons = shortcomings(first, None)
        self._current = first.without_table(reasons) if reasons else first
        self._history: list[RoutesVersion] = []
        self._last_number = first.number

    @property
    def current(self) -> RoutesVersion:
        return self._current

    @property
    def history(self) -> tuple[RoutesVersion, ...]:
        """Earlier versions that `roll_back` can return to, newest first; at most 5."""
        return tuple(reversed(self._history))

    def next_number(self) -> int:
        """A new number for `build`."""
        self._last_number += 1
        return self._last_number

    def consider(self, new: RoutesVersion) -> RolloutResult:
        """Use it from the next request on, unless its self-test fails or a newer one is in use."""
        if new.number <= self._current.number:
            reasons = [f"Generation {self._current.number} is in use, which is younger."]
        else:
            reasons = shortcomings(new, self._current)
        if not reasons:
            self._history = [*self._history, self._current][-HISTORY:]
            self._current = new
        return RolloutResult(not reasons, tuple(reasons), new.report)

    def roll_back(self) -> RoutesVersion:
        """Return to the version before; forgets the one in use. Raises Conflict without one."""
        if not self._history:
            raise Conflict("There is no earlier routing to return to.")
        self._current = self._history.pop()
        return self._current
