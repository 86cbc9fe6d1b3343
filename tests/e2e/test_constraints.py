"""Schemas, expressions and grammars that could bring an engine down, against the real one: each is
refused, and the server goes on. And reasoning, told apart by vLLM's own parser.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.client import CHAT, events
from tests.conftest import DEMO, Server, running_server

QUESTION = "What is 34 minus 7?"  # the demo model thinks before it answers sums
LOOP = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with both parsers."""
    folder = tmp_path_factory.mktemp("parsers")
    arguments = (str(DEMO / "model"), "--served-model-name", "demo")
    parsers = ("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
    with running_server(folder, *arguments, *parsers) as started:
        yield started


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def ask(http: httpx.Client, question: str = QUESTION, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": question}]
    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 80, **fields}
    return http.post(CHAT, json=body)


def tool(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}


def test_a_schema_that_only_the_second_backend_knows_is_kept_to(tmp_path: Path) -> None:
    """xgrammar does not know multipleOf; vLLM takes llguidance then. Its white space ends, too.

    On a server of its own: vLLM 0.32 keeps to the backend of an engine's first constraint, and
    llguidance's does not know the tags that strict tools are made into.
    """
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "multipleOf": 7, "minimum": 7, "maximum": 700}},
        "required": ["n"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    arguments = (str(DEMO / "model"), "--served-model-name", "demo")
    with (
        running_server(tmp_path, *arguments) as started,
        httpx.Client(base_url=started.url, timeout=60) as http,
    ):
        answer = ask(http, "Hello!", max_tokens=200, response_format=response_format)
    assert answer.status_code == 200, answer.text
    message = answer.json()["choices"][0]["message"]
    assert json.loads(message["content"])["n"] % 7 == 0, answer.text


HOSTILE: dict[str, dict[str, Any]] = {
    "slow pattern": {"json": {"type": "string", "pattern": "a{9999}"}},
    "many patterns": {"json": {"anyOf": [{"type": "string", "pattern": "b{99}"}] * 20}},
    "nested counts": {"regex": "((a{99}){99}){99}"},
    "thousands of digits": {"regex": "a{" + "9" * 5000 + "}"},
    "digits in a pattern": {"json": {"type": "string", "pattern": "a{" + "9" * 5000 + "}"}},
    "beyond 64 bits": {"json": {"const": 2**70}},
    "counts in a grammar": {"grammar": 'root ::= ("a"{9999}){9999}'},
    "a reference to itself": {"json": LOOP},
    "a rule that is itself": {"grammar": "root ::= root"},
    "a wide class, counted": {"regex": "\\p{L}{1,9999}"},
    "look-ahead": {"regex": "(?=a)b"},
    "an open bracket": {"regex": "(((a"},
    "no such type": {"json": {"type": "strin"}},
    "no such rule": {"grammar": "root ::= y"},
    "too deep": {"json": json.loads('{"items":' * 60 + "{}" + "}" * 60)},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("constraint", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_constraint_is_refused_and_the_server_goes_on(
    http: httpx.Client, constraint: dict[str, Any], stream: bool
) -> None:
    response = ask(http, structured_outputs=constraint, include_reasoning=False, stream=stream)
    assert response.status_code == 400, response.text
    assert http.get("/health/ready").status_code == 200


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"p": {"type": "string", "pattern": "a{9999}"}}},
        {"properties": {f"p{number}": {"description": "y" * 99} for number in range(900)}},
        {"properties": {"p": {"const": -(2**70)}}},
    ],
)
def test_a_hostile_tool_is_refused(http: httpx.Client, parameters: dict[str, Any]) -> None:
    response = ask(http, tools=[tool(parameters)], tool_choice="required")
    assert response.status_code == 400, response.text


def test_after_all_that_the_answer_is_still_right(http: httpx.Client) -> None:
    message = ask(http).json()["choices"][0]["message"]
    assert "27" in message["content"]


def test_reasoning_comes_beside_the_answer(http: httpx.Client) -> None:
    whole = ask(http).json()
    message = whole["choices"][0]["message"]
    assert "34 - 7 = 27" in message["reasoning"]
    assert "think" not in message["content"]
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    streamed = events(ask(http, stream=True, stream_options={"include_usage": True}))
    deltas = [choice["delta"] for event in streamed for choice in event["choices"]]
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == message["reasoning"]
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert text.strip() == message["content"].strip()
    assert streamed[-1]["usage"] == whole["usage"]


def test_hidden_reasoning_is_nowhere(http: httpx.Client) -> None:
    shown = ask(http).json()["choices"][0]["message"]["content"].strip()
    whole = ask(http, include_reasoning=False)
    assert whole.json()["choices"][0]["message"]["content"].strip() == shown
    streamed = ask(http, include_reasoning=False, stream=True)
    deltas = [choice["delta"] for event in events(streamed) for choice in event["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == shown
    for response in (whole, streamed):
        assert '"reasoning"' not in response.text


def test_a_constraint_waits_for_the_end_of_the_reasoning(http: httpx.Client) -> None:
    message = ask(http, structured_outputs={"regex": "(twenty|27)!"}).json()["choices"][0][
        "message"
    ]
    assert "34 - 7 = 27" in message["reasoning"]
    assert message["content"].strip() in ("27!", "twenty!")
