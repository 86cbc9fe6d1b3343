"""Floods: how much memory strangers can make the server hold, and whether others are answered
meanwhile. Ends in one line of JSON.

    python bench/floods.py                          # about 6 minutes
    python bench/floods.py --kinds idle trailers --seconds 5
    python bench/floods.py --checkout FOLDER        # the server of another checkout, to compare

For each kind of flood (bench/flood_clients.py) a server of its own on the echo engine, with its
default limits and two keys, on loopback. Memory is the server's RSS: before, and at its highest
while the flood goes on. The good client asks all the time, on a new connection each time over HTTP,
on one long-lived channel over gRPC. Floods, good client and server share the CPUs: times are upper
bounds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
from flood_clients import FLOODS
from servers import free_port

from packhorse.serve.rpc.pb import inference_pb2

CLIENTS = Path(__file__).resolve().parent / "flood_clients.py"
HERE = CLIENTS.parent.parent
SERVE = "from packhorse.serve.cli import app; app()"
MIB = 2**20
# Connections; those of gRPC with half messages have 16 calls each.
NUMBERS = {
    "idle": 6000,
    "slow_headers": 6000,
    "long_headers": 300,
    "half_bodies": 1500,
    "half_bodies_of_a_key": 300,
    "trailers": 300,
    "pipelined": 100,
    "grpc_idle": 6000,
    "grpc_half_messages": 20,
    "grpc_half_messages_of_a_key": 20,
}
GOOD = "Bearer key-good"


@dataclass
class Good:
    """What became of the good client's requests."""

    took_ms: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def ask(self, once: Callable[[], None], over: threading.Event) -> None:
        while not over.is_set():
            begun_s = time.monotonic()
            try:
                once()
            except (httpx.HTTPError, grpc.RpcError) as error:
                code = error.code().name if isinstance(error, grpc.RpcError) else ""
                self.failed.append(code or type(error).__name__)
            else:
                self.took_ms.append((time.monotonic() - begun_s) * 1000)
            time.sleep(0.02)

    def summary(self) -> dict[str, Any]:
        return {
            "answered": len(self.took_ms),
            "failed": len(self.failed),
            "failures": sorted(set(self.failed)),
            "median_ms": round(statistics.median(self.took_ms), 1) if self.took_ms else None,
            "worst_ms": round(max(self.took_ms), 1) if self.took_ms else None,
        }


@dataclass(frozen=True)
class Running:
    http_port: int
    grpc_port: int
    process: psutil.Process

    def rss_mib(self) -> float:
        return round(self.process.memory_info().rss / MIB, 1)


@contextmanager
def server(checkout: Path, folder: Path) -> Iterator[Running]:
    """`packhorse serve` of that checkout, ready."""
    keys = folder / "keys.yaml"
    names = ("good", "greedy")
    digests = {name: hashlib.sha256(f"key-{name}".encode()).hexdigest() for name in names}
    keys.write_text(json.dumps([{"name": n, "sha256": digests[n]} for n in names]))
    ports = free_port(), free_port()
    command = [
        sys.executable, "-c", SERVE, "serve", "--engine", "echo", "--served-model-name", "echo",
        "--port", str(ports[0]), "--grpc-port", str(ports[1]), "--api-keys", str(keys),
        "--log-level", "error",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PACKHORSE_CACHE__ENABLED": "false"}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                httpx.get(f"http://127.0.0.1:{ports[0]}/health/ready").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield Running(*ports, psutil.Process(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def flooded(kind: str, number: int, seconds: float, checkout: Path) -> dict[str, Any]:
    """One flood: memory, and what the good clients got."""
    with (
        tempfile.TemporaryDirectory() as folder,
        server(checkout, Path(folder)) as running,
        grpc.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel,
    ):
        chat = channel.unary_unary(
            "/packhorse.v1.Inference/Chat",
            request_serializer=inference_pb2.ChatRequest.SerializeToString,
            response_deserializer=inference_pb2.ChatResponse.FromString,
        )
        message = inference_pb2.ChatRequest(model="echo")
        message.messages.add(role="user", content="one two three")

        def over_http() -> None:
            body = {"model": "echo", "messages": [{"role": "user", "content": "one two three"}]}
            url = f"http://127.0.0.1:{running.http_port}/v1/chat/completions"
            sent = httpx.post(url, json=body, headers={"authorization": GOOD}, timeout=10)
            sent.raise_for_status()

        def over_grpc() -> None:
            chat(message, metadata=(("authorization", GOOD),), timeout=10)

        for _ in range(20):
            over_http()
            over_grpc()
        before = running.rss_mib()
        with subprocess.Popen(
            [
                sys.executable, CLIENTS, kind, str(running.http_port), str(running.grpc_port),
                str(number),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as clients:  # fmt: skip
            assert clients.stdin is not None
            assert clients.stdout is not None
            over, good = threading.Event(), {"http": Good(), "grpc": Good()}
            threads = [
                threading.Thread(target=good["http"].ask, args=(over_http, over)),
                threading.Thread(target=good["grpc"].ask, args=(over_grpc, over)),
            ]
            for thread in threads:
                thread.start()
            try:
                flooding = threading.Thread(target=clients.stdout.readline)
                flooding.start()
                peak, until_s = before, None
                while until_s is None or time.monotonic() < until_s:
                    peak = max(peak, running.rss_mib())
                    if until_s is None and not flooding.is_alive():
                        until_s = time.monotonic() + seconds
                    time.sleep(0.05)
                ends = len(running.process.net_connections("tcp"))
            finally:
                over.set()
                for thread in threads:
                    thread.join()
                clients.stdin.close()
                refused = json.loads(clients.stdout.readline())
    return {
        "connections": number,
        "rss_before_mib": before,
        "rss_peak_mib": peak,
        "grew_mib": round(peak - before, 1),
        "open_at_end": ends,
        "flood_saw": refused,
        **{f"good_{name}": asked.summary() for name, asked in good.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Floods against the server, on loopback.")
    parser.add_argument("--kinds", nargs="+", choices=FLOODS, default=list(FLOODS))
    parser.add_argument("--seconds", type=float, default=15.0, help="of each, once all is open")
    parser.add_argument("--checkout", type=Path, default=HERE, help="whose server")
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found = {}
    for kind in arguments.kinds:
        result = flooded(kind, NUMBERS[kind], arguments.seconds, arguments.checkout.resolve())
        found[kind] = result
        print(
            f"{kind}: {result['connections']} connections, +{result['grew_mib']} MiB; good: "
            f"{result['good_http']} {result['good_grpc']}",
            file=sys.stderr,
            flush=True,
        )
    print(json.dumps({"seconds": arguments.seconds, "floods": found}))


if __name__ == "__main__":
    main()
