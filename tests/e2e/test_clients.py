"""Client libraries, coding agents and programs that people use, on the real engine: each call of
the catalogue in tests/clients does what the client promises. Those of out/clients (`make clients`)
run in `make test-all`; openai and anthropic for Python, Java, curl, wget and bare sockets always.

A tiny model calls no tools of an agent by itself. So agents are answered by it for one turn, and
have whole tasks on the engine `vllm-echo`: their prompt is the model's answer, word for word, and
vLLM's parser reads the tool call in it.

Beside plain vLLM the same runs in bench/clients.py, which writes docs/clients.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.clients.catalogue import CLIENTS, LONG_CONTEXT, Client, minilm
from tests.conftest import DEMO, Server, running_server
from tests.programs import missing

KEY = "ph-a-key-of-the-client-tests"
QUICK = ("own", "java")
"""What these run on is here anyway."""
PARSER = ("--tool-call-parser", "hermes")


def cases(*apis: str, agents: bool = False) -> list[Any]:
    found = []
    for client in CLIENTS:
        if client.is_agent == agents and (not apis or client.api in apis):
            marks = [] if client.home in QUICK else [pytest.mark.thorough]
            found.append(pytest.param(client, id=client.name, marks=marks))
    return found


def serving(folder: Path, *arguments: str, **sections: Any) -> Any:
    """A server with a key, and settings by section."""
    config = folder / "packhorse.yaml"
    config.write_text(json.dumps({"auth": {"api_key": KEY}, **sections}))  # JSON is YAML
    return running_server(folder, *arguments, "--config", str(config))


@pytest.fixture(scope="module")
def clients_server(int8_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("clients")
    batches = {"folder": str(folder / "batches")}
    with serving(folder, str(int8_folder), *PARSER, batches=batches) as server:
        yield server


@pytest.fixture(scope="module")
def long_server(int8_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Agents begin with some 20,000 tokens. The demo model was not trained for that: it answers,
    and not well.
    """
    folder = tmp_path_factory.mktemp("agents")
    with serving(folder, str(int8_folder), *PARSER, engine=LONG_CONTEXT) as server:
        yield server


@pytest.fixture(scope="module")
def script_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("script")
    engine = {**LONG_CONTEXT, "kind": "vllm-echo"}
    with serving(folder, str(DEMO / "model"), *PARSER, engine=engine) as server:
        yield server


@pytest.fixture(scope="module")
def embedding_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = minilm()
    if model is None:
        pytest.skip("make clients has not run")
    with serving(tmp_path_factory.mktemp("embedding"), str(model)) as server:
        yield server


def check(client: Client, server: Server, calls: Sequence[str]) -> None:
    if lacking := client.missing():
        pytest.skip("make clients has not run" if lacking == "clients" else missing(lacking))
    outcomes = client.run(server.url + "/v1", server.model, KEY, calls)
    faults = [f"{call}: {outcome.told}" for call, outcome in outcomes.items() if not outcome.ok]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("client", cases("chat", "responses", "messages", "batches"))
def test_every_call_is_answered(clients_server: Server, client: Client) -> None:
    check(client, clients_server, client.calls)


@pytest.mark.thorough
@pytest.mark.parametrize("client", cases("embeddings"))
def test_every_call_of_an_embedding_model_is_answered(
    embedding_server: Server, client: Client
) -> None:
    check(client, embedding_server, client.calls)


@pytest.mark.parametrize("client", cases(agents=True))
def test_a_coding_agent_is_answered_by_the_model(long_server: Server, client: Client) -> None:
    check(client, long_server, client.calls)


@pytest.mark.parametrize("client", cases(agents=True))
def test_a_coding_agent_runs_a_command_and_goes_on(script_server: Server, client: Client) -> None:
    check(client, script_server, client.scripted)
