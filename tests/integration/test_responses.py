"""The Responses API over HTTP, with the official client; every answer and every event is checked
against its types. The real engine's turn is in tests/e2e/test_responses.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from packhorse.serve.app import create
from packhorse.serve.cache.response_store import MemoryResponses
from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.errors import EngineDied, Overloaded
from packhorse.serve.messages import Caller, Chunk
from packhorse.serve.settings import Settings
from packhorse.serve.settings.engine import EngineSettings
from packhorse.serve.settings.responses import ResponsesSettings
from tests import openai_types
from tests.client import request_lines
from tests.integration.caching import MARK, caching
from tests.integration.scripted import (
    Script,
    Scripted,
    call,
    logprob,
    text,
    thought,
)
from tests.integration.serving import (
    Held,
    Served,
    bearer,
    nothing_left,
    serving,
    until,
    write_keys,
)
from tests.integration.test_adapters import adapted

URL = "/v1/responses"
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": True},
    {"type": "custom", "name": "run", "description": "Runs a program."},
    {
        "type": "namespace",
        "name": "files",
        "description": "Files.",
        "tools": [{"type": "function", "name": "read", "parameters": {"type": "object"}}],
    },
]
SCRIPTS: dict[str, tuple[Script, list[tuple[str, str]], str]] = {
    "text": (text("one", " two", " three"), [("message", "one two three")], "completed"),
    "cut text": (
        text("one", " two", reason="length"),
        [("message", "one two")],
        "incomplete",
    ),
    "nothing": (text(""), [("message", "")], "completed"),
    "reasoning and text": (
        [*thought("hm", ", so"), *text("yes", "!")],
        [("reasoning", "hm, so"), ("message", "yes!")],
        "completed",
    ),
    "reasoning that is cut": (
        [*thought("hm"), Chunk("", (1,), "length", reasoning=", so")],
        [("reasoning", "hm, so")],
        "incomplete",
    ),
    "a call": (
        call("get_weather", '{"city": ', '"Nemoburg"}', reason="tool_calls"),
        [("function_call", '{"city": "Nemoburg"}')],
        "completed",
    ),
    "text, then two calls": (
        [
            Chunk("Let me", (1,)),
            Chunk(" see.", (2,)),
            *call("get_weather", "{}"),
            *call("files__read", '{"a": 1}', index=1, reason="tool_calls"),
        ],
        [("message", "Let me see."), ("function_call", "{}"), ("function_call", '{"a": 1}')],
        "completed",
    ),
    "a custom call": (
        call("run", '{"input": "ls \\', 'n-l \\"é\\""}', reason="tool_calls"),
        [("custom_tool_call", 'ls \n-l "é"')],
        "completed",
    ),
    "a custom call that is cut": (
        call("run", '{"input": "ls \\u00', reason="length"),
        [("custom_tool_call", "ls ")],
        "incomplete",
    ),
    "a call that is cut": (
        call("get_weather", '{"city', reason="length"),
        [("function_call", '{"city')],
        "incomplete",
    ),
    "a call of a tool that was not offered": (
        call("other", "{}", reason="tool_calls"),
        [("function_call", "{}")],
        "completed",
    ),
}
PLACES = {
    "message": lambda item: item["content"][0]["text"],
    "reasoning": lambda item: item["content"][0]["text"],
    "function_call": lambda item: item["arguments"],
    "custom_tool_call": lambda item: item["input"],
}


def hello(said: Any = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "input": said, **fields}


def outputs(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [(item["type"], PLACES[item["type"]](item)) for item in document["output"]]


def client_of(served: Served, key: str = "none") -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{served.listeners.url}/v1", api_key=key, max_retries=0)


async def created(served: Served, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    response = await served.http.post(URL, json=body, headers=headers)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    openai_types.response(document)
    return document


async def streamed(served: Served, body: dict[str, Any], **headers: str) -> list[Any]:
    response = await served.http.post(URL, json={**body, "stream": True}, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return openai_types.stream_events(response.text)


async def test_a_whole_answer_and_its_stream_say_the_same() -> None:
    engine = Scripted()
    async with serving(engine=engine) as served:
        for name, (script, expected, status) in SCRIPTS.items():
            engine.script = list(script)
            whole = await created(served, hello(tools=TOOLS))
            events = await streamed(served, hello(tools=TOOLS))
            kept = (await served.http.get(f"{URL}/{events[-1].response.id}")).json()
            check_same(whole, events, kept, expected, status)
            assert outputs(kept) == expected, name


def check_same(
    whole: dict[str, Any],
    events: list[Any],
    kept: dict[str, Any],
    expected: list[tuple[str, str]],
    status: str,
) -> None:
    """A whole answer, a stream's events, and what was kept of that."""
    last = json.loads(events[-1].model_dump_json())["response"]
    assert outputs(whole) == expected
    assert whole["status"] == status
    reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
    assert whole["incomplete_details"] == reason
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0].response.status == "in_progress"
    assert events[0].response.output == []
    assert events[-1].type == f"response.{status}"
    assert kept["status"] == status
    rebuilt = openai_types.rebuilt(events)
    assert [(item["type"], item["text"]) for item in rebuilt] == expected
    assert [item["done"] for item in rebuilt] == [
        item.model_dump(exclude_none=True) for item in events[-1].response.output
    ]
    for event in events:
        if hasattr(event, "response"):
            assert event.response.id == kept["id"]
    assert whole["usage"]["output_tokens"] == last["usage"]["output_tokens"]
    ids = [item["id"] for item in kept["output"]]
    assert len(set(ids)) == len(ids)


async def test_calls_say_which_tool_they_mean() -> None:
    script = SCRIPTS["text, then two calls"][0]
    async with serving(engine=Scripted(script)) as served:
        whole = await created(served, hello(tools=TOOLS))
    _, first, second = whole["output"]
    assert (first["name"], first["call_id"], first.get("namespace")) == (
        "get_weather", "call_0", None,
    )  # fmt: skip
    assert (second["name"], second["call_id"], second["namespace"]) == ("read", "call_1", "files")


async def test_logprobs_come_where_they_are_asked_for() -> None:
    script: Script = [
        Chunk("one", (1,), logprobs=(logprob("one"),)),
        Chunk("", (2,), logprobs=(logprob(" tw"),)),  # half a character, for instance
        Chunk(" two", (3,), "stop", logprobs=(logprob("o"),)),
    ]
    asked = hello(include=["message.output_text.logprobs"], top_logprobs=2)
    async with serving(engine=Scripted(script)) as served:
        whole = await created(served, asked)
        events = await streamed(served, asked)
        plain = await created(served, hello())
    (part,) = whole["output"][0]["content"]
    assert [entry["token"] for entry in part["logprobs"]] == ["one", " tw", "o"]
    assert [len(entry["top_logprobs"]) for entry in part["logprobs"]] == [2, 2, 2]
    assert part["logprobs"][0]["bytes"] == [111, 110, 101]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [[entry.token for entry in event.logprobs] for event in deltas] == [
        ["one"], [" tw", "o"],
    ]  # fmt: skip
    assert len(events[-1].response.output[0].content[0].logprobs) == 3
    assert plain["output"][0]["content"][0]["logprobs"] == []


@pytest.mark.parametrize("with_text", [True, False])
async def test_a_stream_that_fails_midway_says_so(with_text: bool) -> None:
    script: Script = [Chunk("one", (1,))] if with_text else []
    failing: Script = [*script, EngineDied("The engine died.")]
    async with serving(engine=Scripted(failing), http={"heartbeat_s": 0.01}) as served:
        if not with_text:
            served.engine.pause_s = 0.1  # type: ignore[attr-defined]
            served.engine.script = [Chunk("", (1,)), *failing]  # type: ignore[attr-defined]
        events = await streamed(served, hello())
        kept = (await served.http.get(f"{URL}/{events[0].response.id}")).json()
        await until(nothing_left(served))
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert "died" in events[-2].message
    failed = events[-1].response
    assert failed.status == kept["status"] == "failed"
    assert failed.error.code == "server_error"
    if with_text:
        assert failed.output[0].content[0].text == "one"
        assert failed.output[0].status == "incomplete"


async def test_a_start_that_fails_late_begins_and_fails() -> None:
    """The answer has begun, with a heartbeat, when the engine refuses."""

    class Late(EchoEngine):
        async def render(self, request: Any, route: Any) -> Any:
            await asyncio.sleep(0.2)
            raise EngineDied("The engine died.")

    engine = Late(EngineSettings(kind="echo"))
    async with serving(engine=engine, http={"heartbeat_s": 0.02}) as served:
        events = await streamed(served, hello())
    kinds = ["response.created", "response.in_progress", "error", "response.failed"]
    assert [event.type for event in events] == kinds


async def test_a_refusal_before_the_first_byte_is_a_status() -> None:
    async with serving() as served:
        for stream in (True, False):
            body = hello("one " * 3000, stream=stream)
            response = await served.http.post(URL, json=body)
            assert response.status_code == 400
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", "input")


# The official client


class City(BaseModel):
    size: int
    coastal: bool


async def test_the_official_client_creates_streams_and_parses() -> None:
    said = '{"size": 2, "coastal": true}'
    async with serving() as served, client_of(served) as client:
        whole = await client.responses.create(**hello(said))
        assert whole.output_text == said
        parts = await client.responses.create(**hello(said), stream=True)
        deltas = [e.delta async for e in parts if e.type == "response.output_text.delta"]
        assert "".join(deltas) == said
        async with client.responses.stream(**hello(said), text_format=City) as stream:
            kinds = {event.type async for event in stream}
            final = await stream.get_final_response()
        assert final.output_parsed == City(size=2, coastal=True)
        assert {"response.output_text.delta", "response.completed"} <= kinds
        parsed = await client.responses.parse(**hello(said), text_format=City)
        assert parsed.output_parsed == City(size=2, coastal=True)
        assert parsed.text is not None


async def test_the_official_client_runs_a_tool() -> None:
    script = call("get_weather", '{"city": "Nemoburg"}', reason="tool_calls")
    engine = Scripted(script)
    async with serving(engine=engine) as served, client_of(served) as client:
        asked: Any = [{"role": "user", "content": "What is the weather?"}]
        tools: Any = TOOLS[:1]
        async with client.responses.stream(model="echo", input=asked, tools=tools) as stream:
            async for event in stream:
                if event.type == "response.function_call_arguments.delta":
                    assert event.snapshot
            first = await stream.get_final_response()
        (called,) = first.output
        assert called.type == "function_call"
        assert json.loads(called.arguments) == {"city": "Nemoburg"}
        output = {"type": "function_call_output", "call_id": called.call_id, "output": "clear"}
        engine.script = text("Clear", ".")
        # As the client's documentation says, as programs dump it, and by its id.
        for history in (
            {"input": [*asked, *first.output, output]},
            {"input": [*asked, *(item.model_dump() for item in first.output), output]},
            {"input": [output], "previous_response_id": first.id},
            {"input": [*asked, {"type": "item_reference", "id": called.id}, output]},
            {"input": [*asked, {"id": called.id}, output]},
        ):
            fields: Any = history
            answer = await client.responses.create(model="echo", tools=tools, **fields)
            assert answer.output_text == "Clear."
            messages = engine.requests[-1].messages or ()
            assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
            assert messages[1]["tool_calls"][0]["function"] == {
                "name": "get_weather",
                "arguments": '{"city": "Nemoburg"}',
            }
            assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] == "call_0"
            assert messages[2]["content"] == "clear"


async def test_errors_are_of_the_clients_types() -> None:
    async with serving() as served, client_of(served) as client:
        with pytest.raises(openai.BadRequestError, match="temperature") as bad:
            await client.responses.create(**hello(temperature=9))
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.responses.create(**hello(), previous_response_id="resp_" + "0" * 32)
        assert missing.value.code == "previous_response_not_found"
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve("resp_" + "0" * 32)
        with pytest.raises(openai.BadRequestError, match="stream"):
            await client.responses.retrieve("resp_" + "0" * 32, stream=True)


# What is kept


async def test_a_chain_of_responses_is_one_conversation() -> None:
    engine = Scripted(text("first"))
    async with serving(engine=engine) as served, client_of(served) as client:
        one = await client.responses.create(**hello("one", instructions="Be brief."))
        engine.script = text("second")
        two = await client.responses.create(**hello("two", previous_response_id=one.id))
        engine.script = text("third")
        await client.responses.create(**hello("three", previous_response_id=two.id))
        assert [(m["role"], m["content"]) for m in engine.requests[-1].messages or ()] == [
            ("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second"),
            ("user", "three"),
        ]  # fmt: skip
        assert two.previous_response_id == one.id
        listed = [item async for item in client.responses.input_items.list(two.id, order="asc")]
        said = [item.content[0].text for item in listed]  # type: ignore[union-attr]
        assert said == ["one", "first", "two"]
        back = [item.id async for item in client.responses.input_items.list(two.id, limit=1)]
        assert back == [item.id for item in reversed(listed)]
        document = (await served.http.get(f"{URL}/{two.id}/input_items?limit=2")).json()
        openai_types.item_list(document)
        assert document["has_more"]
        await client.responses.delete(one.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(one.id)
        assert (await client.responses.retrieve(two.id)).output_text == "second"


async def test_every_kind_of_item_is_listed_in_its_form() -> None:
    items: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {"role": "assistant", "content": "two"},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "b"},
        {"type": "custom_tool_call", "call_id": "c", "name": "run", "input": "ls"},
        {
            "type": "custom_tool_call_output",
            "call_id": "c",
            "output": [{"type": "input_text", "text": "d"}],
        },
        {"role": "user", "content": "three"},
    ]
    async with serving() as served:
        made = await created(served, hello(items))
        document = (await served.http.get(f"{URL}/{made['id']}/input_items?order=asc")).json()
        openai_types.item_list(document)
        again = await served.http.post(URL, json=hello(document["data"]))
        assert again.status_code == 200, again.text
    kinds = [item.get("type", "message") for item in items]
    assert [item["type"] for item in document["data"]] == kinds
    assert document["data"][2]["id"] == "rs_1"


@pytest.mark.parametrize("bad", ["limit=0", "limit=101", "limit=x", "order=up", "after=no"])
async def test_a_bad_page_is_refused(bad: str) -> None:
    async with serving() as served:
        made = await created(served, hello())
        response = await served.http.get(f"{URL}/{made['id']}/input_items?{bad}")
    assert response.status_code == 400


async def test_what_is_not_to_be_stored_is_not() -> None:
    async with serving() as served:
        made = await created(served, hello(store=False))
        events = await streamed(served, hello(store=False))
        for response_id in (made["id"], events[0].response.id):
            assert (await served.http.get(f"{URL}/{response_id}")).status_code == 404


async def test_a_server_that_keeps_nothing_says_so() -> None:
    none = MemoryResponses(max_entries=0, max_bytes=0, max_entry_bytes=1, ttl_s=60)
    async with serving(kept=none) as served:
        response = await served.http.post(URL, json=hello(store=True))
        assert response.headers["x-packhorse-ignored"] == "store"
        plain = await served.http.post(URL, json=hello())
        assert "x-packhorse-ignored" not in plain.headers
        assert (await served.http.get(f"{URL}/{plain.json()['id']}")).status_code == 404
        refused = await served.http.post(URL, json=hello(background=True))
        assert refused.status_code == 400
        assert "max_kept" in refused.json()["error"]["message"]


async def test_choices_are_repeated_in_their_form() -> None:
    choices: list[Any] = [
        "none",
        {"type": "function", "name": "get_weather"},
        {"type": "custom", "name": "run"},
        {"type": "allowed_tools", "tools": [{"type": "custom", "name": "run"}]},
        {"type": "allowed_tools", "mode": "required", "tools": [{"name": "get_weather"}]},
    ]
    async with serving() as served:
        for choice in choices:
            made = await created(served, hello(tools=TOOLS, tool_choice=choice))
            told = made["tool_choice"]
            if isinstance(choice, dict):
                assert told["type"] == choice["type"]
            else:
                assert told == choice
            assert len(made["tools"]) == 3


async def test_tenants_do_not_find_each_others_responses(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", ann={"tenant": "a"}, amy={"tenant": "a"}, bob={})
    async with serving(keys=keys) as served:
        made = await created(served, hello(), **bearer("ann"))
        url = f"{URL}/{made['id']}"
        assert (await served.http.get(url, headers=bearer("amy"))).status_code == 200
        bob = bearer("bob")
        item = made["output"][0]["id"]
        answers = [
            await served.http.get(url, headers=bob),
            await served.http.get(f"{url}/input_items", headers=bob),
            await served.http.post(f"{url}/cancel", headers=bob),
            await served.http.delete(url, headers=bob),
            await served.http.post(URL, json=hello(previous_response_id=made["id"]), headers=bob),
            await served.http.post(
                URL, json=hello([{"type": "item_reference", "id": item}]), headers=bob
            ),
        ]
        assert [answer.status_code for answer in answers] == [404] * 6
        assert (await served.http.get(url, headers=bearer("amy"))).status_code == 200


async def test_one_item_cannot_be_referred_to_without_end() -> None:
    async with serving() as served:
        made = await created(served, hello("a" * 300_000))
        items = (await served.http.get(f"{URL}/{made['id']}/input_items")).json()["data"]
        again = {"type": "item_reference", "id": items[0]["id"]}
        answer = await served.http.post(URL, json=hello([again] * 40))
        assert answer.status_code == 413, answer.text
        assert "referred to" in answer.json()["error"]["message"]


# The background


async def test_what_could_not_be_kept_is_not_begun() -> None:
    async with serving() as served:
        answer = await served.http.post(URL, json=hello("a" * 4_150_000, background=True))
        assert answer.status_code == 413, answer.text
        assert not served.responses.in_background


async def test_the_background_goes_from_queued_to_completed() -> None:
    engine = Held()
    async with serving(engine=engine) as served, client_of(served) as client:
        made = await client.responses.create(**hello(background=True))
        assert (made.status, made.background) == ("queued", True)
        await until(lambda: engine.held == 1)
        running = await client.responses.retrieve(made.id)
        assert running.status == "in_progress"
        assert served.pipeline.admission.in_flight == 1
        refused = await served.http.post(URL, json=hello(previous_response_id=made.id))
        assert refused.status_code == 400
        engine.go.set()
        await until(nothing_left(served))
        done = (await served.http.get(f"{URL}/{made.id}")).json()
        openai_types.response(done)
        assert (done["status"], outputs(done)) == ("completed", [("message", "one two three")])
        unchanged = await client.responses.cancel(made.id)
        assert unchanged.status == "completed"


async def test_a_response_in_the_background_is_cancelled_or_deleted() -> None:
    engine = Held()
    async with serving(engine=engine) as served, client_of(served) as client:
        ids = [(await client.responses.create(**hello(background=True))).id for _ in range(2)]
        await until(lambda: engine.held == 2)
        cancelled = await client.responses.cancel(ids[0])
        assert cancelled.status == "cancelled"
        assert (await client.responses.cancel(ids[0])).status == "cancelled"
        await client.responses.delete(ids[1])
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(ids[1])
        await until(nothing_left(served))
        engine.go.set()
        plain = await client.responses.create(**hello())
        with pytest.raises(openai.BadRequestError, match="background"):
            await client.responses.cancel(plain.id)


async def test_the_background_waits_for_a_place(tmp_path: Path) -> None:
    """A key that may have one call at a time can still submit several."""
    keys = write_keys(tmp_path / "keys.yaml", ann={"quotas": {"max_concurrent": 1}})
    async with serving(keys=keys) as served, client_of(served, "key-ann") as client:
        made = [await client.responses.create(**hello(background=True)) for _ in range(2)]

        async def status(response_id: str) -> str | None:
            return (await client.responses.retrieve(response_id)).status

        for one in made:
            for _ in range(100):
                if await status(one.id) == "completed":
                    break
                await asyncio.sleep(0.05)
            assert await status(one.id) == "completed"
        assert not served.responses.in_background


async def test_the_backgrounds_time_is_for_waiting_too(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Held()
    engine.go.set()
    async with serving(engine=engine) as served:
        too_long = await served.http.post(URL, json=hello(background=True, timeout_s=999_999))
        assert too_long.status_code == 400
        enter = served.pipeline.enter
        calls = 0

        def busy(caller: Caller, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:  # the first is the call itself
                raise Overloaded("No place.", retry_after_s=0.5)
            return enter(caller, **options)

        monkeypatch.setattr(served.pipeline, "enter", busy)
        await created(served, hello(background=True, timeout_s=3))
        await until(lambda: not served.responses.in_background)
        (left_s,) = engine.timeouts_s
        assert left_s is not None
        assert 0 < left_s <= 2.5


async def test_the_background_is_bounded_and_each_tenant_has_half(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", ann={}, bob={}, cid={})
    engine = Held()
    async with serving(keys=keys, engine=engine, max_background=4) as served:
        codes = []
        for name in ("ann", "ann", "ann", "bob", "bob", "cid"):
            response = await served.http.post(
                URL, json=hello(background=True), headers=bearer(name)
            )
            codes.append(response.status_code)
        assert codes == [200, 200, 429, 200, 200, 429]
        assert int(response.headers["retry-after"]) >= 1
        assert served.metrics.registry.get_sample_value("packhorse_responses_in_background") == 4
        engine.go.set()
        await until(nothing_left(served))


async def test_the_background_fails_with_its_reason() -> None:
    async with serving() as served:
        for said in ("!dead", "!bug"):
            made = await created(served, hello(said, background=True))
            await until(lambda: not served.responses.in_background)
            failed = (await served.http.get(f"{URL}/{made['id']}")).json()
            openai_types.response(failed)
            assert failed["status"] == "failed"
            assert failed["error"]["code"] == "server_error"


async def test_a_server_that_stops_ends_the_background() -> None:
    engine = Held()
    async with serving(engine=engine) as served:
        made = await created(served, hello(background=True))
        await until(lambda: engine.held == 1)
        served.pipeline.stop_admitting()
        late = await served.http.post(URL, json=hello(background=True))
        assert late.status_code == 503
        await served.responses.close()
        failed = (await served.http.get(f"{URL}/{made['id']}")).json()
        assert failed["status"] == "failed"
        assert "stopped" in failed["error"]["message"]
        await until(nothing_left(served))


# What all endpoints have


async def test_keys_scopes_and_quotas_hold(tmp_path: Path) -> None:
    keys = write_keys(
        tmp_path / "keys.yaml",
        ann={}, ops={"scopes": ["metrics"]}, few={"quotas": {"requests_per_minute": 1}},
    )  # fmt: skip
    async with serving(keys=keys) as served:
        assert (await served.http.post(URL, json=hello())).status_code == 401
        wrong = await served.http.post(URL, json=hello(), headers=bearer("ops"))
        assert wrong.status_code == 403
        few = [
            (await served.http.post(URL, json=hello(), headers=bearer("few"))).status_code
            for _ in range(2)
        ]
        assert few == [200, 429]
        for path in (f"{URL}/input_tokens", f"{URL}/resp_1/cancel"):
            assert (await served.http.post(path, json=hello())).status_code == 401
        count = await served.http.post(f"{URL}/input_tokens", json=hello(), headers=bearer("ann"))
        assert openai_types.token_count(count.json()).input_tokens == 3


async def test_a_chat_and_a_response_share_a_kept_answer() -> None:
    async with caching() as served:
        body = {"model": "echo", "temperature": 0}
        chat = {**body, "messages": [{"role": "user", "content": "one two"}]}
        first = await served.http.post("/v1/chat/completions", json=chat)
        second = await served.http.post(URL, json={**body, "input": "one two"})
        third = await served.http.post(URL, json={**body, "input": "one two", "stream": True})
        marks = [response.headers[MARK] for response in (first, second, third)]
        assert marks == ["miss", "hit", "hit"]
        assert second.json()["output"][0]["content"][0]["text"] == "one two"
        assert second.json()["usage"]["output_tokens"] == 2
        events = openai_types.stream_events(third.text)
        assert events[-1].response.output_text == "one two"
        off = await served.http.post(
            URL, json={**body, "input": "one two", "cache": {"mode": "off"}}
        )
        assert off.headers[MARK] == "bypass"


async def test_the_text_chooses_the_adapter(tmp_path: Path) -> None:
    async with adapted(tmp_path) as served:
        for stream in (False, True):
            body = {"model": "auto", "input": "which dose?", "stream": stream}
            answer = await served.http.post(URL, json=body, headers=bearer("all"))
            assert answer.headers["x-packhorse-model"] == "clinic"
            found = answer.json() if not stream else None
            if found is None:
                (*_, last) = openai_types.stream_events(answer.text)
                assert last.response.model == "clinic"
            else:
                assert found["model"] == "clinic"
        named = await served.http.post(
            URL, json={"model": "code", "input": "hi"}, headers=bearer("narrow")
        )
        assert named.status_code == 403


async def test_what_has_no_effect_is_told() -> None:
    body = hello(
        user="x", service_tier="auto", max_tool_calls=3, foo=1,
        include=["reasoning.encrypted_content"], text={"verbosity": "low"},
        reasoning={"summary": "auto"}, tools=[{"type": "web_search", "filters": {}}],
    )  # fmt: skip
    expected = {
        "user", "service_tier", "max_tool_calls", "foo", "include.reasoning.encrypted_content",
        "text.verbosity", "reasoning.summary", "tools.web_search",
    }  # fmt: skip
    async with serving() as served:
        for fields in ({}, {"stream": True}, {"background": True}):
            response = await served.http.post(URL, json={**body, **fields})
            assert response.status_code == 200
            assert set(response.headers["x-packhorse-ignored"].split(", ")) == expected


async def test_truncation_leaves_out_the_oldest_items() -> None:
    long = "word " * 500
    items = [
        {"role": "developer", "content": "Be brief."},
        *({"role": "user", "content": f"{number} {long}"} for number in range(6)),
    ]
    engine = Scripted()
    async with serving(engine=engine) as served:
        refused = await served.http.post(URL, json=hello(items, max_output_tokens=100))
        assert refused.status_code == 400
        asked = hello(items, max_output_tokens=100, truncation="auto")
        response = await served.http.post(URL, json=asked)
        assert response.status_code == 200, response.text
        assert response.headers["x-packhorse-dropped-items"] == "3"
        messages = engine.requests[-1].messages or ()
        starts = [message["content"][:2].strip() for message in messages]
        assert starts == ["Be", "3", "4", "5"]
        kept = await served.http.get(f"{URL}/{response.json()['id']}/input_items")
        assert len(kept.json()["data"]) == 7, "what was said stays, for a larger context"
        hopeless = hello("word " * 5000, truncation="auto")
        assert (await served.http.post(URL, json=hopeless)).status_code == 400


async def test_a_prompt_is_nowhere_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "packhorse")
    async with serving() as served:
        await created(served, hello("verysecretword", instructions="othersecret"))
        await created(served, hello("verysecretword", background=True))
        await until(nothing_left(served))
    assert request_lines(caplog)
    assert "verysecretword" not in caplog.text
    assert "othersecret" not in caplog.text


def bodies(count: int, seed: int = 0) -> list[tuple[str, bytes]]:
    """(path, body) of good requests with one or two fields changed, or with bytes flipped."""
    rng = random.Random(seed)
    values: list[Any] = [
        None, True, -1, 0, 1, 10**30, 1e308, 0.5, "", "x", [], {}, [[]], [None], [1, 2],
        {"a": {"b": []}}, {"type": "x"}, [{"type": "x"}], [{"type": []}], [{"id": 1}],
        [{"role": "user", "content": "\x00"}], [{"role": "user", "content": [{"type": 5}]}],
        [{"type": "function_call"}], [{"type": "reasoning", "summary": "x", "content": [1]}],
        {"type": "allowed_tools", "tools": [5]}, {"format": {"type": "json_schema"}},
        {"effort": 5}, [{"type": "namespace", "name": "n", "tools": [[]]}],
        [{"type": "custom", "name": "c", "format": {"type": "grammar"}}], "resp_" + "0" * 32,
        [{"type": "item_reference", "id": "msg_" + "0" * 32 + "_0"}], "[" * 3000,
        [{"type": "function_call", "name": "f", "arguments": {"a": [1]}}],
        [{"type": "message", "role": "user", "content": [{"type": "input_image"}]}],
    ]  # fmt: skip
    fields = [
        "model", "input", "instructions", "tools", "tool_choice", "text", "reasoning", "include",
        "truncation", "previous_response_id", "store", "background", "metadata", "stream",
        "max_output_tokens", "temperature", "top_p", "top_logprobs", "parallel_tool_calls", "user",
        "service_tier", "stream_options", "conversation", "prompt", "n", "max_tokens", "cache",
        "timeout_s", "chat_template_kwargs", "documents", "structured_outputs", "unheard_of",
    ]  # fmt: skip
    found = []
    for _ in range(count):
        body: dict[str, Any] = {"model": "echo", "input": "one", "max_output_tokens": 4}
        if rng.random() < 0.3:
            body["tools"] = TOOLS
        for _ in range(rng.choice([1, 1, 2])):
            body[rng.choice(fields)] = rng.choice(values)
        raw = bytearray(json.dumps(body).encode())
        if rng.random() < 0.3:
            for _ in range(rng.randint(1, 3)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
        path = URL if rng.random() < 0.8 else f"{URL}/input_tokens"
        found.append((path, bytes(raw)))
    return found


async def test_odd_bodies_are_refused_and_never_the_servers_fault() -> None:
    codes: dict[int, int] = {}
    async with serving() as served:
        for path, raw in bodies(600):
            response = await served.http.post(path, content=raw)
            told = (path, raw, response.text)
            assert response.status_code in (200, 400, 404, 429), told
            codes[response.status_code] = codes.get(response.status_code, 0) + 1
            if response.status_code != 200:
                assert response.json()["error"]["message"], told
            elif response.headers["content-type"].startswith("text/event-stream"):
                openai_types.stream_events(response.text)
            elif path == URL:
                openai_types.response(response.json())
        await until(nothing_left(served))
    assert codes[200] > 60
    assert codes[400] > 200


async def test_a_server_as_an_object_keeps_and_ends_responses() -> None:
    engine = EngineSettings(kind="echo", echo_delay_s=0.2)
    app = create(Settings(engine=engine, responses=ResponsesSettings(max_kept=2)))
    await app.start()
    transport = httpx.ASGITransport(app=app.asgi)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        ids = [(await http.post(URL, json=hello("one"))).json()["id"] for _ in range(3)]
        codes = [(await http.get(f"{URL}/{response_id}")).status_code for response_id in ids]
        assert codes == [404, 200, 200]
        made = (await http.post(URL, json=hello("a b c d e f g h", background=True))).json()
        await until(lambda: app.pipeline.in_flight == 1)
        await app.stop(drain_s=0)
        assert app.pipeline.in_flight == 0
        found = (await http.get(f"{URL}/{made['id']}")).json()
        assert found["status"] == "failed"
