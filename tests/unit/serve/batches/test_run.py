"""One batch: what is taken, kept, given back, and found again."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from packhorse.serve.batches import run as runs
from packhorse.serve.batches.lines import JSON, MAX_FAULTS
from packhorse.serve.batches.records import Reply
from packhorse.serve.batches.run import BatchRun, InputFaulty, Paths, open_run, run_all
from packhorse.serve.messages import ANONYMOUS, Caller
from tests.integration.batching import chat_line, jsonl


def paths(folder: Path) -> Paths:
    return Paths(folder / "in", folder / "out", folder / "errors")


def opened(folder: Path, endpoint: str | None = None) -> BatchRun:
    return open_run(paths(folder), endpoint, max_lines=1000, max_line_bytes=10_000)


def found(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


class Endpoint:
    """Answers with the text that it was asked; `replies` come before."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.calls = 0

    async def __call__(self, path: str, body: bytes, caller: Caller, request_id: str) -> Reply:
        self.calls += 1
        await asyncio.sleep(0)
        if self.replies:
            return self.replies.pop(0)
        usage = {"prompt_tokens": 2, "completion_tokens": 3}
        text = json.loads(body)["messages"][0]["content"]
        return Reply(200, JSON, json.dumps({"text": text, "usage": usage}).encode())


async def test_every_line_is_answered_once(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(jsonl([chat_line(n) for n in range(50)]))
    run = opened(tmp_path)
    moves = 0

    def moved() -> None:
        nonlocal moves
        moves += 1

    await run_all(run, ANONYMOUS, Endpoint(), at_once=7, moved=moved)
    assert run.is_done
    await run.close()
    lines = found(tmp_path / "out")
    assert {name: line["response"]["body"]["text"] for name, line in lines.items()} == {
        f"line-{n}": f"say {n}" for n in range(50)
    }
    assert moves == 50
    assert (run.usage.input_tokens, run.usage.output_tokens) == (100, 150)


async def test_what_is_refused_for_the_moment_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MIN_WAIT_S", 0.0)
    (tmp_path / "in").write_bytes(jsonl([chat_line(n) for n in range(3)]))
    run = opened(tmp_path)
    soon = {**JSON, "retry-after": "0"}
    refusals = [Reply(status, soon, b"{}") for status in (429, 503, 529, 429)]
    endpoint = Endpoint(*refusals)
    await run_all(run, ANONYMOUS, endpoint, at_once=1, moved=lambda: None)
    await run.close()
    assert len(found(tmp_path / "out")) == 3
    assert (tmp_path / "errors").read_bytes() == b""
    assert endpoint.calls == 7


async def test_errors_and_answers_that_are_no_json_are_errors(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(jsonl([chat_line(n) for n in range(4)]))
    run = opened(tmp_path)
    endpoint = Endpoint(
        Reply(400, JSON, b'{"error":\n {}}'),
        Reply(200, {"content-type": "text/plain"}, b"hello"),
        Reply(200, JSON, b'{\n "text": "pretty"\n}\n'),
    )
    await run_all(run, ANONYMOUS, endpoint, at_once=1, moved=lambda: None)
    await run.close()
    errors = found(tmp_path / "errors")
    assert [line["response"]["status_code"] for line in errors.values()] == [400, 500]
    assert found(tmp_path / "out")["line-2"]["response"]["body"] == {"text": "pretty"}


async def test_a_cancelled_line_is_taken_again(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(jsonl([chat_line(0), chat_line(1)]))
    run = opened(tmp_path)

    async def never(path: str, body: bytes, caller: Caller, request_id: str) -> Reply:
        await asyncio.sleep(3600)
        raise AssertionError

    position = run.take()
    assert position == 0
    work = asyncio.create_task(run.attempt(position, ANONYMOUS, never))
    await asyncio.sleep(0.05)
    work.cancel()
    await asyncio.wait([work])
    assert [run.take(), run.take(), run.take()] == [0, 1, None]
    run.give_back(1)
    run.give_back(1)
    assert [run.take(), run.take()] == [1, None]
    await run.close()


async def test_a_run_goes_on_where_another_was(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(jsonl([chat_line(n) for n in range(10)]))
    first = opened(tmp_path)
    for _ in range(4):
        position = first.take()
        assert position is not None
        await first.attempt(position, ANONYMOUS, Endpoint())
    await first.flush()
    with (tmp_path / "out").open("ab") as torn:
        torn.write(b'{"id": "batch_req_1", "cust')
    second = opened(tmp_path)
    assert second.progress.completed == 4
    assert second.usage.output_tokens == 12
    endpoint = Endpoint()
    await run_all(second, ANONYMOUS, endpoint, at_once=3, moved=lambda: None)
    await second.close()
    await first.close()
    assert endpoint.calls == 6
    assert len(found(tmp_path / "out")) == 10


async def test_a_disk_that_refuses_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "AFTER_FAILURE_S", 0.01)
    (tmp_path / "in").write_bytes(jsonl([chat_line(n) for n in range(5)]))
    run = opened(tmp_path)
    failures = 3
    written = run._output.write

    def write(lines: Any) -> int:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError(28, "No space left on device")
        return written(lines)

    monkeypatch.setattr(run._output, "write", write)
    await run_all(run, ANONYMOUS, Endpoint(), at_once=2, moved=lambda: None)
    assert failures < 0
    await run.close()
    assert len(found(tmp_path / "out")) == 5


async def test_no_line_runs_while_the_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that cannot be written would fill the memory."""
    (tmp_path / "in").write_bytes(jsonl([chat_line(n) for n in range(5)]))
    run = opened(tmp_path)
    endpoint = Endpoint()
    run.blocked_until_s = time.monotonic() + 3600
    slept: list[float] = []
    really = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds > 1:
            slept.append(seconds)
            assert endpoint.calls == 0
            run.blocked_until_s = 0.0
        await really(0)

    monkeypatch.setattr(runs.asyncio, "sleep", sleep)
    await run_all(run, ANONYMOUS, endpoint, at_once=1, moved=lambda: None)
    assert 3590 < slept[0] <= 3600
    assert endpoint.calls == 5
    await run.close()


async def test_lines_that_never_ran_are_told(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(jsonl([chat_line(n) for n in range(5)]))
    run = opened(tmp_path)
    position = run.take()
    assert position is not None
    await run.attempt(position, ANONYMOUS, Endpoint())
    assert await run.give_up_rest("batch_expired", "Too late.")
    await run.close()
    errors = found(tmp_path / "errors")
    assert set(errors) == {"line-1", "line-2", "line-3", "line-4"}
    assert errors["line-1"]["error"] == {"code": "batch_expired", "message": "Too late."}
    assert run.is_done


def test_faults_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"{\n" * 5000)
    with pytest.raises(InputFaulty) as faulty:
        opened(tmp_path)
    assert len(faulty.value.faults) == MAX_FAULTS


def test_only_endpoints_that_infer_are_called(tmp_path: Path) -> None:
    urls = ["/v1/files", "/admin/adapters", "/v1/load_lora_adapter", "/metrics", "/v1/batches", 7]
    lines = [{**chat_line(n), "url": url} for n, url in enumerate(urls)]
    (tmp_path / "in").write_bytes(jsonl(lines))
    with pytest.raises(InputFaulty) as faulty:
        opened(tmp_path)
    assert [fault.code for fault in faulty.value.faults] == ["invalid_url"] * len(urls)
