"""Signals at moments of a server's life: exit 0, and no process is left. Runs last, because it ends
the servers that other tests share. A drain is in test_serving.py.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.client import TEXT, children, is_there, metric, wait_for
from tests.conftest import BIN, DEMO, Server


def left(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if is_there(process)]


def test_a_second_signal_ends_what_is_running(int8_server: Server) -> None:
    seen = children(int8_server.process.pid)
    body = {"model": int8_server.model, "prompt": "The", "max_tokens": 1500, "ignore_eos": True}
    asked = httpx.stream("POST", int8_server.url + TEXT, json={**body, "stream": True}, timeout=60)
    with asked as got:
        lines = got.iter_lines()
        next(lines)
        int8_server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "Draining" in int8_server.log())
        int8_server.process.send_signal(signal.SIGTERM)
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["kind"] == "unavailable"
    assert int8_server.process.wait(10) == 0
    wait_for(lambda: not left(seen))
    assert "resource_tracker" not in int8_server.log(), "shared memory is freed by us"


def test_an_engine_of_one_process_comes_back(demo_server: Server) -> None:
    body = {"model": demo_server.model, "prompt": "The", "max_tokens": 500, "ignore_eos": True}
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=demo_server.url, timeout=120) as http:
        asked = [pool.submit(http.post, TEXT, json=body) for _ in range(8)]
        wait_for(lambda: metric(http, "packhorse_requests_in_flight") == 8)
        core(demo_server).kill()
        answers = [answer.result().json() for answer in asked]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [500] * 8


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_an_engine_lost_before_its_first_request(
    demo_server: Server, fault: signal.Signals
) -> None:
    """vLLM asks a new engine something first, and would wait for that answer for ever."""
    core(demo_server).kill()
    body = {"model": demo_server.model, "prompt": "The", "max_tokens": 5, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=demo_server.url, timeout=120) as http:
        for status in (503, 200):
            wait_for(lambda: http.get("/health/ready").status_code == status)  # noqa: B023
        lost = core(demo_server)
        lost.suspend()
        asked = pool.submit(http.post, TEXT, json=body)
        wait_for(lambda: metric(http, "packhorse_requests_in_flight") == 1)
        time.sleep(0.2)  # so that the question is on its way
        lost.send_signal(fault)
        assert asked.result().json()["usage"]["completion_tokens"] == 5


def test_sigterm_during_a_rebuild_leaves_nothing(demo_server: Server) -> None:
    lost = core(demo_server)
    nursery = psutil.Process(lost.pid).parent()
    lost.kill()
    wait_for(lambda: httpx.get(demo_server.url + "/health/ready").status_code == 503)
    wait_for(lambda: bool(nursery.children()))  # the next engine
    seen = [lost, *children(demo_server.process.pid)]
    demo_server.process.terminate()
    assert demo_server.process.wait(30) == 0
    wait_for(lambda: not left(seen))


def core(server: Server) -> psutil.Process:
    (found,) = (p for p in children(server.process.pid) if "VLLM::" in " ".join(p.cmdline()))
    assert found.cmdline()[0] == "VLLM::EngineCore"
    return found


def test_sigterm_while_the_engine_starts(tmp_path: Path) -> None:
    command = [BIN / "packhorse", "serve", DEMO / "model", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=tmp_path)
    seen: list[psutil.Process] = []

    def has_an_engine() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            seen[:] = children(process.pid)
            return any("VLLM::" in " ".join(child.cmdline()) for child in seen)
        return False

    try:
        wait_for(has_an_engine, timeout_s=120)
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not left(seen))
