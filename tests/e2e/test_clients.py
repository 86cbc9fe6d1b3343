"""Client libraries and programs that people use, on the real engine: each call of the catalogue in
tests/clients does what the client promises. Those of out/clients (`make clients`) run in
`make test-all`; openai for Python, Java, curl, wget and bare sockets always.

Beside plain vLLM the same runs in bench/clients.py, which writes docs/clients.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.catalogue import CLIENTS, Client
from tests.conftest import Server, running_server
from tests.programs import missing

KEY = "ph-a-key-of-the-client-tests"
QUICK = ("own", "java")
"""What these run on is here anyway."""


def case(client: Client) -> object:
    marks = [] if client.home in QUICK else [pytest.mark.thorough]
    return pytest.param(client, id=client.name, marks=marks)


@pytest.fixture(scope="module")
def clients_server(int8_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = (str(int8_folder), "--tool-call-parser", "hermes")
    environment = {"PACKHORSE_AUTH__API_KEY": KEY}
    folder = tmp_path_factory.mktemp("clients")
    with running_server(folder, *arguments, environment=environment) as server:
        yield server


@pytest.mark.parametrize("client", [case(client) for client in CLIENTS])
def test_every_call_is_answered(clients_server: Server, client: Client) -> None:
    if lacking := client.missing():
        pytest.skip("make clients has not run" if lacking == "clients" else missing(lacking))
    outcomes = client.run(clients_server.url + "/v1", clients_server.model, KEY)
    faults = [f"{call}: {outcome.told}" for call, outcome in outcomes.items() if not outcome.ok]
    assert not faults, "\n".join(faults)
