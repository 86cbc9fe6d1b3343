"""The routing of a server: built when it starts, built again when the routes file or an adapter's
examples change, in use from one request to the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from packhorse.serve import metrics
from packhorse.serve.errors import Conflict, Invalid, ServeError, Unavailable
from packhorse.serve.routing.base import Decision
from packhorse.serve.routing.config import Routes, read_routes
from packhorse.serve.routing.examples import read_examples
from packhorse.serve.routing.rollout import MIN_EXAMPLES, Generation, Generations, build
from packhorse.serve.routing.train import Train
from packhorse.serve.routing.train_process import train

logger = logging.getLogger("packhorse.routing")

LOOK_EVERY_S = 1.0
EXAMPLES = "examples.jsonl"

Signature = tuple[tuple[str, int, int], ...]


class Router:
    """Satisfies the Routing protocol. `start` it when there are adapters."""

    def __init__(
        self,
        file: Path | None,
        adapters: Callable[[], Mapping[str, Path]],
        resident: Container[str],
        *,
        known: Callable[[], Iterable[str]] = tuple,
        takes_base_name: bool = False,
        train: Train = train,
    ) -> None:
        """`file` holds the routes; without one, the learned stage has its defaults. `adapters` are
        the names that can be asked for now, with the folders of their versions, and `resident` the
        same names, asked at every request; `known` are those that routes may name besides, though
        nothing goes there now. `train` makes the learned table.
        """
        self._train = train
        self.takes_base_name = takes_base_name
        self._file = file
        self._adapters = adapters
        self._resident = resident
        self._known = known
        self._generations: Generations | None = None
        self._seen: Signature = ()
        self._none: Path | None = None  # the file of examples for the base, as last read
        self._building = asyncio.Lock()
        self._asked = asyncio.Event()

    async def start(self) -> None:
        """Build the first routing; without a learned stage when that cannot be trained. Rules for
        adapters that nobody has yet wait for them. Raises Invalid for a file that is wrong.
        """
        try:
            first = await self._build(1, first=True)
        except ServeError as error:
            logger.error("The learned stage is off: %s", error.message)
            first = await self._build(1, first=True, learned=False)
        self._generations = Generations(first)
        _tell(self._generations.current)

    def reload_soon(self) -> None:
        """Have `watch` reload, whether files have changed or not."""
        self._asked.set()

    async def watch(self) -> None:
        """Reload when asked, or when files have changed and then stayed the same for a look; for
        ever.
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
            except Exception:  # the next look may do better
                logger.exception("The routes stay as they were")

    def _signature(self, adapters: Mapping[str, Path]) -> Signature:
        """What tells that files are others now. In a thread, hence a copy of the adapters."""
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

    async def _build(self, number: int, *, learned: bool = True, first: bool = False) -> Generation:
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
        """The files as they are, which is what they are compared with from now on."""
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
    def _built(self) -> Generations:
        if self._generations is None:
            raise Unavailable("The routes are still being built; try again soon.")
        return self._generations

    def decide(
        self, messages: Sequence[Mapping[str, Any]], *, may_use: Callable[[str], bool]
    ) -> Decision:
        with metrics.ROUTE_SECONDS.time():
            cascade = self._built.current.cascade
            return cascade.decide(messages, may_use=may_use, resident=self._resident)

    def generations(self) -> list[dict[str, Any]]:
        return [_document(each) for each in (self._built.current, *self._built.history)]

    async def reload(self) -> dict[str, Any]:
        async with self._building:
            generations = self._built
            new = await self._build(generations.next_number())
            considered = generations.consider(new)
            if considered.accepted:
                _tell(new)
            else:
                metrics.ROUTE_REFUSALS.inc()
                logger.error("The new routes are refused: %s", " ".join(considered.reasons))
        return {
            "accepted": considered.accepted,
            "reasons": list(considered.reasons),
            "generation": _document(new),
        }

    def roll_back(self) -> dict[str, Any]:
        if self._building.locked():
            raise Conflict("Routes are being built; wait for them, or try again.")
        generation = self._built.roll_back()
        _tell(generation)
        return _document(generation)


def _examples(name: str, file: Path) -> list[str]:
    """None, where they are bad or too few: one adapter must not spoil the routes of the others."""
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


def _tell(generation: Generation) -> None:
    metrics.ROUTE_GENERATION.set(generation.number)
    for note in generation.report.notes:
        logger.warning("Routes: %s", note)
    test = generation.report.self_test
    if test is None:
        logger.info("Routes %d are in use, without a learned stage", generation.number)
    else:
        logger.info(
            "Routes %d are in use: of held-out examples %.1f%% go right, %.1f%% wrong",
            generation.number, 100 * test.right, 100 * test.wrong,
        )  # fmt: skip


def _document(generation: Generation) -> dict[str, Any]:
    return {
        "number": generation.number,
        "created": int(generation.created_s),
        "rules": [rule.name for rule in generation.routes.rules],
        "report": msgspec.to_builtins(generation.report),
    }
