"""Real Redis and Memcached servers, started and ended by the test that uses them."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis

from tests.programs import missing, path_of


def program(name: str) -> str:
    """Its path; without it the test is skipped, and the run's last paragraph says so."""
    found = path_of(name)
    if found is None:
        pytest.skip(missing(name))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class StoreServer:
    """A store that can be killed, stopped and started again on the same port."""

    url: str
    port: int
    command: list[str]
    folder: Path
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        with (self.folder / "store.log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=self.folder)
        deadline_s = time.monotonic() + 20
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def running_store(
    kind: str, folder: Path, *options: str, port: int | None = None
) -> Iterator[StoreServer]:
    """`redis` or `memcached`, which loses everything when it is killed."""
    port = port or free_port()
    if kind == "redis":
        command = [program("redis-server"), "--port", str(port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--appendonly", "no", *options]
        url = f"redis://127.0.0.1:{port}/0"
    else:
        command = [program("memcached"), "-p", str(port), "-l", "127.0.0.1", "-U", "0"]
        command += ["-u", "nobody", *options]
        url = f"memcached://127.0.0.1:{port}"
    server = StoreServer(url, port, command, folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


SLOTS = 16384


@contextmanager
def running_cluster(folder: Path, masters: int = 3) -> Iterator[list[StoreServer]]:
    """A Redis Cluster without replicas; each master has its part of the slots, in order."""
    with ExitStack() as running:
        servers = []
        for number in range(masters):
            place = folder / str(number)
            place.mkdir()
            for _ in range(50):
                port = free_port()
                if port <= 55535:  # the nodes talk to each other on the port 10000 above
                    break
            options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
            servers.append(
                running.enter_context(running_store("redis", place, *options, port=port))
            )
        clients = [redis.Redis(port=server.port, decode_responses=True) for server in servers]
        bounds = [SLOTS * number // masters for number in range(masters + 1)]
        for client, first, end in zip(clients, bounds, bounds[1:], strict=False):
            client.execute_command("CLUSTER ADDSLOTS", *range(first, end))
            client.execute_command("CLUSTER MEET", "127.0.0.1", servers[0].port)
        deadline_s = time.monotonic() + 30
        while any(c.execute_command("CLUSTER INFO")["cluster_state"] != "ok" for c in clients):
            if time.monotonic() > deadline_s:
                raise TimeoutError("the cluster does not come up")
            time.sleep(0.05)
        for client in clients:
            client.close()
        yield servers
