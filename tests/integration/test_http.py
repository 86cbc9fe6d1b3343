"""The HTTP server in its own process over the echo engine: shapes, errors, faults, signals."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.client import (
    CHAT,
    TEXT,
    address_of,
    events,
    fuzz,
    hello,
    metric,
    send_raw,
    wait_for,
)
from tests.conftest import Server, running_server


@pytest.fixture
def http(echo_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=echo_server.url, timeout=30) as client:
        yield client


def test_the_official_client_chats(echo_server: Server) -> None:
    client = OpenAI(base_url=echo_server.url + "/v1", api_key="none")
    messages: Any = [{"role": "user", "content": "one two three"}]
    whole = client.chat.completions.create(model="echo", messages=messages)
    assert whole.choices[0].message.content == "one two three"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 3)
    streamed = list(
        client.chat.completions.create(
            model="echo", messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    assert streamed[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in streamed if c.choices)
    assert text == "one two three"
    assert streamed[-2].choices[0].finish_reason == "stop"
    assert streamed[-1].usage == whole.usage
    assert [model.id for model in client.models.list()] == ["echo"]


def test_the_official_client_completes(echo_server: Server) -> None:
    client = OpenAI(base_url=echo_server.url + "/v1", api_key="none")
    whole = client.completions.create(model="echo", prompt="one two three", max_tokens=2)
    assert whole.choices[0].text == "one two"
    assert whole.choices[0].finish_reason == "length"
    stream = client.completions.create(model="echo", prompt=[5, 6, 7], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "5 6 7"


def test_text_survives_the_stream_byte_for_byte(http: httpx.Client) -> None:
    text = 'quote" back\\slash 你好 🐴 \x07 </script> \u2028'.strip()
    whole = http.post(CHAT, json=hello(text)).json()["choices"][0]["message"]["content"]
    streamed = events(http.post(CHAT, json=hello(text, stream=True)))
    assert whole == " ".join(text.split())
    assert "".join(event["choices"][0]["delta"]["content"] for event in streamed) == whole


def test_usage_is_null_until_the_last_event(http: httpx.Client) -> None:
    body = hello(stream=True, stream_options={"include_usage": True})
    *early, last = events(http.post(CHAT, json=body))
    assert all(event["usage"] is None for event in early)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 6
    assert all("usage" not in event for event in events(http.post(CHAT, json=hello(stream=True))))


BAD: dict[str, tuple[str, bytes | dict[str, Any], int, str, str]] = {
    "malformed JSON": (CHAT, b"{", 400, "invalid", "not valid JSON"),
    "not UTF-8": (CHAT, b'{"model": "\xff"}', 400, "invalid", "UTF-8"),
    "half a surrogate pair": (CHAT, b'{"model": "\\ud800"}', 400, "invalid", "UTF-8"),
    "deep nesting": (CHAT, b"[" * 100_000, 400, "invalid", "nested too deeply"),
    "not an object": (TEXT, b"[]", 400, "invalid", "must be a JSON object"),
    "surrogate bytes": (TEXT, b'{"model": "\xed\xa0\x80"}', 400, "invalid", "UTF-8"),
    "no messages": (CHAT, {"model": "echo"}, 400, "invalid", "messages"),
    "bad max_tokens": (CHAT, hello(max_tokens=0), 400, "invalid", "max_tokens=0"),
    "unsupported field": (CHAT, hello(best_of=4), 400, "invalid", "best_of: not supported here"),
    "unknown model": (CHAT, {**hello(), "model": "x"}, 404, "unknown_model", "no model 'x'"),
    "too long": (TEXT, {"model": "echo", "prompt": "w " * 3000}, 400, "invalid",
                 "maximum context length is 2048 tokens"),
    "too large": (TEXT, b" " * 5_000_000, 413, "too_large", "limit of 4194304"),
    "engine gone": (CHAT, hello("!dead"), 503, "unavailable", "asked to fail"),
    "a bug": (CHAT, hello("!bug"), 500, "internal", "request id"),
    "unknown path": ("/v1/nothing", {}, 404, "not_found", "not found"),
}  # fmt: skip


OPENAIS_CODES = {
    "too long": "context_length_exceeded",
    "unknown model": "model_not_found",
    "engine gone": "service_unavailable",
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_request_gets_openais_error_shape(
    http: httpx.Client, fault: str, stream: bool
) -> None:
    path, body, status, kind, message = BAD[fault]
    if isinstance(body, dict):
        body = json.dumps({**body, "stream": True} if stream else body).encode()
    response = http.post(path, content=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "kind"}
    assert error["kind"] == kind
    assert error["code"] == OPENAIS_CODES.get(fault)
    assert message in error["message"]
    assert ("retry-after" in response.headers) == (status == 503)
    assert http.post(CHAT, json=hello()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_had_no_effect_is_told(http: httpx.Client, stream: bool) -> None:
    body = hello(stream=stream, max_tokens=9000, temprature=1, user="ada", prediction=None)
    before = metric(http, 'packhorse_ignored_fields_total{field="user"}')
    response = http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["x-packhorse-ignored"] == "temprature, user"
    assert response.headers["x-packhorse-max-tokens"] == "2045", "what the prompt leaves"
    assert metric(http, 'packhorse_ignored_fields_total{field="user"}') == before + 1
    plain = http.post(CHAT, json=hello(stream=stream, max_tokens=9)).headers
    assert not {"x-packhorse-ignored", "x-packhorse-max-tokens"} & set(plain)


def test_tokenize_tells_it_too(http: httpx.Client) -> None:
    response = http.post("/tokenize", json={"prompt": "a b", "unheard_of": 1})
    assert response.json()["count"] == 2
    assert response.headers["x-packhorse-ignored"] == "unheard_of"


def test_an_error_after_the_first_byte_is_the_last_event(http: httpx.Client) -> None:
    *found, last = events(http.post(CHAT, json=hello("!dead-later", stream=True)))
    assert last["error"]["kind"] == "unavailable"
    deltas = [event["choices"][0]["delta"] for event in found]
    assert ["role" in delta for delta in deltas] == [True, False], "it begins once"
    *_, last = events(http.post(CHAT, json=hello("!bug-later", stream=True)))
    assert last["error"]["kind"] == "internal"
    assert http.post(CHAT, json=hello("!bug-later")).status_code == 500


def test_a_wrong_method_is_405(http: httpx.Client) -> None:
    response = http.get(CHAT)
    assert response.status_code == 405
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_two_hundred_malformed_bodies_do_no_harm(http: httpx.Client) -> None:
    fuzz(http, "echo", seed=0)
    assert http.post(CHAT, json=hello()).status_code == 200


def test_a_body_of_a_million_faults_is_refused_quickly(http: httpx.Client) -> None:
    body = json.dumps({"model": "echo", "prompt": [""] * 400_000})
    response = http.post(TEXT, content=body)
    assert response.status_code == 400
    assert "prompt.0" in response.json()["error"]["message"]


def test_a_client_that_leaves_while_uploading_is_no_error(
    http: httpx.Client, echo_server: Server
) -> None:
    name = 'packhorse_requests_total{outcome="cancelled"}'
    before, logged = metric(http, name), len(echo_server.log())
    with socket.create_connection(address_of(echo_server)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"
        )
    wait_for(lambda: metric(http, name) == before + 1)
    assert "Traceback" not in echo_server.log()[logged:]


def test_even_an_unforeseen_error_carries_its_request_id(
    http: httpx.Client, echo_server: Server
) -> None:
    answer = http.post(CHAT, json=hello("!bug"), headers={"x-request-id": "find-me"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "find-me"
    assert "request_id=find-me failed unexpectedly" in echo_server.log()


def test_request_ids_are_kept_when_harmless_and_made_otherwise(http: httpx.Client) -> None:
    kept = http.get("/health/live", headers={"x-request-id": "abc-123"})
    assert kept.headers["x-request-id"] == "abc-123"
    made = http.get("/health/live", headers={"x-request-id": "a b\tc"})
    assert len(made.headers["x-request-id"]) == 32
    answer = http.post(CHAT, json=hello(), headers={"x-request-id": "abc-124"})
    assert answer.json()["id"] == "chatcmpl-abc-124"


def test_prompts_never_reach_the_log(http: httpx.Client, echo_server: Server) -> None:
    assert http.post(CHAT, json=hello("xyzzysecret!")).status_code == 200
    assert http.post(CHAT, json=hello("xyzzysecret!", temperature=9)).status_code == 400
    assert "xyzzysecret" not in echo_server.log()


def test_metrics_count_what_happened(http: httpx.Client) -> None:
    name = 'packhorse_requests_total{outcome="ok"}'
    before = metric(http, name)
    http.post(CHAT, json=hello())
    assert metric(http, name) == before + 1


def test_sigterm_finishes_what_runs_refuses_what_comes_and_exits_0(tmp_path: Path) -> None:
    """What runs is a stream that its client does not read, of more than sockets hold: it ends when
    the test reads it, however slow the machine is.
    """
    word = "w" * 2000
    body = hello(" ".join([word] * 800), stream=True, n=8, temperature=1.0)
    with (
        running_server(tmp_path, "--engine", "echo") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
        socket.create_connection(address_of(server), timeout=60) as connection,
    ):
        send_raw(connection, CHAT, body)
        wait_for(lambda: metric(http, "packhorse_requests_in_flight") == 1)
        server.process.terminate()
        wait_for(lambda: http.get("/health/ready").status_code == 503)
        assert http.get("/health/live").status_code == 200
        late = http.post(CHAT, json=hello())
        assert late.status_code == 503
        assert int(late.headers["retry-after"]) >= 1
        said = b"".join(iter(lambda: connection.recv(2**20), b""))
        assert said.count(word.encode()) == 8 * 800
        assert b"data: [DONE]" in said
        assert server.process.wait(60) == 0


def test_the_drain_ends_after_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKHORSE_ENGINE__ECHO_DELAY_S", "60")
    with running_server(tmp_path, "--engine", "echo", "--drain-timeout-s", "0.2") as server:
        with (
            httpx.Client(base_url=server.url, timeout=60) as http,
            socket.create_connection(address_of(server)) as connection,
        ):
            send_raw(connection, CHAT, hello())
            wait_for(lambda: metric(http, "packhorse_requests_in_flight") == 1)
            assert server.stop(timeout_s=30) == 0
        assert "Aborting the requests that are still running" in server.log()


# The command, and forks of one process that has imported what a start imports.
FORKS = """
import json, os, sys
from packhorse.serve import server as main
from packhorse.serve.cli import app

for line in sys.stdin:
    arguments, log = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
        app(["serve", *arguments])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    pipe, folder = subprocess.PIPE, tmp_path_factory.mktemp("forks")
    wide = {**os.environ, "COLUMNS": "1000"}  # no message is wrapped in the middle
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=pipe, stdout=pipe, text=True, cwd=folder, env=wide
    ) as process:
        yield process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere is not a folder"),
        (("EMPTY",), "has no config.json"),
        (("NO_WEIGHTS",), "has no *.safetensors weights"),
        ((), "Which model?"),
        (("--engine", "magic"), "engine.kind = 'magic'"),
        (("--engine", "echo", "--port", "TAKEN"), "choose another --host or --port"),
        (("--engine", "echo", "--config", "no.yaml"), "no such file"),
        (("--engine", "echo", "--api-keys", "no.yaml"), "no.yaml: cannot be read"),
    ],
)
def test_a_server_that_cannot_start_says_why_and_exits_2(
    forks: subprocess.Popen[str],
    echo_server: Server,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no-weights").mkdir()
    (tmp_path / "no-weights/config.json").write_text("{}")
    places = {
        "EMPTY": str(tmp_path / "empty"), "NO_WEIGHTS": str(tmp_path / "no-weights"),
        "TAKEN": str(address_of(echo_server)[1]),
    }  # fmt: skip
    assert forks.stdin is not None
    assert forks.stdout is not None
    log = tmp_path / "log"
    given = [places.get(word, word) for word in arguments]
    print(json.dumps([given, str(log)]), file=forks.stdin, flush=True)
    code, said = int(forks.stdout.readline()), log.read_text(encoding="utf-8")
    assert code == 2, said
    assert message in said
    assert "Traceback" not in said


def test_the_command_itself_exits_2(run_command: Any) -> None:
    result = run_command("packhorse", "serve")
    assert (result.returncode, "Which model?" in result.stderr) == (2, True), result.stderr


DYING = """
from packhorse.serve import engine_builder, server as main
from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.errors import EngineDied
from packhorse.serve.settings.engine import EngineSettings
from packhorse.serve.settings.http import HttpSettings
from packhorse.serve.settings.supervisor import SupervisorSettings
from packhorse.serve.settings import Settings

class Dying(EchoEngine):
    async def check(self):
        raise EngineDied("The engine has stopped.", retry_after_s=1)

engine_builder.ENGINES["echo"] = lambda model, name, settings, metrics: Dying(settings)
main.run(
    Settings(
        engine=EngineSettings(kind="echo"),
        http=HttpSettings(port=0),
        supervisor=SupervisorSettings(max_restarts=2, backoff_s=0),
    )
)
"""


def test_a_server_whose_engine_keeps_dying_exits_1(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DYING]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1, result.stderr
    assert "failed 3 times within 600 s, above the limit of 2; giving up" in result.stderr
    assert "Traceback" not in result.stderr
