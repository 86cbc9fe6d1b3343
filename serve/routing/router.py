"""The routing of a server: built at the start, and again when the routes file or an adapter's
examples change; a new version is used from the next request on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from packhorse.serve.errors import Conflict, Invalid, ServeError, Unavailable
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.routing.base import Decision
from packhorse.serve.routing.config import Routes, read_routes
from packhorse.serve.routing.examples import read_examples
from packhorse.serve.routing.rollout import MIN_EXAMPLES, Rollout, RoutesVersion, build
from packhorse.serve.routing.train import Train
from packhorse.serve.routing.train_process import train

logger = logging.getLogger("packhorse.routing")

LOOK_EVERY_S = 1.0
EXAMPLES = "examples.jsonl"

Signature = tuple[tuple[str, int, int], ...]


class Router:
    """Satisfies the Routing protocol. Call `start` once the registry has its adapters."""

    def __init__(
        self,
        file: Path | None,
        adapters: Callable[[], Mapping[str, Path]],
        available: Container[str],
        *,
        known: Callable[[], Iterable[str]] = tuple,
        takes_base_name: bool = False,
        train: Train = train,
        metrics: ModelMetrics | None = None,
    ) -> None:
        """`file` is the routes file; without one, the learned stage has its defaults. `adapters`
        returns the adapters that requests can name now, with the folders of their versions;
        `available` holds the same names, and is asked at every request. `known` returns all
        registered adapters: routes may name those too that cannot answer now. `train` trains the
        learned table.
        """
        self._metrics = metrics or ModelMetrics()
        self._train = train
        self.takes_base_name = takes_base_name
        self._file = file
        self._adapters = adapters
        self._available = available
        self._known = known
        self._rollout: Rollout | None = None
        self._seen: Signature = ()
        self._none: Path | None = None  # none_examples, as last read
        self._building = asyncio.Lock()
        self._asked = asyncio.Event()

    async def start(self) -> None:
        """Build the first version; without a learned stage if its training fails. Rules may name
        adapters that are not registered yet. Raises Invalid for a wrong routes file.
        """
        try:
            first = await self._build(1, first=True)
        except ServeError as error:
            logger.error("The learned stage is off: %s", error.message)
            first = await self._build(1, first=True, learned=False)
        self._rollout = Rollout(first)
        self._announce(self._rollout.current)

    def reload_soon(self) -> None:
        """Make `watch` reload, whether files have changed or not."""
        self._asked.set()

    async def watch(self) -> None:
        """For ever: reload when asked, or when files have changed and then were the same in two
        polls.
        """
        before = self._seen
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._asked.wait()
            try:
                is_asked = self._asked.is_set()
                self._asked.clear()
                now = await asyncio.to_thread(self._signature, dict(self._adapters()))
                if is_asked or (now == before and now != self._seen):
                    await self.reload()
                before = now
            except ServeError as error:
                logger.error("The routes stay as they were: %s", error.message)
            except Exception:  # the next poll may succeed
                logger.exception("The routes stay as they were")

    def _signature(self, adapters: Mapping[str, Path]) -> Signature:
        """Differs when files have changed. Runs in a thread, so it gets a copy of the adapters."""
        files = [folder / EXAMPLES for folder in adapters.values()]
        files += [file for file in (self._file, self._none) if file is not None]
        found = [(f"adapter {name}", 0, 0) for name in adapters]
        for file in files:
            try:
                facts = file.stat()
            except OSError:
                continue
            found.append((str(file), facts.st_mtime_ns, facts.st_size))
        return tuple(sorted(found))

    async def _build(
        self, number: int, *, learned: bool = True, first: bool = False
    ) -> RoutesVersion:
        known, adapters = list(self._known()), dict(self._adapters())
        routes, examples, none = await asyncio.to_thread(self._read, known, adapters)
        if first:
            for name in set(routes.adapters) - examples.keys():
                logger.warning("The routes name the adapter %s, which is not here yet", name)
                examples[name] = []
        if not learned:
            off = routes.learned.model_copy(update={"enabled": False})
            routes = routes.model_copy(update={"learned": off})
        return await build(routes, examples, none, number=number, train=self._train)

    def _read(
        self, known: Iterable[str], adapters: Mapping[str, Path]
    ) -> tuple[Routes, dict[str, list[str]], list[str]]:
        """Read the files. The next polls compare with their state at this moment."""
        self._seen = self._signature(adapters)
        routes = read_routes(self._file) if self._file is not None else Routes()
        none = routes.learned.none_examples
        self._none = Path(none) if none else None
        self._seen = self._signature(adapters)
        examples: dict[str, list[str]] = {name: [] for name in known}
        for name, folder in adapters.items():
            examples[name] = _examples(name, folder / EXAMPLES)
        return routes, examples, read_examples(self._none) if self._none else []

    @property
    def _built(self) -> Rollout:
        if self._rollout is None:
            raise Unavailable("The routes are still being built; try again soon.")
        return self._rollout

    def decide(
        self, messages: Sequence[Mapping[str, Any]], *, may_use: Callable[[str], bool]
    ) -> Decision:
        with self._metrics.route_seconds.time():
            cascade = self._built.current.cascade
            return cascade.decide(messages, may_use=may_use, available=self._available)

    def versions(self) -> list[dict[str, Any]]:
        return [_document(each) for each in (self._built.current, *self._built.history)]

    async def reload(self) -> dict[str, Any]:
        async with self._building:
            rollout = self._built
            new = await self._build(rollout.next_number())
            considered = rollout.consider(new)
            if considered.accepted:
                self._announce(new)
            else:
                self._metrics.route_refusals.inc()
                logger.error("The new routes are refused: %s", " ".join(considered.reasons))
        return {
            "accepted": considered.accepted,
            "reasons": list(considered.reasons),
            "generation": _document(new),
        }

    def roll_back(self) -> dict[str, Any]:
        if self._building.locked():
            raise Conflict("Routes are being built; wait for them, or try again.")
        version = self._built.roll_back()
        self._announce(version)
        return _document(version)

    def _announce(self, version: RoutesVersion) -> None:
        """Log a version that is in use now, and export its number."""
        self._metrics.route_generation.set(version.number)
        for note in version.report.notes:
            logger.warning("Routes: %s", note)
        test = version.report.self_test
        if test is None:
            logger.info("Routes %d are in use, without a learned stage", version.number)
        else:
            logger.info(
                "Routes %d are in use: of held-out examples %.1f%% go right, %.1f%% wrong",
                version.number, 100 * test.right, 100 * test.wrong,
            )  # fmt: skip


def _examples(name: str, file: Path) -> list[str]:
    """An adapter's examples; empty when they are invalid or too few, so that one adapter cannot
    stop the routing of the others.
    """
    if not file.exists():
        return []
    try:
        found = read_examples(file)
    except Invalid as error:
        logger.error("adapter=%s has examples that are not used: %s", name, error.message)
        return []
    if 0 < len(found) < MIN_EXAMPLES:
        logger.warning(
            "adapter=%s has %d examples, which are not used: it takes %d",
            name, len(found), MIN_EXAMPLES,
        )  # fmt: skip
        return []
    return found


def _document(version: RoutesVersion) -> dict[str, Any]:
    return {
        "number": version.number,
        "created": int(version.created_s),
        "rules": [rule.name for rule in version.routes.rules],
        "report": msgspec.to_builtins(version.report),
    }
