"""/v1/files and /v1/batches, as OpenAI's own client uses them."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch, FileObject
from pydantic import TypeAdapter

from tests.integration.batching import (
    CHAT,
    answers,
    batching,
    chat_line,
    ended,
    jsonl,
    running,
    said,
    submit,
    upload,
)
from tests.integration.serving import until, write_keys

BATCH, FILE = TypeAdapter(Batch), TypeAdapter(FileObject)


def exact(schema: TypeAdapter[Any], document: dict[str, Any]) -> None:
    """The document is of the official type, nothing converted; and has no field besides."""
    schema.validate_python(document, strict=True)
    extra = schema.validate_python(document).model_extra
    assert not extra


async def test_a_batch_from_upload_to_answers(tmp_path: Path) -> None:
    async with batching(tmp_path / "kept") as server:
        client = server.client()
        lines = [chat_line(n) for n in range(20)]
        batch = await submit(client, lines, metadata={"job": "night"})
        assert batch.status == "validating"
        assert batch.metadata == {"job": "night"}
        done = await ended(client, batch)
        assert done.status == "completed"
        assert done.request_counts is not None
        assert done.request_counts.to_dict() == {"total": 20, "completed": 20, "failed": 0}
        assert done.usage is not None
        assert (done.usage.input_tokens, done.usage.output_tokens) == (40, 40)
        assert done.error_file_id is None
        found = await answers(client, done.output_file_id)
        assert {name: said(line) for name, line in found.items()} == {
            f"line-{n}": f"say {n}" for n in range(20)
        }
        line = found["line-3"]
        assert line["response"]["status_code"] == 200
        assert line["id"] == f"batch_req_{line['response']['request_id']}"
        assert line["error"] is None


async def test_what_goes_out_is_of_the_official_types(tmp_path: Path) -> None:
    async with batching(tmp_path / "kept") as server:
        client = server.client()
        batch = await submit(client, [chat_line(1), chat_line(2, max_tokens=-7)])
        async with httpx.AsyncClient(base_url=server.url) as http:
            exact(BATCH, (await http.get(f"/v1/batches/{batch.id}")).json())
            done = await ended(client, batch)
            exact(BATCH, (await http.get(f"/v1/batches/{batch.id}")).json())
            for name in (done.input_file_id, done.output_file_id, done.error_file_id):
                exact(FILE, (await http.get(f"/v1/files/{name}")).json())
            bad = await submit(client, ["no json"])
            await ended(client, bad)
            document = (await http.get(f"/v1/batches/{bad.id}")).json()
            assert document["status"] == "failed"
            for each in document["errors"]["data"]:  # `object` is what OpenAI sends besides
                assert each.pop("object") == "error"
            exact(BATCH, document)


async def test_errors_of_lines_are_in_a_file_of_their_own(tmp_path: Path) -> None:
    lines = [
        chat_line(0),
        chat_line(1, temperature=-1),
        chat_line(2, model="nobody"),
        chat_line(3, stream=True),
        chat_line(4, "!bug"),
        chat_line(5, stream=False),
        {**chat_line(6), "method": "post"},
    ]
    async with batching(tmp_path / "kept") as server:
        client = server.client()
        done = await ended(client, await submit(client, lines))
        assert done.status == "completed"
        assert done.request_counts is not None
        assert done.request_counts.to_dict() == {"total": 7, "completed": 3, "failed": 4}
        assert set(await answers(client, done.output_file_id)) == {"line-0", "line-5", "line-6"}
        errors = await answers(client, done.error_file_id)
        statuses = {name: line["response"]["status_code"] for name, line in errors.items()}
        assert statuses == {"line-1": 400, "line-2": 404, "line-3": 400, "line-4": 500}
        streamed = errors["line-3"]["response"]["body"]["error"]
        assert "leave stream out" in streamed["message"]


FAULTY: list[tuple[list[Any], list[tuple[str, int | None]]]] = [
    ([chat_line(1), "{half", "[]"], [("invalid_json_line", 2), ("invalid_json_line", 3)]),
    ([chat_line(1), "", chat_line(1)], [("duplicate_custom_id", 3)]),
    ([{**chat_line(1), "custom_id": None}], [("missing_required_parameter", 1)]),
    ([{**chat_line(1), "custom_id": 7}], [("invalid_custom_id", 1)]),
    ([{**chat_line(1), "method": "GET"}], [("invalid_method", 1)]),
    ([{**chat_line(1), "url": "/v1/completions"}], [("mismatched_url", 1)]),
    ([{**chat_line(1), "url": None}], [("missing_required_parameter", 1)]),
    ([{**chat_line(1), "body": "hello"}], [("invalid_body", 1)]),
    ([{**chat_line(1), "body": None}], [("missing_required_parameter", 1)]),
    ([chat_line(n) for n in range(6)], [("too_many_lines", None)]),
    ([chat_line(1, "x" * 40_000)], [("line_too_long", 1)]),
    (["[" * 9000], [("invalid_json_line", 1)]),
    ([b"\xff\xfe{}"], [("invalid_json_line", 1)]),
    (["", " "], [("empty_file", None)]),
]


async def test_a_faulty_file_fails_its_batch_and_says_where(tmp_path: Path) -> None:
    limits = {"max_body_bytes": 8192}
    async with batching(tmp_path / "kept", max_lines=5, http=limits) as server:
        client = server.client()
        for lines, faults in FAULTY:
            done = await ended(client, await submit(client, lines))
            assert done.status == "failed"
            assert done.failed_at is not None
            assert done.output_file_id is None
            assert done.errors is not None
            assert [(each.code, each.line) for each in done.errors.data or ()] == faults


async def test_a_byte_order_mark_and_blank_lines_are_taken(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + jsonl([chat_line(1), "", "  ", chat_line(2)]).rstrip()
    async with batching(tmp_path / "kept") as server:
        client = server.client()
        file = await upload(client, content)
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
        done = await ended(client, batch)
        assert set(await answers(client, done.output_file_id)) == {"line-1", "line-2"}


async def test_files_are_listed_read_and_deleted(tmp_path: Path) -> None:
    async with batching(tmp_path / "kept") as server:
        client = server.client()
        made = [await upload(client, f"{{}} {n}\n".encode(), f"ünit {n}.jsonl") for n in range(5)]
        first = made[0]
        assert (first.filename, first.bytes, first.purpose) == ("ünit 0.jsonl", 5, "batch")
        assert (await client.files.retrieve(first.id)) == first
        assert (await client.files.content(first.id)).content == b"{} 0\n"
        pages = [file.id async for file in await client.files.list(limit=2)]
        assert sorted(pages) == sorted(file.id for file in made)
        oldest = (await client.files.list(order="asc", limit=2)).data
        assert len(oldest) == 2
        deleted = await client.files.delete(first.id)
        assert deleted.deleted
        for call in (client.files.retrieve, client.files.delete, client.files.content):
            with pytest.raises(openai.NotFoundError):
                await call(first.id)
        kept = await client.files.create(
            file=("a.jsonl", b"{}"),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert kept.expires_at == kept.created_at + 3600


async def test_batches_are_listed_by_pages(tmp_path: Path) -> None:
    async with batching(tmp_path / "kept") as server:
        client = server.client()
        made = [await submit(client, [chat_line(1)]) for _ in range(5)]
        for batch in made:
            assert (await ended(client, batch)).status == "completed"
        page = await client.batches.list(limit=2)
        assert page.has_more
        listed = [batch.id async for batch in await client.batches.list(limit=2)]
        assert sorted(listed) == sorted(batch.id for batch in made)
        with pytest.raises(openai.BadRequestError, match="after="):
            await client.batches.list(after="batch_of_nobody")
        with pytest.raises(openai.BadRequestError, match="limit="):
            await client.batches.list(limit=1000)


async def test_a_cancelled_batch_keeps_its_answers(tmp_path: Path) -> None:
    long = " ".join(["word"] * 200)
    lines = [chat_line(n) for n in range(5)] + [chat_line(n, long) for n in range(5, 40)]
    async with batching(tmp_path / "kept", delay_s=0.02, concurrency=8) as server:
        client = server.client()
        batch = await submit(client, lines)

        async with asyncio.timeout(30):
            while True:
                seen = await client.batches.retrieve(batch.id)
                assert seen.request_counts is not None
                if seen.request_counts.completed >= 5:
                    break
        stopping = await client.batches.cancel(batch.id)
        assert stopping.status == "cancelling"
        done = await ended(client, batch)
        assert done.status == "cancelled"
        assert done.cancelled_at is not None
        assert running(server.app) == 0
        output = await answers(client, done.output_file_id)
        errors = await answers(client, done.error_file_id)
        assert {f"line-{n}" for n in range(5)} <= set(output)
        assert {*output, *errors} == {f"line-{n}" for n in range(40)}
        assert not output.keys() & errors.keys()
        assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel(batch.id)


async def test_an_input_that_is_used_is_not_deleted(tmp_path: Path) -> None:
    async with batching(tmp_path / "kept", delay_s=0.05) as server:
        client = server.client()
        batch = await submit(client, [chat_line(1, " ".join(["word"] * 500))])
        with pytest.raises(openai.ConflictError, match="cancel that first"):
            await client.files.delete(batch.input_file_id)
        await client.batches.cancel(batch.id)
        await ended(client, batch)
        await client.files.delete(batch.input_file_id)


async def test_tenants_are_apart(tmp_path: Path) -> None:
    keys = write_keys(
        tmp_path / "keys.yaml",
        one={"tenant": "acme"},
        two={"tenant": "acme"},
        other={},
        scraper={"scopes": ["metrics"]},
    )
    async with batching(tmp_path / "kept", keys=keys) as server:
        mine, ours, theirs = (server.client(name) for name in ("one", "two", "other"))
        batch = await ended(mine, await submit(mine, [chat_line(1)]))
        assert (await ours.batches.retrieve(batch.id)).status == "completed"
        assert await answers(ours, batch.output_file_id)
        assert (await theirs.batches.list()).data == []
        assert (await theirs.files.list()).data == []
        assert batch.output_file_id is not None
        for call in (
            theirs.batches.retrieve(batch.id),
            theirs.batches.cancel(batch.id),
            theirs.files.retrieve(batch.output_file_id),
            theirs.files.content(batch.output_file_id),
            theirs.files.delete(batch.output_file_id),
            theirs.batches.create(
                input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"
            ),
        ):
            with pytest.raises(openai.NotFoundError):
                await call
        with pytest.raises(openai.PermissionDeniedError):
            await upload(server.client("scraper"), b"{}")
        with pytest.raises(openai.AuthenticationError):
            await server.client("stranger").batches.list()


async def test_lines_run_with_the_rights_of_their_key(tmp_path: Path) -> None:
    """A key that is gone while its batch runs ends it; what was answered is kept."""
    keys = write_keys(tmp_path / "keys.yaml", one={}, watcher={"tenant": "one"})
    async with batching(tmp_path / "kept", keys=keys, delay_s=0.01) as server:
        client, watcher = server.client("one"), server.client("watcher")
        lines = [chat_line(n, " ".join(["word"] * 30)) for n in range(2000)]
        batch = await submit(client, lines)
        async with asyncio.timeout(30):
            while True:
                seen = await watcher.batches.retrieve(batch.id)
                if seen.request_counts is not None and seen.request_counts.completed:
                    break
        write_keys(tmp_path / "keys.yaml", watcher={"tenant": "one"})
        done = await ended(watcher, batch)
        assert done.status == "failed"
        assert done.errors is not None
        assert done.errors.data is not None
        assert done.errors.data[0].code == "invalid_api_key"
        assert await answers(watcher, done.output_file_id)
        stored = [path.read_bytes() for path in (tmp_path / "kept").rglob("*.json")]
        assert stored
        assert not [content for content in stored if b"key-one" in content]


async def test_a_quota_is_waited_out(tmp_path: Path) -> None:
    keys = write_keys(
        tmp_path / "keys.yaml", one={"quotas": {"requests_per_minute": 60, "max_concurrent": 3}}
    )
    async with batching(tmp_path / "kept", keys=keys) as server:
        client = server.client("one")
        lines = [chat_line(n) for n in range(62)]
        done = await ended(client, await submit(client, lines))
        assert done.status == "completed"
        assert done.request_counts is not None
        assert done.request_counts.to_dict() == {"total": 62, "completed": 62, "failed": 0}
        refusals = server.app.model.metrics.admission_refusals.labels("key_requests")
        assert refusals._value.get() >= 1


async def test_a_batch_that_is_too_late_expires(tmp_path: Path) -> None:
    async with batching(tmp_path / "kept", delay_s=0.05) as server:
        client = server.client()
        lines = [chat_line(0), chat_line(1, " ".join(["word"] * 1500))]
        batch = await submit(client, lines)
        store = server.app._batch_store
        assert store is not None
        await until(lambda: running(server.app) > 0)
        store._batches[batch.id].expires_at = 0
        done = await ended(client, batch)
        assert done.status == "expired"
        errors = await answers(client, done.error_file_id)
        assert errors["line-1"]["error"]["code"] == "batch_expired"
        assert errors["line-1"]["response"] is None


async def test_what_a_server_left_is_taken_up_by_the_next(tmp_path: Path) -> None:
    lines = [chat_line(n, " ".join(["word"] * 20)) for n in range(100)]
    async with batching(tmp_path / "kept", delay_s=0.01, concurrency=10) as server:
        client = server.client()
        batch = await submit(client, lines)
        waiting = await submit(client, [chat_line(1)])
        await until(lambda: running(server.app) >= 8)
    async with batching(tmp_path / "kept") as server:
        client = server.client()
        done = await ended(client, batch)
        assert set(await answers(client, done.output_file_id)) == {f"line-{n}" for n in range(100)}
        assert (await ended(client, waiting)).status == "completed"


async def test_limits_of_a_tenant(tmp_path: Path) -> None:
    limits = {
        "max_file_bytes": 100_000, "max_bytes_per_tenant": 200_000, "max_files_per_tenant": 5,
        "max_unfinished_per_tenant": 1,
    }  # fmt: skip
    async with batching(tmp_path / "kept", delay_s=0.05, **limits) as server:
        client = server.client()
        with pytest.raises(openai.APIStatusError, match="above the limit of 100000") as refused:
            await upload(client, b"x" * 170_000)
        assert refused.value.status_code == 413
        big = [await upload(client, b"x" * 90_000) for _ in range(2)]
        with pytest.raises(openai.APIStatusError, match="delete some"):
            await upload(client, b"x" * 90_000)
        assert not list((tmp_path / "kept/uploads").iterdir())
        for file in big:
            await client.files.delete(file.id)
        batch = await submit(client, [chat_line(1, " ".join(["word"] * 500))])
        file = await upload(client, b"{}")
        with pytest.raises(openai.RateLimitError, match="have not ended"):
            await client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            )
        await upload(client, b"{}")
        with pytest.raises(openai.ConflictError, match="delete files"):
            await upload(client, b"{}")
        await client.batches.cancel(batch.id)


async def test_without_a_folder_it_says_so(tmp_path: Path) -> None:
    async with batching(None) as server:
        client = server.client()
        with pytest.raises(openai.NotFoundError, match=r"batches\.folder"):
            await client.batches.list()
        with pytest.raises(openai.NotFoundError, match=r"batches\.folder"):
            await upload(client, b"{}")


async def test_live_calls_end_lines_and_these_run_again(tmp_path: Path) -> None:
    """A live call that arrives finds an empty engine, or one line in it."""
    async with batching(tmp_path / "kept", delay_s=0.02, concurrency=16, quiet_s=0.05) as server:
        client = server.client()
        lines = [chat_line(n, " ".join(["word"] * 10)) for n in range(60)]
        batch = await submit(client, lines)
        await until(lambda: running(server.app) >= 8)
        live = asyncio.create_task(
            client.chat.completions.create(
                model="echo", messages=[{"role": "user", "content": " ".join(["live"] * 20)}]
            )
        )
        await until(lambda: running(server.app) <= 2)
        await live
        assert server.app._gate.preempted >= 6
        done = await ended(client, batch)
        assert set(await answers(client, done.output_file_id)) == {f"line-{n}" for n in range(60)}


async def test_uploads_and_new_batches_end_no_line(tmp_path: Path) -> None:
    async with batching(tmp_path / "kept", delay_s=0.02, concurrency=16, quiet_s=0.05) as server:
        client = server.client()
        batch = await submit(client, [chat_line(n, " ".join(["word"] * 20)) for n in range(30)])
        await until(lambda: running(server.app) >= 8)
        before = server.app._gate.preempted
        await client.batches.cancel((await submit(client, [chat_line(0)])).id)
        assert server.app._gate.preempted == before
        await client.batches.cancel(batch.id)


FORMS: list[tuple[dict[str, str], bytes]] = [
    ({"content-type": "application/json"}, b"{}"),
    ({"content-type": "multipart/form-data"}, b"--x--"),
    ({"content-type": "multipart/form-data; boundary=x"}, b""),
    ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\n\r\nabc"),
    ({"content-type": "multipart/form-data; boundary=" + "x" * 500}, b"--x--"),
    (
        {"content-type": "multipart/form-data; boundary=x"},
        b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n',
    ),
    (
        {"content-type": "multipart/form-data; boundary=x"},
        b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\n{}\r\n'
        b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\n{}\r\n--x--\r\n',
    ),
    (
        {"content-type": "multipart/form-data; boundary=x"},
        b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nvision\r\n'
        b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\n{}\r\n--x--\r\n',
    ),
    ({"content-type": "multipart/form-data; boundary=x", "content-encoding": "gzip"}, b"--x--"),
]


async def test_malformed_forms_are_refused(tmp_path: Path) -> None:
    async with (
        batching(tmp_path / "kept") as server,
        httpx.AsyncClient(base_url=server.url) as http,
    ):
        for headers, body in FORMS:
            answer = await http.post("/v1/files", headers=headers, content=body)
            assert answer.status_code in (400, 415), (headers, body)
            assert answer.json()["error"]["message"]
        assert not list((tmp_path / "kept/uploads").iterdir())


async def test_no_malformed_body_is_the_servers_fault(tmp_path: Path) -> None:
    """500 broken forms, bodies, files and queries."""
    dice = random.Random(7)
    junk: list[Any] = [
        None, True, 0, -1, 1e308, 2**70, "", "24h", "\x00", "\ud800x", [], {}, [[]], {"a": 1},
        "file-x", CHAT, "9" * 400,
    ]  # fmt: skip
    names = (
        "input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after", "x",
    )  # fmt: skip
    form = FORMS[-2][1]
    kind = {"content-type": "multipart/form-data; boundary=x"}
    async with (
        batching(tmp_path / "kept", max_unfinished_per_tenant=200) as server,
        httpx.AsyncClient(base_url=server.url) as http,
    ):
        client = server.client()
        good = await upload(client, jsonl([chat_line(1)]))
        statuses = []
        batches = []
        for number in range(500):
            if number % 3 == 0:
                broken = bytearray(form)
                for _ in range(dice.randrange(1, 6)):
                    broken[dice.randrange(len(broken))] = dice.randrange(256)
                answer = await http.post("/v1/files", headers=kind, content=bytes(broken))
            elif number % 3 == 1:
                good_body = {"input_file_id": good.id, "endpoint": CHAT, "completion_window": "24h"}
                body = {**good_body, dice.choice(names): dice.choice(junk)}
                answer = await http.post("/v1/batches", content=json.dumps(body))
                if answer.status_code == 200:
                    batches.append(answer.json()["id"])
            else:
                query = {
                    dice.choice(("after", "limit", "order", "purpose")): str(dice.choice(junk))
                }
                path = dice.choice(("/v1/files", "/v1/batches", "/v1/files/%00", "/v1/batches/.."))
                try:
                    answer = await http.get(path, params=query)
                except UnicodeEncodeError:  # the client's own
                    continue
            statuses.append(answer.status_code)
        assert max(statuses) < 500
        assert statuses.count(400) > 150
        lines = jsonl([chat_line(1)])
        for _ in range(30):
            broken = bytearray(lines)
            for _ in range(dice.randrange(1, 4)):
                broken[dice.randrange(len(broken))] = dice.randrange(256)
            file = await upload(client, bytes(broken))
            batch = await client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            )
            batches.append(batch.id)
        for name in batches:
            done = await ended(client, await client.batches.retrieve(name))
            assert done.status in ("completed", "failed")


ASKED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "one two three"},
    "/v1/messages": {"max_tokens": 9, "messages": [{"role": "user", "content": "one two three"}]},
    "/v1/responses": {"input": "one two three"},
}


async def test_other_endpoints_are_answered_too(tmp_path: Path) -> None:
    async with batching(tmp_path / "kept") as server:
        client = server.client()
        for endpoint, body in ASKED.items():
            line = {"custom_id": "a", "url": endpoint, "body": {"model": "echo", **body}}
            fields: dict[str, Any] = {"endpoint": endpoint}
            done = await ended(client, await submit(client, [line], **fields))
            found = await answers(client, done.output_file_id)
            assert found, (endpoint, await answers(client, done.error_file_id))
            assert "one two three" in json.dumps(found["a"]["response"]["body"])
            assert done.usage is not None
            assert (done.usage.input_tokens, done.usage.output_tokens) == (3, 3), endpoint
        with pytest.raises(openai.BadRequestError, match="endpoint"):
            await submit(client, [chat_line(1)], endpoint="/v1/files")


async def test_a_client_cannot_say_who_it_is(tmp_path: Path) -> None:
    """What a batch's calls carry in their scope is nothing that comes from outside."""
    keys = write_keys(tmp_path / "keys.yaml", one={})
    async with (
        batching(tmp_path / "kept", keys=keys) as server,
        httpx.AsyncClient(base_url=server.url) as http,
    ):
        for headers in ({"packhorse.caller": "one"}, {"x-packhorse-caller": "one"}):
            answer = await http.post(CHAT, headers=headers, json=chat_line(1)["body"])
            assert answer.status_code == 401
