"""The real engine is killed, stopped and poisoned under load: what is lost, and how it comes back.

One server whose engine, a single process as is usual on a CPU, dies again and again. Another, whose
worker is a process of its own as on several GPUs, loses that once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from packhorse.serve.access.keys import entry_of
from tests.client import (
    TEXT,
    address_of,
    children,
    fuzzed_requests,
    is_there,
    metric,
    send_raw,
    wait_for,
)
from tests.conftest import DEMO, ROOT, Server, running_server
from tests.e2e.faulty_worker import POISON, SLOW, SLOW_S

TOKENS = 60
STREAMED_TOKENS = 400  # so many that no stream ends before the fault, on a fast machine either
READY_S = 180  # a bound for busy machines; how fast it is stands in bench/results
KEYS = {
    "test": {"scopes": ["inference", "admin", "metrics"]},
    "scraper": {"scopes": ["metrics"]},
    "leaver": {},
    "spender": {"quotas": {"tokens_per_minute": 600}},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with faulty_server(tmp_path_factory.mktemp("faults")) as server:
        yield server


@contextlib.contextmanager
def faulty_server(folder: Path, **engine: Any) -> Iterator[Server]:
    arguments = [str(DEMO / "model"), "--config", str(config(folder, engine))]
    # For the worker class.
    with running_server(folder, *arguments, environment={"PYTHONPATH": str(ROOT)}) as server:
        yield server


def config(folder: Path, engine: dict[str, Any]) -> Path:
    path = folder / "serve.yaml"
    faulty = {"worker_cls": "tests.e2e.faulty_worker.FaultyWorker", "stall_timeout_s": 5}
    path.write_text(
        f"engine: {json.dumps({**faulty, **engine})}\n"
        "supervisor: {max_restarts: 100, backoff_s: 0}\n"
        "service: {drain_timeout_s: 60}\n"
        "admission: {max_in_engine: 40}\n"
        f"auth: {{keys_file: {folder / 'keys.yaml'}}}\n"
    )
    write_keys(folder, KEYS)
    return path


def write_keys(folder: Path, keys: dict[str, dict[str, Any]]) -> None:
    text = "".join(entry_of(key_of(name), name=name, **fields) for name, fields in keys.items())
    (folder / "new.yaml").write_text(text)
    (folder / "new.yaml").replace(folder / "keys.yaml")


def key_of(name: str) -> str:
    return f"key-of-{name}-for-tests"


def headers(name: str = "test") -> dict[str, str]:
    return {"authorization": f"Bearer {key_of(name)}"}


@pytest.fixture(autouse=True)
def _is_ready(request: pytest.FixtureRequest) -> None:
    """What a test has left behind must not fail those after it."""
    if "server" not in request.fixturenames:
        return
    server: Server = request.getfixturevalue("server")
    with httpx.Client(base_url=server.url) as http:
        wait_for(lambda: http.get("/health/ready").status_code == 200)


def client(server: Server) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, headers=headers())


@dataclass
class Load:
    """What 32 clients at once got: half of them stream."""

    whole: list[httpx.Response] = field(default_factory=list)
    streams: list[list[Any]] = field(default_factory=list)
    live_s: list[float] = field(default_factory=list)
    """How long the liveness probe took, ten times a second."""

    def check_nothing_is_lost(self) -> None:
        """Whole answers are whole; streams are, or end with an error event."""
        for response in self.whole:
            assert response.status_code == 200, response.text
            assert response.json()["usage"]["completion_tokens"] == TOKENS
        for events in self.streams:
            assert events, "no event at all"
            if "error" in events[-1]:
                assert events[-1]["error"]["kind"] == "unavailable", events[-1]
            else:
                assert events[-1]["choices"][0]["finish_reason"] == "length"


def body(server: Server, **fields: Any) -> dict[str, Any]:
    asked = {"model": server.model, "prompt": "The", "max_tokens": TOKENS, "ignore_eos": True}
    return {**asked, **fields}


@contextlib.asynccontextmanager
async def load(server: Server, clients: int = 32) -> AsyncIterator[Load]:
    """Answered when the context ends; all are with the server when it begins."""
    found = Load()
    async with client(server) as http:

        async def whole() -> None:
            found.whole.append(await http.post(TEXT, json=body(server)))

        async def stream() -> None:
            asked = body(server, stream=True, max_tokens=STREAMED_TOKENS)
            async with http.stream("POST", TEXT, json=asked) as response:
                assert response.status_code == 200
                found.streams.append(events := [])
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        events.append(json.loads(line.removeprefix("data: ")))

        async def probe() -> None:
            async with httpx.AsyncClient(base_url=server.url) as other:
                while True:
                    started_s = time.perf_counter()
                    assert (await other.get("/health/live")).status_code == 200
                    found.live_s.append(time.perf_counter() - started_s)
                    await asyncio.sleep(0.1)

        probing = asyncio.create_task(probe())
        tasks = [asyncio.create_task(step()) for step in (whole, stream) * (clients // 2)]
        try:
            async with asyncio.timeout(READY_S):
                while sum(map(bool, found.streams)) < clients // 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            yield found
            await asyncio.gather(*tasks)
            assert not probing.done(), "liveness has failed"
        finally:
            for task in (probing, *tasks):
                task.cancel()
            await asyncio.gather(probing, *tasks, return_exceptions=True)


async def until_ready_again(server: Server) -> None:
    """Wait for the loss to be noticed, and for the new engine."""
    async with httpx.AsyncClient(base_url=server.url) as http:
        for status in (503, 200):
            started_s = time.monotonic()
            while (await http.get("/health/ready")).status_code != status:
                assert time.monotonic() - started_s < READY_S
                await asyncio.sleep(0.05)


def engine_processes(server: Server) -> dict[str, psutil.Process]:
    found = {}
    for process in children(server.process.pid):
        for name in ("EngineCore", "Worker"):
            if f"VLLM::{name}" in " ".join(process.cmdline()):
                found[name] = process
    return found


async def value_of(http: httpx.AsyncClient, name: str) -> float:
    """Of all series that begin like this."""
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


async def until(http: httpx.AsyncClient, name: str, holds: Callable[[float], bool]) -> None:
    async with asyncio.timeout(READY_S):
        while not holds(await value_of(http, name)):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def count(server: Server, name: str) -> float:
    with httpx.Client(base_url=server.url, headers=headers()) as http:
        return metric(http, name)


@pytest.mark.parametrize(("fault", "reason"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "hung")])
async def test_an_engine_that_is_lost_loses_nothing_else(
    server: Server, fault: signal.Signals, reason: str
) -> None:
    await lose(server, "EngineCore", fault, reason)


async def test_a_worker_process_that_is_lost_loses_nothing_else(tmp_path: Path) -> None:
    """Nor does a server that is killed leave one behind, though it is stopped."""
    with faulty_server(tmp_path, distributed_executor_backend="mp") as server:
        assert engine_processes(server).keys() == {"EngineCore", "Worker"}
        await lose(server, "Worker", signal.SIGKILL, "died")
        leaves_nothing_when_killed(server, engine_processes(server)["Worker"])


async def lose(server: Server, victim: str, fault: signal.Signals, reason: str) -> None:
    failures = f'packhorse_engine_failures_total{{reason="{reason}"}}'
    before = engine_processes(server)
    lost = count(server, failures)
    async with load(server) as found:
        before[victim].send_signal(fault)
        await until_ready_again(server)
    found.check_nothing_is_lost()
    assert any("error" in events[-1] for events in found.streams), "they had begun"
    assert count(server, failures) == lost + 1
    wait_for(lambda: not any(map(is_there, before.values())))
    # A probe gives up after a second; how fast it is stands in bench/.
    assert statistics.median(found.live_s) < 1


async def test_poison_is_found_and_hurts_nobody_else(server: Server) -> None:
    """Nor does it when it comes again, with another seed, length or form of answer."""
    lost = count(server, 'packhorse_engine_failures_total{reason="died"}')
    asked = body(server, prompt=[*POISON, 5])
    async with client(server) as http:
        async with load(server) as found:
            refused = await http.post(TEXT, json=asked)
        assert refused.status_code == 400, refused.text
        assert "Two engines have stopped" in refused.json()["error"]["message"]
        found.check_nothing_is_lost()
        for change in ({}, {"seed": 7}, {"max_tokens": 3}, {"temperature": 0.5}, {"stream": True}):
            again = await http.post(TEXT, json={**asked, **change})
            assert again.status_code == 400, again.text
        assert await value_of(http, "packhorse_requests_poison_refused_total") == 5
    assert count(server, 'packhorse_engine_failures_total{reason="died"}') <= lost + 2


async def test_a_long_step_is_no_hang(server: Server) -> None:
    """With a limit of 5 s for an engine that does nothing."""
    before = engine_processes(server)
    async with client(server) as http:
        started_s = time.monotonic()
        answer = await http.post(TEXT, json=body(server, prompt=[*SLOW, 5], max_tokens=3))
        assert answer.status_code == 200, answer.text
        assert time.monotonic() - started_s > SLOW_S
    assert engine_processes(server) == before


def test_the_engines_own_metrics_outlive_it(server: Server) -> None:
    text = httpx.get(server.url + "/metrics", headers=headers()).text
    generated = next(
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("vllm:generation_tokens_total{")
    )
    assert generated > 32 * TOKENS, "more than one load's, though each lost its engine"
    assert 'packhorse_requests_waiting_for_engine{model="model"} 0.0' in text


async def test_wrong_keys_and_scopes_are_refused(server: Server) -> None:
    async with client(server) as http:
        for given, status in (
            ({}, 401), ({"authorization": "Bearer wrong"}, 401), (headers("scraper"), 403),
            (headers("leaver"), 200),
        ):  # fmt: skip
            http.headers.pop("authorization", None)
            answer = await http.post(TEXT, json=body(server, max_tokens=1), headers=given)
            assert answer.status_code == status, answer.text
        assert (await http.get("/metrics", headers=headers("leaver"))).status_code == 403
        assert (await http.get("/metrics", headers=headers("scraper"))).status_code == 200


async def test_a_key_that_is_revoked_while_it_streams(server: Server) -> None:
    asked = body(server, stream=True, max_tokens=300)
    async with (
        client(server) as http,
        http.stream("POST", TEXT, json=asked, headers=headers("leaver")) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        write_keys(server.log_path.parent, {n: f for n, f in KEYS.items() if n != "leaver"})
        asked = body(server, max_tokens=1)
        async with asyncio.timeout(READY_S):  # the file is looked at once a second
            refused = await http.post(TEXT, json=asked, headers=headers("leaver"))
            while refused.status_code != 401:
                await asyncio.sleep(0.1)
                refused = await http.post(TEXT, json=asked, headers=headers("leaver"))
        assert [line async for line in lines if line][-1] == "data: [DONE]"


async def test_a_quota_that_is_spent_says_how_long_to_wait(server: Server) -> None:
    async with client(server) as http:
        asked = body(server, max_tokens=590)
        assert (await http.post(TEXT, json=asked, headers=headers("spender"))).status_code == 200
        refused = await http.post(TEXT, json=asked, headers=headers("spender"))
    assert refused.status_code == 429
    # Of 600 at 10 a second 590 are used; the next answer is expected to have some 300.
    assert 1 <= int(refused.headers["retry-after"]) <= 35


async def test_ten_times_too_much_is_refused_and_the_rest_answered(server: Server) -> None:
    async with client(server) as http:
        answers = await asyncio.gather(*(http.post(TEXT, json=body(server)) for _ in range(400)))
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.keys() == {200, 429}
    assert statuses[200] >= 40
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
    assert all(
        answer.json()["usage"]["completion_tokens"] == TOKENS
        for answer in answers
        if answer.status_code == 200
    )


async def test_clients_that_leave_free_the_engine(server: Server) -> None:
    """Before the first byte, in the middle of a stream, and between two requests."""
    made = "vllm:generation_tokens_total{"
    async with client(server) as http:
        before = await value_of(http, made)
        connections = [socket.create_connection(address_of(server)) for _ in range(32)]
        for number, connection in enumerate(connections):
            if number % 3 < 2:
                asked = body(server, max_tokens=2000, stream=number % 3 == 1)
                send_raw(connection, TEXT, asked, headers())
        await until(http, "vllm:num_requests_running{", lambda value: value >= 22)
        for connection in connections[1::3]:
            assert b"200 OK" in connection.recv(4096)
        for connection in connections:
            connection.close()
        await until(http, "vllm:num_requests_running{", lambda value: value == 0)
        await until(http, "packhorse_requests_in_flight ", lambda value: value == 0)
        assert await value_of(http, made) < before + 22 * 1000, "not even half of what they asked"


async def test_malformed_requests_beside_good_ones(server: Server) -> None:
    """2,000, a quarter of them while good ones run."""
    gate = asyncio.Semaphore(20)
    statuses: Counter[int] = Counter()
    async with client(server) as http:

        async def send(path: str, content: bytes) -> None:
            async with gate:
                answer = await http.post(path, content=content)
            assert answer.status_code < 500, (path, content, answer.text)
            statuses[answer.status_code] += 1

        bad = list(fuzzed_requests(server.model, 1999, seed=2))
        await asyncio.gather(*(send(*request) for request in bad[:1500]))
        good = [http.post(TEXT, json=body(server)) for _ in range(16)]
        answers, _ = await asyncio.gather(
            asyncio.gather(*good), asyncio.gather(*(send(*request) for request in bad[1500:]))
        )
    assert statuses.total() == 2000
    assert statuses[400] > 800
    assert [answer.status_code for answer in answers] == [200] * 16
    assert all(answer.json()["usage"]["completion_tokens"] == TOKENS for answer in answers)


def test_a_server_that_is_killed_leaves_no_engine(server: Server) -> None:
    """Not one that is stopped, either. The last of this server."""
    leaves_nothing_when_killed(server, engine_processes(server)["EngineCore"])


def leaves_nothing_when_killed(server: Server, stopped: psutil.Process) -> None:
    seen = children(server.process.pid)
    stopped.suspend()
    server.process.kill()
    server.process.wait(10)
    wait_for(lambda: not any(map(is_there, seen)))
