"""A mixed load, the death of an engine in its middle, and what must be true of the metrics.

Streams, whole answers, repeated questions, adapters by name and by text, a replacement, gRPC,
clients that leave and bad requests, for three phases; in the second the engine is killed. Between
them nothing runs, so that what client and server counted can be compared. Used by
test_observed.py for a minute, and by bench/observe.py for longer.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.client import CHAT, TEXT
from tests.conftest import Server
from tests.deploy.scraping import Prometheus
from tests.e2e.adapted import ADAPTERS, ROUTED, prompts
from tests.e2e.test_caching import end_engine
from tests.protocol_parity import as_message, method

Series = tuple[str, frozenset[tuple[str, str]]]


@dataclass
class Snapshot:
    """One scrape: the value of each series, and which of them only ever go up."""

    values: dict[Series, float]
    rising: set[Series]

    @classmethod
    def of(cls, text: str) -> Snapshot:
        made = cls({}, set())
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                series = sample.name, frozenset(sample.labels.items())
                made.values[series] = sample.value
                if family.type in ("counter", "histogram") and not sample.name.endswith("_created"):
                    made.rising.add(series)
        return made

    def sum(self, name: str, **labels: str) -> float:
        """Over all series of that name with these labels."""
        wanted = labels.items()
        return sum(v for (n, has), v in self.values.items() if n == name and wanted <= has)


@dataclass
class Figures:
    """What a run has found. `problems` is empty when all is as it must be."""

    problems: list[str] = field(default_factory=list)
    requests: Counter[str] = field(default_factory=Counter)
    token_difference: list[float] = field(default_factory=list)
    series: int = 0
    scrapes: int = 0
    server_mib_per_minute: float = 0.0
    engine_mib_per_minute: float = 0.0
    scrape_s: dict[str, float] = field(default_factory=dict)


class Mix:
    """Clients of every kind; `done` counts how their requests ended."""

    def __init__(self, server: Server, rpc_address: str, http: httpx.AsyncClient) -> None:
        self._server, self._rpc_address, self._http = server, rpc_address, http
        self._numbers = itertools.count()
        self.done: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        """All at once, for so long; returns when the last request has ended."""
        until_s = time.monotonic() + seconds
        async with grpc.aio.insecure_channel(self._rpc_address) as channel:
            kinds: list[Callable[[], Awaitable[None]]] = [
                *(3 * [self._stream]),
                *(2 * [self._repeated]),
                *(2 * [self._by_text]),
                self._named,
                self._replace,
                self._leave,
                self._bad,
                lambda: self._rpc(channel),
            ]

            async def client(ask: Callable[[], Awaitable[None]]) -> None:
                while time.monotonic() < until_s:
                    try:
                        await ask()
                    except (httpx.HTTPError, grpc.RpcError):
                        self.done["lost"] += 1
                        await asyncio.sleep(0.2)

            await asyncio.gather(*map(client, kinds))

    def _body(self, text: str, **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        body = {"model": self._server.model, "messages": messages, "max_tokens": 48}
        return body | fields

    async def _whole(self, body: dict[str, Any]) -> None:
        response = await self._http.post(CHAT, json=body)
        self.done["ok" if response.status_code == 200 else "lost"] += 1

    async def _stream(self) -> None:
        number = next(self._numbers)
        text = f"Tell me about number {number}, and then about the one after it."
        body = self._body(text, stream=True, temperature=0.9)
        async with self._http.stream("POST", CHAT, json=body) as response:
            lines = [line async for line in response.aiter_lines() if line]
        if response.status_code == 200:
            self.done["streams"] += 1
        ended = response.status_code == 200 and not any('"error"' in line for line in lines)
        self.done["ok" if ended else "lost"] += 1

    async def _repeated(self) -> None:
        asked = prompts("general")[next(self._numbers) % 5]
        await self._whole(self._body(asked, temperature=0))

    async def _by_text(self) -> None:
        number = next(self._numbers)
        asked = prompts(ROUTED[number % 3])
        await self._whole(self._body(asked[number % len(asked)], model="auto", temperature=0))

    async def _named(self) -> None:
        name = ("clinic", "ledger", "code", "code-qlora")[next(self._numbers) % 4]
        await self._whole(self._body("What is it for?", model=name, temperature=0.5))

    async def _replace(self) -> None:
        version = ("clinic", "clinic-v2")[next(self._numbers) % 2]
        asked = {"name": "clinic", "path": str(ADAPTERS / version)}
        await self._http.post("/admin/adapters", json=asked)
        await asyncio.sleep(3)

    async def _leave(self) -> None:
        body = {"model": self._server.model, "prompt": f"Once {next(self._numbers)}"}
        more = {"max_tokens": 400, "ignore_eos": True, "stream": True, "temperature": 0.9}
        async with self._http.stream("POST", TEXT, json={**body, **more}) as response:
            await anext(response.aiter_bytes())
            if response.status_code == 200:
                self.done["left"] += 1
        await asyncio.sleep(1)

    async def _bad(self) -> None:
        response = await self._http.post(CHAT, json=self._body("?", temperature=-1))
        self.done["bad" if response.status_code == 400 else "lost"] += 1
        await asyncio.sleep(0.5)

    async def _rpc(self, channel: grpc.aio.Channel) -> None:
        body = self._body(f"Hello {next(self._numbers)}", stream=True, temperature=0.9)
        name, message = as_message(CHAT, body)
        async for _ in method(channel, name)(message, timeout=120):
            pass
        self.done["streams"] += 1
        self.done["ok"] += 1


async def run(server: Server, rpc_address: str, prometheus: Prometheus, phase_s: float) -> Figures:
    """Three phases of so many seconds; the engine dies in the middle of the second."""
    figures = Figures()
    begun_s = time.time()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:

        async def snapshot() -> Snapshot:
            """When nothing runs."""
            async with asyncio.timeout(120):
                while True:
                    found = Snapshot.of((await http.get("/metrics")).text)
                    if not found.sum("packhorse_requests_in_flight") and not found.sum(
                        "vllm:num_requests_running"
                    ):
                        return found
                    await asyncio.sleep(0.1)

        async def phase() -> tuple[Snapshot, Counter[str]]:
            mix = Mix(server, rpc_address, http)
            await mix.run(phase_s)
            figures.requests += mix.done
            return await snapshot(), mix.done

        before = await snapshot()
        calm, done = await phase()
        _compare("before the death", before, calm, done, figures)
        asyncio.get_running_loop().call_later(phase_s / 2, end_engine, server)
        after_death, died = await phase()
        if not died["ok"]:
            figures.problems.append("nothing was answered in the phase of the death")
        again, done = await phase()
        _compare("after the death", after_death, again, done, figures)
        new = again.values.keys() - calm.values.keys()
        gone = calm.values.keys() - again.values.keys()
        figures.series = len(again.values)
        figures.problems += [f"{s} is gone" for s in gone]
        figures.problems += [f"{s} is new" for s in new]
        figures.problems += [
            f"{series} went from {value:g} to {again.values[series]:g}"
            for series, value in before.values.items()
            if series in before.rising and again.values.get(series, value) < value
        ]
    _look_at_scrapes(prometheus, begun_s, figures)
    return figures


def _compare(
    when: str, first: Snapshot, last: Snapshot, done: Counter[str], figures: Figures
) -> None:
    """What the client, the server and the engine counted in a phase without a fault."""

    def grown(name: str, **labels: str) -> float:
        return last.sum(name, **labels) - first.sum(name, **labels)

    equal = {
        "answered": (grown("packhorse_requests_total", outcome="ok"), done["ok"]),
        "left": (grown("packhorse_requests_total", outcome="cancelled"), done["left"]),
        "refused": (grown("packhorse_requests_total", outcome="invalid"), done["bad"]),
        "request_seconds": (grown("packhorse_request_seconds_count"), done["ok"] + done["left"]),
        "first_token_seconds": (
            grown("packhorse_time_to_first_token_seconds_count"),
            done["streams"] + done["left"],
        ),
        "in the engine": (
            grown("packhorse_frontend_seconds_count"),
            grown("vllm:e2e_request_latency_seconds_count") + done["left"],
        ),
        "lost": (0, done["lost"]),
    }
    for what, (ours, theirs) in equal.items():
        if ours != theirs:
            figures.problems.append(f"{when}, {what}: {ours:g} counted, {theirs:g} seen")
    for ours, theirs in [("prompt", "prompt"), ("completion", "generation")]:
        counted = grown("packhorse_tokens_total", direction=ours)
        engine = grown(f"vllm:{theirs}_tokens_total")
        difference = abs(counted - engine) / engine
        figures.token_difference.append(round(difference, 5))
        if difference > 0.01:
            figures.problems.append(f"{when}: {counted:g} {ours} tokens, the engine {engine:g}")


def _look_at_scrapes(prometheus: Prometheus, begun_s: float, figures: Figures) -> None:
    """What Prometheus has of it: all scrapes good, no counter backwards, memory, time."""
    window = f"[{int(time.time() - begun_s) + 1}s]"
    found = prometheus.ask("query", query='{job="packhorse"}' + window)["result"]
    resident: dict[str, list[tuple[float, float]]] = {}
    for series in found:
        labels, values = series["metric"], [(t, float(v)) for t, v in series["values"]]
        name = labels["__name__"]
        if name == "up":
            figures.scrapes = len(values)
            if not all(value == 1 for _, value in values):
                figures.problems.append("a scrape has failed")
        if name == "scrape_duration_seconds":
            ordered = sorted(value for _, value in values)
            figures.scrape_s = {
                "p50": round(ordered[len(ordered) // 2], 4),
                "max": round(ordered[-1], 4),
            }
        if name == "packhorse_process_resident_bytes":
            resident[labels["process"]] = values
        if name.endswith(("_total", "_count", "_bucket", "_sum")):
            rises = all(a[1] <= b[1] for a, b in itertools.pairwise(values))
            if not rises:
                figures.problems.append(f"{labels} went backwards")
    figures.server_mib_per_minute = _slope(resident["server"])
    figures.engine_mib_per_minute = _slope(resident["engine"])


def _slope(values: list[tuple[float, float]]) -> float:
    """MiB a minute, by least squares."""
    mean_t = sum(t for t, _ in values) / len(values)
    mean_v = sum(v for _, v in values) / len(values)
    spread = sum((t - mean_t) ** 2 for t, _ in values)
    slope = sum((t - mean_t) * (v - mean_v) for t, v in values) / spread
    return round(slope * 60 / 2**20, 3)


def rpc_address_of(server: Server) -> str:
    line = next(line for line in server.log().splitlines() if "gRPC at " in line)
    return line.partition("gRPC at ")[2]
