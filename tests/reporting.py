"""A pytest plugin: what a failed or hung test tells, what runs again, and what was skipped.

- Each test has a limit by its folder, in seconds. One that hangs fails alone: its stacks, and those
  of the servers that it talks to, are in its report; those servers are ended, and the next test
  that needs one gets another.
- A failure's report holds the last 100 log lines of each server, its metrics, and the last request.
- With `--reruns 1`, as CI runs, a test that fails runs once more with fresh servers. If it passes
  then, the run passes and ends with `FLAKY: name`.
- What is skipped because a program is not installed is told once, with the command that brings it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import pytest_timeout

from tests.conftest import Server, running_servers

LIMITS_S = {"unit": 120, "rules": 120, "deploy": 120, "integration": 180, "e2e": 300}
"""By folder, fixtures included; several times what the slowest test of each takes on two AVX2 cores
beside other work."""
LOG_LINES = 100
SHOWN_CHARS = 4000
NOT_HERE = re.compile(r"NOT TESTED HERE: there is no ([\w-]+)")
INSTALL = "make services"
NOTES = "TESTS_NOTES"
"""The file in which the first part of `make test` leaves for the second what to tell at the end."""

THOROUGH = bool(os.environ.get("TESTS_ALL"))
"""Whether this is `make test-all`."""

_failed = pytest.StashKey[bool]()
_hung = pytest.StashKey[bool]()
_before = pytest.StashKey[list[Server]]()


class Reporting:
    def __init__(self) -> None:
        self._requests = LastRequests()

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        if not THOROUGH:
            left_out = [item for item in items if item.get_closest_marker("thorough")]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]
        for item in items:
            if item.get_closest_marker("timeout") is None:
                folders = (LIMITS_S.get(part) for part in item.path.parts)
                limit_s = next(filter(None, folders), max(LIMITS_S.values()))
                item.add_marker(pytest.mark.timeout(limit_s))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        item.stash[_before] = list(running_servers)
        with self._requests.remembered():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        hook, limits = item.config.hook, pytest_timeout._get_item_settings(item)
        if report.failed:
            hook.pytest_timeout_cancel_timer(item=item)  # reporting is no part of the test
            hung = call.excinfo is not None and "Timeout (>" in str(call.excinfo.value)
            item.stash[_failed] = True
            item.stash[_hung] = item.stash.get(_hung, False) or hung
            if text := self._requests.text():
                report.sections.append(("last request", text))
            for server in servers_of(item):
                if hung:
                    ask_for_stacks(server)
                report.sections += told_by(server)
                if hung:
                    kill(server)
        if report.when == "teardown" and item.stash.get(_failed, False):
            if item.stash.get(_hung, False) or item.config.getoption("reruns", None):
                forget_servers(item)
            item.stash[_failed] = item.stash[_hung] = False
        if report.failed or report.when == "teardown":
            # For what is left of the test; or for its second run, which has a limit of its own.
            hook.pytest_timeout_cancel_timer(item=item)
            hook.pytest_timeout_set_timer(item=item, settings=limits)
        return report

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The paragraph at the end; in the first of several runs, a note for the last."""
        missing: Counter[str] = Counter()
        for report in terminalreporter.stats.get("skipped", []):
            if found := NOT_HERE.search(str(report.longrepr)):
                missing[found[1]] += 1
        passed = {report.nodeid for report in terminalreporter.stats.get("passed", [])}
        again = {report.nodeid for report in terminalreporter.stats.get("rerun", [])}
        flaky = sorted(again & passed)
        path = os.environ.get(NOTES)
        if path and Path(path).exists():
            before = json.loads(Path(path).read_text(encoding="utf-8"))
            missing += Counter(before["missing"])
            flaky = before["flaky"] + flaky
        if path:
            content = json.dumps({"missing": missing, "flaky": flaky})
            Path(path).write_text(content, encoding="utf-8")
        if missing:
            names = ", ".join(f"{name} ({count})" for name, count in sorted(missing.items()))
            terminalreporter.write_line(
                f"NOT TESTED HERE: {missing.total()} tests need programs that are not installed: "
                f"{names}. This installs them (Debian, as root): {INSTALL}",
                yellow=True,
            )
        for report in terminalreporter.stats.get("rerun", []):
            terminalreporter.section(f"first run of {report.nodeid}")
            terminalreporter.write_line(report.longreprtext)
            for title, content in report.sections:
                terminalreporter.write_line(f"--- {title}\n{content}")
        for name in flaky:
            terminalreporter.write_line(f"FLAKY: {name}", yellow=True, bold=True)


class LastRequests:
    """What httpx, which most clients are made of, has sent last."""

    def __init__(self) -> None:
        self._request: httpx.Request | None = None
        self._response: httpx.Response | None = None

    @contextlib.contextmanager
    def remembered(self) -> Iterator[None]:
        """Meanwhile, and for one test, requests are remembered."""
        self._request = self._response = None
        whole, later = httpx.Client.send, httpx.AsyncClient.send
        remember = self._remember

        def send(self: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
            remember(request, None)
            response = whole(self, request, **options)
            remember(request, response)
            return response

        async def send_later(
            self: httpx.AsyncClient, request: httpx.Request, **options: Any
        ) -> httpx.Response:
            remember(request, None)
            response = await later(self, request, **options)
            remember(request, response)
            return response

        httpx.Client.send = send  # type: ignore[method-assign,assignment]
        httpx.AsyncClient.send = send_later  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            httpx.Client.send, httpx.AsyncClient.send = whole, later  # type: ignore[method-assign]

    def _remember(self, request: httpx.Request, response: httpx.Response | None) -> None:
        if request.url.path not in ("/metrics", "/health/ready"):  # looked at while waiting
            self._request, self._response = request, response

    def text(self) -> str:
        if self._request is None:
            return ""
        lines = [f"{self._request.method} {self._request.url}"]
        with contextlib.suppress(httpx.RequestNotRead):
            lines.append(self._request.content[:SHOWN_CHARS].decode(errors="replace"))
        if self._response is None:
            lines.append("-> no answer")
        else:
            lines.append(f"-> {self._response.status_code}")
            with contextlib.suppress(httpx.ResponseNotRead):
                lines.append(self._response.text[:SHOWN_CHARS])
        return "\n".join(lines)


def servers_of(item: pytest.Item) -> list[Server]:
    """Those that the test's fixtures hold, and those that it has started itself."""
    held = [value for _, value in server_fixtures(item)]
    return held + [
        server
        for server in running_servers
        if server not in held and server not in item.stash.get(_before, [])
    ]


def server_fixtures(item: pytest.Item) -> Iterator[tuple[Any, Server]]:
    """(pytest's fixture definition, server) of those that are up and that the test depends on."""
    definitions = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009  # pytest's own
    for name in getattr(item, "fixturenames", ()):
        for definition in definitions.get(name, ()):
            cached = definition.cached_result
            if cached is not None and isinstance(cached[0], Server):
                yield definition, cached[0]


def told_by(server: Server) -> list[tuple[str, str]]:
    """Sections of a report: the end of the server's log, and its metrics but those that are 0."""
    sections = []
    with contextlib.suppress(OSError):
        lines = server.log().splitlines()[-LOG_LINES:]
        sections.append((f"log of {server.url}", "\n".join(lines)))
    with contextlib.suppress(httpx.HTTPError):
        text = httpx.get(server.url + "/metrics", timeout=5).text
        lines = [
            line
            for line in text.splitlines()
            if not (line.startswith(("#", "python_")) or line.endswith(" 0.0"))
            and not re.search(r"_(bucket|created)[{ ]", line)
        ]
        sections.append((f"metrics of {server.url}", "\n".join(lines)))
    return sections


def ask_for_stacks(server: Server) -> None:
    """Has the server and its engine write their stacks into the server's log."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(server.process.pid)
        for each in (process, *process.children(recursive=True)):
            if catches(each.pid, signal.SIGUSR1):
                each.send_signal(signal.SIGUSR1)
        time.sleep(1)  # for them to write


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, which would end it without."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


def kill(server: Server) -> None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(server.process.pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                each.kill()


def forget_servers(item: pytest.Item) -> None:
    """End the fixtures that hold servers, so that the next test that needs one starts another."""
    request = getattr(item, "_request", None)
    for definition, _ in list(server_fixtures(item)):
        with contextlib.suppress(Exception):  # of what has been killed
            definition.finish(request)
