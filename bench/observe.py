"""A mixed load for ten minutes with the death of an engine, what the metrics say of it, and what a
scrape costs. Ends in one line of JSON.

    python -m bench.observe                 # about 12 minutes; from the repository's root
    python -m bench.observe --minutes 1

Needs Debian's prometheus. The load and the checks are those of tests/e2e/test_observed.py, which
takes a minute: counters never go backwards, client, server and engine counted the same, series are
constant. Reported beside them: how the memory grows, and a scrape's CPU, idle and under load.
Client, Prometheus, server and engine share the CPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil

from tests.client import CHAT
from tests.conftest import Server, running_server
from tests.deploy.scraping import running_prometheus
from tests.e2e import mixed
from tests.e2e.adapted import arguments, make_folder

SCRAPES = 50


def scrape_cpu_ms(server: Server, *, streams: int) -> dict[str, float]:
    """CPU that the server's process spends on a scrape, beside so many streams: what it spends on
    these in as long a time without scrapes is taken off.
    """
    own, over = psutil.Process(server.process.pid), threading.Event()

    def stream() -> None:
        body = {"model": server.model, "max_tokens": 200, "stream": True, "ignore_eos": True}
        messages = [{"role": "user", "content": "Tell me."}]
        with httpx.Client(base_url=server.url, timeout=120) as http:
            while not over.is_set():
                sent = {**body, "messages": messages, "temperature": 0.9}
                with http.stream("POST", CHAT, json=sent) as response:
                    for _ in response.iter_raw():
                        pass

    threads = [threading.Thread(target=stream) for _ in range(streams)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    took_ms, spent = [], []
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for scrapes in (0, SCRAPES):
            begun_s, used_s = time.monotonic(), sum(own.cpu_times()[:2])
            for _ in range(SCRAPES):
                if scrapes:
                    at_s = time.monotonic()
                    http.get("/metrics").raise_for_status()
                    took_ms.append((time.monotonic() - at_s) * 1000)
                time.sleep(0.1)
            spent.append((sum(own.cpu_times()[:2]) - used_s, time.monotonic() - begun_s))
    over.set()
    for thread in threads:
        thread.join()
    (alone_s, alone_wall_s), (with_s, with_wall_s) = spent
    cpu_ms = (with_s - alone_s * with_wall_s / alone_wall_s) / SCRAPES * 1000
    return {
        "cpu_ms": round(cpu_ms, 2),
        "wall_p50_ms": round(statistics.median(took_ms), 2),
        "wall_max_ms": round(max(took_ms), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--model", type=Path, default=Path("out/demo-int8"), help="made by make demo"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_folder(folder)
        started = arguments(options.model.resolve(), folder, rpc={"port": 0})
        with running_server(folder, *started, cache=True) as server:
            scrapes = {
                "idle": scrape_cpu_ms(server, streams=0),
                "8 streams": scrape_cpu_ms(server, streams=8),
            }
            print(scrapes, file=sys.stderr, flush=True)
            target = server.url.removeprefix("http://")
            with running_prometheus(folder, target, every="5s") as prometheus:
                address = mixed.rpc_address_of(server)
                phase_s = options.minutes * 20
                found = asyncio.run(mixed.run(server, address, prometheus, phase_s))
    print(json.dumps({"scrape": scrapes, **vars(found)}))


if __name__ == "__main__":
    main()
