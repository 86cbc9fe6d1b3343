"""Anthropic's API over HTTP on the echo engine, with its official client and its types. That models
call tools is for tests/e2e.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import ModelInfo

from packhorse.serve.messages import Chunk, GenerateRequest, Prompt, Route, ToolCall
from packhorse.serve.settings.auth import AuthSettings
from tests.anthropic_types import (
    COUNT,
    MESSAGES,
    error_of,
    events_of,
    message_of,
    parsed,
    put_together,
    read,
    tokens_of,
)
from tests.client import CHAT, hello
from tests.integration.caching import MARK, caching
from tests.integration.scripted import Scripted
from tests.integration.serving import Held, Served, bearer, serving, until, write_keys
from tests.integration.test_adapters import adapted

GREEDY: dict[str, Any] = {"model": "echo", "max_tokens": 100, "temperature": 0}
TOOL: Any = {"name": "get_weather", "input_schema": {"type": "object"}}
KEYS: dict[str, dict[str, Any]] = {
    "user": {"scopes": ["inference"]},
    "scraper": {"scopes": ["metrics"]},
    "narrow": {"adapters": ["clinic"], "base": False},
    "poor": {"quotas": {"requests_per_minute": 1}},
    "slow": {"quotas": {"max_concurrent": 1}},
}


def asked(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {**GREEDY, "messages": [{"role": "user", "content": text}], **fields}


def by_client(text: str = "one two three", **fields: Any) -> Any:
    """The same for the official client, which has no temperature any more."""
    body = asked(text, **fields)
    temperature = body.pop("temperature")
    return {**body, "extra_body": {"temperature": temperature}}


def client_of(server: Served, **options: Any) -> AsyncAnthropic:
    known: dict[str, Any] = {"api_key": "none", "max_retries": 0, **options}
    return AsyncAnthropic(base_url=server.listeners.url, **known)


class Parsed(Scripted):
    """A scripted answer that a parser of reasoning and tools has read."""

    async def render(self, request: GenerateRequest, route: Route) -> Prompt:
        return replace(await super().render(request, route), is_parsed=True)


SCRIPT = (
    Chunk("", [1], reasoning="Hm, ", cached_tokens=2),
    Chunk("", [2], reasoning="weather."),
    Chunk("One moment.", [3]),
    Chunk("", [4], tool_calls=(ToolCall(0, "", "call_0", "get_weather"),)),
    Chunk("", [5], tool_calls=(ToolCall(0, '{"city": "Nemo'),)),
    Chunk("", [6], tool_calls=(ToolCall(0, 'burg"}'),)),
    Chunk("", [7], tool_calls=(ToolCall(1, "{}", "call_1", "ring"),)),
    Chunk("", [8], "tool_calls", reasoning_tokens=2),
)


async def test_the_official_client_asks_and_streams() -> None:
    messages: Any = [{"role": "user", "content": "a 🐴 says hi"}]
    async with serving() as server, client_of(server) as client:
        kept: Any = {"model": "echo", "max_tokens": 100, "extra_body": {"temperature": 0}}
        message = await client.messages.create(**kept, messages=messages)
        assert [block.type for block in message.content] == ["text"]
        assert message.content[0].text == "a 🐴 says hi"  # type: ignore[union-attr]
        assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", 4)
        async with client.messages.stream(**kept, messages=messages) as stream:
            pieces = [piece async for piece in stream.text_stream]
            final = await stream.get_final_message()
        assert pieces == ["a", " 🐴", " says", " hi"]
        assert final.content[0].text == "a 🐴 says hi"  # type: ignore[union-attr]
        assert final.usage == message.usage
        assert final.stop_reason == message.stop_reason
        counted = await client.messages.count_tokens(model="echo", messages=messages)
        assert counted.input_tokens == message.usage.input_tokens == 4
        follow_up: Any = [*messages, message.to_param(), {"role": "user", "content": "and on"}]
        again = await client.messages.create(**kept, messages=follow_up)
        assert again.content[0].text == "and on"  # type: ignore[union-attr]


async def test_an_answer_and_its_events_fit_the_types() -> None:
    async with serving() as server:
        for text, fields, stop in (
            ("one two three", {}, ("end_turn", None)),
            ("one two three", {"max_tokens": 2}, ("max_tokens", None)),
        ):
            body = asked(text, **fields)
            whole = await server.http.post(MESSAGES, json=body)
            message = message_of(whole)
            assert (message.stop_reason, message.stop_sequence) == stop
            assert message.id == f"msg_{whole.headers['request-id']}"
            streamed = await server.http.post(MESSAGES, json={**body, "stream": True})
            assert streamed.headers["request-id"]
            found, expected = put_together(events_of(streamed)), whole.json()
            assert found.pop("id") != expected.pop("id")
            assert found == expected
        assert tokens_of(await server.http.post(COUNT, json=asked("one two"))) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_and_calls_are_blocks(stream: bool) -> None:
    engine = Parsed(SCRIPT)
    fields: Any = {"tools": [TOOL], "tool_choice": {"type": "any"}, "system": "Be brief."}
    async with serving(engine=engine) as server, client_of(server) as client:
        body = asked("one two three", **fields, stream=stream)
        response = await server.http.post(MESSAGES, json=body)
        if stream:
            found = put_together(events_of(response))
            first = events_of(response)[0].message.usage
            assert (first.input_tokens, first.cache_read_input_tokens) == (3, 2)
        else:
            message_of(response)
            found = response.json()
        thinking, text, *calls = found["content"]
        assert thinking.pop("signature")
        assert thinking == {"type": "thinking", "thinking": "Hm, weather."}
        assert text == {"type": "text", "text": "One moment."}
        weather = {"id": "call_0", "name": "get_weather", "input": {"city": "Nemoburg"}}
        ring = {"id": "call_1", "name": "ring", "input": {}}
        assert calls == [{"type": "tool_use", **weather}, {"type": "tool_use", **ring}]
        assert (found["stop_reason"], found["stop_sequence"]) == ("tool_use", None)
        assert found["usage"] == {
            "input_tokens": 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 2,
            "output_tokens": 8,
            "output_tokens_details": {"thinking_tokens": 2},
        }
        # The client puts the stream together as we did, and hands the answer back whole.
        kept: Any = {"model": "echo", "max_tokens": 9, "tools": [TOOL]}
        messages: Any = [{"role": "user", "content": "hi"}]
        async with client.messages.stream(**kept, messages=messages) as opened:
            final = await opened.get_final_message()
        thought, *rest = (block.model_dump(exclude_none=True) for block in final.content)
        assert thought.pop("signature")
        assert [thought, *rest] == [thinking, text, *calls]
        results = [
            {"type": "tool_result", "tool_use_id": call["id"], "content": "done"} for call in calls
        ]
        turn: Any = [*messages, final.to_param(), {"role": "user", "content": results}]
        await client.messages.create(**kept, messages=turn)
        sent = engine.requests[-1].messages
        assert sent is not None
        assert [each["role"] for each in sent] == ["user", "assistant", "tool", "tool"]
        assert sent[1]["reasoning"] == "Hm, weather."
        assert [call["id"] for call in sent[1]["tool_calls"]] == ["call_0", "call_1"]


async def test_a_stop_sequence_is_told() -> None:
    chunk = Chunk("one", [1], "stop", stop_reason="END")
    for stream in (False, True):
        async with serving(engine=Scripted([chunk])) as server:
            body = asked(stop_sequences=["END"], stream=stream)
            response = await server.http.post(MESSAGES, json=body)
            found = put_together(events_of(response)) if stream else response.json()
        assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "END")


async def test_what_has_no_effect_is_told_and_hints_are_not() -> None:
    hint = {"cache_control": {"type": "ephemeral"}}
    fields: Any = {
        "system": [{"type": "text", "text": "s", **hint}],
        "metadata": {"user_id": "u"},
        "context_management": {"edits": []},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "tools": [{"type": "web_search_20250305", "name": "web_search"}],
    }
    names = {
        "metadata", "context_management", "thinking.budget_tokens", "tools.web_search_20250305",
    }  # fmt: skip
    async with serving() as server:
        for path, stream in ((MESSAGES, False), (MESSAGES, True), (COUNT, False)):
            response = await server.http.post(
                f"{path}?beta=true",
                json=asked(**fields, **hint, stream=stream),
                headers={"anthropic-beta": "x,y", "anthropic-version": "2023-06-01"},
            )
            assert response.status_code == 200, response.text
            assert set(response.headers["x-packhorse-ignored"].split(", ")) == names


ERRORS: list[tuple[dict[str, Any], type[anthropic.APIStatusError], str]] = [
    ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error"),
    ({"model": "other"}, anthropic.NotFoundError, "not_found_error"),
    ({"messages": [{"role": "user", "content": "x " * 2100}]}, anthropic.BadRequestError,
     "invalid_request_error"),
    ({"messages": [{"role": "user", "content": "x " * 40000}]}, anthropic.ContentTooLargeError,
     "request_too_large"),
    ({"messages": [{"role": "user", "content": "!dead"}]}, anthropic.ServiceUnavailableError,
     "overloaded_error"),
    ({"messages": [{"role": "user", "content": "!bug"}]}, anthropic.InternalServerError,
     "api_error"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "kind", "word"), ERRORS, ids=[each[2] for each in ERRORS])
async def test_errors_are_the_clients_own(
    fields: dict[str, Any], kind: type[anthropic.APIStatusError], word: str
) -> None:
    async with serving(http={"max_body_bytes": 70_000}) as server, client_of(server) as client:
        body = {**asked(), **fields}
        with pytest.raises(kind) as caught:
            await client.messages.create(**by_client(**fields))
        assert caught.value.type == word
        response = await server.http.post(MESSAGES, json=body)
        assert response.status_code == caught.value.status_code
        assert caught.value.request_id
        found = error_of(response)
        assert found.message
        if "x x x" in str(fields) and response.status_code == 400:
            assert "prompt is too long" in found.message


async def test_what_the_framework_answers_has_the_form_too() -> None:
    async with serving() as server:
        for method, path, status, word in (
            ("GET", MESSAGES, 405, "invalid_request_error"),
            ("POST", f"{MESSAGES}/batches", 404, "not_found_error"),
            ("DELETE", f"{COUNT}/", 405, "invalid_request_error"),
        ):
            response = await server.http.request(method, path)
            assert response.status_code == status
            assert error_of(response).type == word
        for content in (b"{", b"[1]", b"\xff", b'"x"'):
            response = await server.http.post(MESSAGES, content=content)
            assert (response.status_code, error_of(response).type) == (400, "invalid_request_error")
        odd = await server.http.post(MESSAGES, content=b"{}", headers={"content-encoding": "zzz"})
        assert (odd.status_code, error_of(odd).type) == (415, "invalid_request_error")
        # Other paths keep OpenAI's, those that only resemble it too.
        for path in (CHAT, "/v1/messages2", "/v1/messagesx/count_tokens"):
            assert "kind" in (await server.http.post(path, json={})).json()["error"]


async def test_keys_and_scopes(tmp_path: Path) -> None:
    async with serving(keys=write_keys(tmp_path / "keys.yaml", **KEYS)) as server:
        for key, status, word in (
            (None, 401, "authentication_error"),
            ("nobody", 401, "authentication_error"),
            ("scraper", 403, "permission_error"),
            ("user", 200, ""),
        ):
            as_api_key = {} if key is None else {"x-api-key": f"key-{key}"}
            as_bearer = {} if key is None else bearer(key)
            for path in (MESSAGES, COUNT):
                for headers in (as_api_key, as_bearer):
                    response = await server.http.post(path, json=asked(), headers=headers)
                    assert response.status_code == status, (key, response.text)
                    if word:
                        assert error_of(response).type == word
        # Authorization counts where both are there, as Claude Code may send both.
        both = {"x-api-key": "key-nobody", **bearer("user")}
        assert (await server.http.post(MESSAGES, json=asked(), headers=both)).status_code == 200
        async with client_of(server, api_key="key-nobody") as client:
            with pytest.raises(anthropic.AuthenticationError):
                await client.messages.create(**by_client())
        async with client_of(server, api_key="key-scraper") as client:
            with pytest.raises(anthropic.PermissionDeniedError):
                await client.messages.create(**by_client())
        async with client_of(server, api_key=None, auth_token="key-user") as client:
            await client.messages.create(**by_client())


async def test_a_spent_quota_is_429_and_a_full_server_529(tmp_path: Path) -> None:
    engine = Held()
    keys: AuthSettings = write_keys(tmp_path / "keys.yaml", **KEYS)
    async with serving(keys=keys, engine=engine, limits={"max_in_flight": 2}) as server:

        async def post(key: str) -> httpx.Response:
            return await server.http.post(MESSAGES, json=asked(), headers=bearer(key))

        slow = asyncio.create_task(post("slow"))
        await until(lambda: engine.held == 1)
        spent = await post("slow")
        assert (spent.status_code, error_of(spent).type) == (429, "rate_limit_error")
        assert int(spent.headers["retry-after"]) >= 1
        user = asyncio.create_task(post("user"))
        await until(lambda: engine.held == 2)
        full = await post("user")
        assert (full.status_code, error_of(full).type) == (529, "overloaded_error")
        assert int(full.headers["retry-after"]) >= 1
        assert "x-should-retry" not in full.headers
        chat = await server.http.post(CHAT, json=hello(), headers=bearer("user"))
        assert chat.status_code == 429, "OpenAI's word for it"
        async with client_of(server, api_key="key-user") as client:
            with pytest.raises(anthropic.OverloadedError):
                await client.messages.create(**by_client())
        engine.go.set()
        assert [r.status_code for r in await asyncio.gather(slow, user)] == [200, 200]
        assert (await post("poor")).status_code == 200
        async with client_of(server, api_key="key-poor") as client:
            with pytest.raises(anthropic.RateLimitError):
                await client.messages.create(**by_client())


async def test_messages_and_chats_share_kept_answers() -> None:
    chat = {**GREEDY, "messages": [{"role": "user", "content": "one two three"}]}
    async with caching() as served:
        first = await served.http.post(CHAT, json=chat)
        second = await served.http.post(MESSAGES, json=asked())
        third = await served.http.post(MESSAGES, json=asked(stream=True))
        fresh = await served.http.post(MESSAGES, json=asked(cache={"mode": "off"}))
        other = await served.http.post(MESSAGES, json=asked("four"))
        again = await served.http.post(CHAT, json={**chat, "messages": asked("four")["messages"]})
    marks = [r.headers[MARK] for r in (first, second, third, fresh, other, again)]
    assert marks == ["miss", "hit", "hit", "bypass", "miss", "hit"]
    assert message_of(second).content[0].text == "one two three"  # type: ignore[union-attr]
    found = put_together(events_of(third))
    assert found["content"] == second.json()["content"] == fresh.json()["content"]
    usage = first.json()["usage"]
    assert found["usage"]["output_tokens"] == usage["completion_tokens"]


async def test_the_text_chooses_the_adapter(tmp_path: Path) -> None:
    async with adapted(tmp_path) as served:
        for stream in (False, True):
            body = asked("which dose?", model="auto", stream=stream)
            answer = await served.http.post(MESSAGES, json=body, headers=bearer("all"))
            assert answer.headers["x-packhorse-model"] == "clinic"
            found = put_together(events_of(answer)) if stream else answer.json()
            assert found["model"] == "clinic"
        named = asked("hi", model="code")
        refused = await served.http.post(MESSAGES, json=named, headers=bearer("narrow"))
        assert (refused.status_code, error_of(refused).type) == (403, "permission_error")
        async with client_of(served, api_key="key-all") as client:
            models = [model async for model in client.models.list(limit=3)]
            assert [model.id for model in models] == ["echo", "auto", "clinic", "code"]
            assert (await client.models.retrieve("clinic")).display_name == "clinic"
            with pytest.raises(anthropic.NotFoundError):
                await client.models.retrieve("no-such")
        headers = {**bearer("all"), "anthropic-version": "2023-06-01"}
        for query, names, more in (
            ("", ["echo", "auto", "clinic", "code"], False),
            ("?limit=2", ["echo", "auto"], True),
            ("?limit=2&after_id=auto", ["clinic", "code"], False),
            ("?limit=1&before_id=clinic", ["auto"], True),
            ("?after_id=code", [], False),
        ):
            page = (await served.http.get(f"/v1/models{query}", headers=headers)).json()
            assert [read(ModelInfo, model).id for model in page["data"]] == names
            assert page["has_more"] is more
            ends = (names[0], names[-1]) if names else (None, None)
            assert (page["first_id"], page["last_id"]) == ends
        bad = await served.http.get("/v1/models?limit=0", headers=headers)
        assert (bad.status_code, error_of(bad).type) == (400, "invalid_request_error")
        plain = (await served.http.get("/v1/models?limit=1", headers=bearer("all"))).json()
        assert [card["object"] for card in plain["data"]] == ["model"] * 4


async def test_a_long_wait_is_told_with_pings() -> None:
    engine = Held()
    async with serving(engine=engine, http={"heartbeat_s": 0.05}) as server:
        body = asked(stream=True)
        async with server.http.stream("POST", MESSAGES, json=body) as response:
            lines = response.aiter_lines()
            ping = ["event: ping", 'data: {"type": "ping"}', ""]
            assert [await anext(lines) for _ in range(6)] == ping * 2
            engine.go.set()
            rest = "\n".join([line async for line in lines])
        assert put_together(parsed(rest + "\n"))["stop_reason"] == "end_turn"
        async with client_of(server) as client, client.messages.stream(**by_client()) as stream:
            assert await stream.get_final_text() == "one two three"


@asynccontextmanager
async def streaming(text: str, **options: Any) -> AsyncIterator[httpx.Response]:
    async with serving(**options) as server:
        yield await server.http.post(MESSAGES, json=asked(text, stream=True))


async def test_an_error_midway_is_the_last_event() -> None:
    async with streaming("!dead-later") as response:
        *_, last = events_of(response)
        assert last["error"]["type"] == "overloaded_error"
        assert last["request_id"] == response.headers["request-id"]
    async with streaming("!dead") as response:
        assert response.status_code == 503, "before the first byte it is a status"
    async with serving() as server, client_of(server) as client:
        with pytest.raises(anthropic.APIStatusError):
            async with client.messages.stream(**by_client("!bug-later")) as stream:
                await stream.get_final_message()


def fuzzed(count: int) -> list[bytes]:
    """Good bodies with one or two fields changed somewhere in them, or with bytes flipped."""
    rng = random.Random(0)
    values: list[Any] = [
        None, True, -1, 0, 1, 10**30, 1e308, 0.5, "", "x", [], {}, [[]], [None], {"a": {"b": []}},
        "\x00", "🐴" * 50, ["a", "b"], {"type": "text"}, [{"type": "text", "text": "x"}],
        {"type": "tool", "name": "f"}, {"type": "enabled"}, [{"role": "assistant", "content": ""}],
        "[" * 5000,
    ]  # fmt: skip
    good: dict[str, Any] = {
        **GREEDY,
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x"}, {
                "type": "document", "source": {"type": "text", "data": "d"}, "title": "t"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "tool_use", "id": "1", "name": "f", "input": {"a": [1]}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [
                {"type": "text", "text": "r"}], "is_error": True}, {"type": "text", "text": "y"}]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "none"},
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {}}},
        "stop_sequences": ["z"], "metadata": {"user_id": "u"}, "stream": False, "top_k": 3,
    }  # fmt: skip
    bodies = []
    for _ in range(count):
        body = json.loads(json.dumps(good))
        for _ in range(rng.choice([1, 1, 2])):
            place: Any = body
            while True:
                key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
                if not (isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8):
                    break
                place = place[key]
            place[key] = rng.choice(values)
        raw = bytearray(json.dumps(body).encode())
        if rng.random() < 0.2:
            for _ in range(rng.randint(1, 3)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
        bodies.append(bytes(raw))
    return bodies


async def test_five_hundred_malformed_bodies_do_no_harm() -> None:
    statuses = []
    async with serving() as server:
        for number, body in enumerate(fuzzed(500)):
            for path in (MESSAGES, COUNT)[: 1 if number % 5 else 2]:
                response = await server.http.post(path, content=body)
                statuses.append(response.status_code)
                assert response.status_code < 500, (path, body, response.text)
                if response.status_code >= 400:
                    assert error_of(response).message
        deep = b'{"a":' * 400 + b"1" + b"}" * 400
        for content in (
            b'{"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "x": %s}' % deep,
            b'{"max_tokens": 1, "messages": [{"role": "user", "content": [%s]}]}' % deep,
            b'{"max_tokens": 1, "messages": [{"role": "user", "content": "\\ud83d"}]}',
        ):
            assert (await server.http.post(MESSAGES, content=content)).status_code in (200, 400)
    assert statuses.count(200) >= 50
    assert statuses.count(400) >= 300
