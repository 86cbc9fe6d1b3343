"""A real Prometheus on the configuration that we ship, for tests: another target, another port,
more scrapes.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import ROOT
from tests.programs import missing, path_of

SHIPPED = ROOT / "deploy/prometheus"

needs_prometheus = pytest.mark.skipif(
    not (path_of("prometheus") and path_of("promtool")), reason=missing("prometheus")
)


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it; what it says is in stdout, errors too."""
    command = [path_of("promtool") or "promtool", *map(str, arguments)]
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )


def written_config(folder: Path, target: str, key: str, every: str) -> Path:
    """Our prometheus.yml for `target` (HOST:PORT), with the files that it names beside it."""
    config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    config["global"] = {
        "scrape_interval": every,
        "scrape_timeout": every,
        "evaluation_interval": every,
    }
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    for rules in config["rule_files"]:
        shutil.copy(SHIPPED / rules, folder / rules)
    key_file = folder / job["authorization"]["credentials_file"]
    key_file.parent.mkdir(parents=True, exist_ok=True)
    key_file.write_text(key)
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that answers."""

    url: str

    def ask(self, path: str, **parameters: Any) -> Any:
        """The `data` of an answer of its API; raises AssertionError with its error."""
        response = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        answer = response.json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series, now."""
        found = self.ask("query", query=expression)["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]

    def wait_for(self, expression: str, *, timeout_s: float = 30) -> None:
        """Until it has a result."""
        wait_until(lambda: bool(self.query(expression)), expression, timeout_s)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


@contextmanager
def running_prometheus(
    folder: Path, target: str, *, key: str = "none", every: str = "1s"
) -> Iterator[Prometheus]:
    """Prometheus with our configuration and rules, scraping `target`, its data in `folder`."""
    config = written_config(folder, target, key, every)
    log_path = folder / "prometheus.log"
    with socket.socket() as probe:  # it cannot choose a port itself and tell which
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                path_of("prometheus") or "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
                "--log.level=warn",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        url = f"http://{address}"
        wait_until(lambda: _is_ready(process, url, log_path), f"Prometheus at {url}")
        yield Prometheus(url)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(process: subprocess.Popen[bytes], url: str, log_path: Path) -> bool:
    assert process.poll() is None, f"Prometheus ended:\n{log_path.read_text()[-4000:]}"
    try:
        return httpx.get(f"{url}/-/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
