"""The catalogue of clients, its pins and its page; the clients themselves run in tests/e2e."""

from __future__ import annotations

import json
import re

import pytest

from tests.clients.catalogue import CLIENTS, PINS, PROGRAMS, USUAL, Client, Outcome
from tests.clients.page import page, word


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_its_program_knows_every_call(client: Client) -> None:
    text = (PROGRAMS / client.program).read_text(encoding="utf-8")
    if client.home == "node":
        known = set(re.findall(r"^  (\w+):? ", text, re.MULTILINE))
    elif client.home == "java":
        known = set(re.findall(r'case "(\w+)":', text))
    else:
        known = set(re.findall(r"^@call\n(?:async )?def (\w+)\(", text, re.MULTILINE))
    calls = (*client.calls, *client.scripted)
    assert set(calls) <= known
    assert len(set(calls)) == len(calls)
    assert not client.scripted or client.is_agent


@pytest.mark.parametrize("name", ["new", "old"])
def test_every_package_is_pinned(name: str) -> None:
    lines = (PINS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.+!]+", pin)] == []


def test_the_lock_names_no_registry_but_the_public_one() -> None:
    text = (PINS / "package-lock.json").read_text(encoding="utf-8")
    packages = json.loads(text)["packages"]
    found = [package["resolved"] for package in packages.values() if "resolved" in package]
    assert [url for url in found if not url.startswith("https://registry.npmjs.org/")] == []
    assert all("integrity" in package for name, package in packages.items() if name)


def test_the_page_tells_what_each_server_answers() -> None:
    good, bad = Outcome(True, "{}"), Outcome(False, "Error: a | b <c>\nat 127.0.0.1:4711")
    assert [word(good, good), word(bad, bad), word(good, bad)] == ["yes", "no", "yes / no"]
    ours = {
        client.name: dict.fromkeys((*client.calls, *client.scripted), good) for client in CLIENTS
    }
    plain = {client.name: dict.fromkeys(client.calls, good) for client in CLIENTS}
    plain["LangChain"] = {**plain["LangChain"], "too_long": bad}
    text = page({"packhorse": ours, "vllm": plain}, "0.32.0")
    total = sum(len(client.calls) for client in CLIENTS)
    assert f"Of {total} calls" in text
    assert f"answers {total} as they should be, plain vLLM {total - 1}." in text
    row = next(line for line in text.splitlines() if line.startswith("| LangChain | 1."))
    assert row.count(" yes |") == len(USUAL) - 1
    assert "| yes / no |" in row
    told = next(line for line in text.splitlines() if line.startswith("| LangChain | `too_long`"))
    assert told.endswith(r"| answered | Error: a \| b &lt;c&gt; at SERVER |")
    # What only this server was asked is no part of the count.
    codex = next(line for line in text.splitlines() if line.startswith("| Codex CLI |"))
    assert codex.endswith("| responses | yes | yes | yes / - |")
    ours["Codex CLI"] = {**ours["Codex CLI"], "tools": bad}
    text = page({"packhorse": ours, "vllm": plain}, "0.32.0")
    assert f"answers {total} as they should be" in text
    assert "| Codex CLI | `tools` | Error: a \\| b &lt;c&gt; at SERVER | not asked |" in text


def test_each_api_has_clients() -> None:
    for api in ("chat", "responses", "messages"):
        libraries = [c for c in CLIENTS if c.api == api and set(USUAL) <= set(c.calls)]
        agents = [c for c in CLIENTS if c.api == api and c.is_agent]
        assert len(libraries) >= 6, api
        assert agents, api
