"""Batches of servers that are killed, and of `packhorse batch`."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from tests.conftest import BIN, Server, running_server
from tests.integration.batching import CHAT, chat_line, jsonl

# No live calls come, so no line waits for quiet.
AT_ONCE = {"PACKHORSE_BATCHES__QUIET_S": "0"}
Run = Callable[..., subprocess.CompletedProcess[str]]


def counted(path: Path) -> int:
    """Whole lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("size", [600, pytest.param(5000, marks=pytest.mark.thorough)])
def test_two_kills_lose_no_line_and_double_none(tmp_path: Path, size: int) -> None:
    kept = tmp_path / "kept"
    arguments = ("--engine", "echo", "--batches", str(kept))
    batch_id = ""
    for kill_at in (size // 4, size // 2, None):
        with running_server(tmp_path, *arguments, environment=AT_ONCE) as server:
            client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=5)
            with client:
                if not batch_id:
                    content = jsonl([chat_line(n) for n in range(size)])
                    file = client.files.create(file=("in.jsonl", content), purpose="batch")
                    batch_id = client.batches.create(
                        input_file_id=file.id, endpoint=CHAT, completion_window="24h"
                    ).id
                deadline_s = time.monotonic() + 120
                journal = kept / f"batches/{batch_id}.output"
                while time.monotonic() < deadline_s:
                    if kill_at is not None and counted(journal) >= kill_at:
                        server.process.kill()
                        server.process.wait(30)
                        break
                    if kill_at is None:
                        batch = client.batches.retrieve(batch_id)
                        if batch.status == "completed":
                            break
                    time.sleep(0.02)
                else:
                    pytest.fail(f"not done in time: {server.log()[-2000:]}")
                if kill_at is not None:
                    assert kill_at <= counted(journal) < size
                    if kill_at == size // 2:  # and the disk has half of a line
                        with journal.open("ab") as file_left:
                            file_left.write(b'{"id": "batch_req_torn", "custom_id": "line-')
                    continue
                batch = client.batches.retrieve(batch_id)
                assert batch.error_file_id is None
                assert batch.output_file_id is not None
                content = client.files.content(batch.output_file_id).content
    names = [json.loads(line)["custom_id"] for line in content.splitlines()]
    assert len(names) == size
    assert set(names) == {f"line-{n}" for n in range(size)}


def test_the_command_answers_a_file(tmp_path: Path, run_command: Run) -> None:
    lines = [chat_line(1), chat_line(2, stream=True), chat_line(3)]
    (tmp_path / "in.jsonl").write_bytes(jsonl(lines))
    done = run_command("packhorse", "batch", "in.jsonl", "--engine", "echo")
    assert done.returncode == 1, done.stderr
    assert "2 answers in in.output.jsonl" in done.stderr
    output = [json.loads(line) for line in read(tmp_path / "in.output.jsonl")]
    errors = [json.loads(line) for line in read(tmp_path / "in.errors.jsonl")]
    assert {line["custom_id"] for line in output} == {"line-1", "line-3"}
    assert [line["custom_id"] for line in errors] == ["line-2"]
    assert not (tmp_path / "in.output.jsonl.part").exists()
    again = run_command("packhorse", "batch", "in.jsonl", "--engine", "echo")
    assert again.returncode == 2
    assert "--output" in again.stderr


def test_the_command_says_which_lines_are_faulty(tmp_path: Path, run_command: Run) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat_line(1), "{", chat_line(1)]))
    done = run_command("packhorse", "batch", "in.jsonl", "--engine", "echo")
    assert done.returncode == 2
    assert "line 2: This line is not valid JSON." in done.stderr
    assert "line 3: " in done.stderr
    missing = run_command("packhorse", "batch", "nothing.jsonl", "--engine", "echo")
    assert missing.returncode == 2
    assert "nothing.jsonl" in missing.stderr


def test_the_command_goes_on_after_a_kill(tmp_path: Path, run_command: Run) -> None:
    size = 400
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat_line(n) for n in range(size)]))
    config = tmp_path / "config.yaml"
    config.write_text("engine:\n  echo_delay_s: 0.02\n")
    arguments = ["batch", "in.jsonl", "--engine", "echo", "--concurrency", "4"]
    command = [str(BIN / "packhorse"), *arguments, "--config", str(config)]
    journal = tmp_path / "in.output.jsonl.part/output.jsonl"
    killed = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 60
    while counted(journal) < 20:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    killed.kill()
    killed.wait(30)
    kept = counted(journal)
    assert 20 <= kept < size
    done = run_command("packhorse", *arguments)
    assert done.returncode == 0, done.stderr
    names = [json.loads(line)["custom_id"] for line in read(tmp_path / "in.output.jsonl")]
    assert len(names) == size
    assert set(names) == {f"line-{n}" for n in range(size)}


def test_the_command_refuses_another_input_for_what_is_there(
    tmp_path: Path, run_command: Run
) -> None:
    (tmp_path / "in.output.jsonl.part").mkdir()
    (tmp_path / "in.output.jsonl.part/input.sha256").write_text("another\n")
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat_line(1)]))
    done = run_command("packhorse", "batch", "in.jsonl", "--engine", "echo")
    assert done.returncode == 2
    assert "delete it to begin again" in done.stderr


def test_sigterm_leaves_a_batch_for_the_next_server(tmp_path: Path) -> None:
    """A drain does not wait for lines."""
    arguments = ("--engine", "echo", "--batches", str(tmp_path / "kept"))
    slow = {"PACKHORSE_ENGINE__ECHO_DELAY_S": "0.2", **AT_ONCE}
    with running_server(tmp_path, *arguments, environment=slow) as server:
        with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            lines = [chat_line(n, " ".join(["word"] * 200)) for n in range(5)]
            file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
            batch = client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            )
            deadline_s = time.monotonic() + 30
            while client.batches.retrieve(batch.id).status == "validating":
                assert time.monotonic() < deadline_s
                time.sleep(0.02)
        began_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began_s < 15
    with (
        running_server(tmp_path, *arguments, environment=AT_ONCE) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        deadline_s = time.monotonic() + 30
        while (found := client.batches.retrieve(batch.id)).status != "completed":
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert found.request_counts is not None
        assert found.request_counts.completed == 5
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(batch.id)


def test_the_command_has_a_server_do_it(
    tmp_path: Path, run_command: Run, echo_server_with_batches: Server
) -> None:
    lines = [chat_line(n) for n in range(30)] + [chat_line(30, max_tokens=-3)]
    (tmp_path / "in ü.jsonl").write_bytes(jsonl(lines))
    url = echo_server_with_batches.url
    arguments = ("batch", "in ü.jsonl", "--url", url, "--output", "a.jsonl")
    done = run_command("packhorse", *arguments)
    assert done.returncode == 1, done.stderr
    names = [json.loads(line)["custom_id"] for line in read(tmp_path / "a.jsonl")]
    assert sorted(names) == sorted(f"line-{n}" for n in range(30))
    (error,) = read(tmp_path / "a.errors.jsonl")
    assert json.loads(error)["custom_id"] == "line-30"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "a.errors.jsonl", "a.jsonl", "in ü.jsonl",
    ]  # fmt: skip

    (tmp_path / "bad.jsonl").write_bytes(jsonl([chat_line(1), chat_line(1)]))
    bad = run_command("packhorse", "batch", "bad.jsonl", "--url", url)
    assert bad.returncode == 2
    assert "line 2: The custom_id of this line is that of an earlier one" in bad.stderr
    nobody = run_command("packhorse", "batch", "bad.jsonl", "--url", "http://127.0.0.1:9")
    assert nobody.returncode == 2
    both = run_command("packhorse", *arguments, "--engine", "echo")
    assert both.returncode == 2


def test_the_command_finds_the_batch_that_it_has_made(
    tmp_path: Path, run_command: Run, echo_server_with_batches: Server
) -> None:
    url = echo_server_with_batches.url
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat_line(n) for n in range(5000)]))
    command = [str(BIN / "packhorse"), "batch", "in.jsonl", "--url", url]
    killed = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    mark = tmp_path / "in.output.jsonl.batch"
    deadline_s = time.monotonic() + 60
    while not mark.exists() or not mark.read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    killed.kill()
    killed.wait(30)
    batch_id = json.loads(mark.read_text())["batch"]
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        client.batches.cancel(batch_id)
        done = run_command("packhorse", "batch", "in.jsonl", "--url", url)
        assert done.returncode == 2
        assert f"{batch_id} is cancelled" in done.stderr
        assert [batch.input_file_id for batch in client.batches.list(limit=1)]
    names = [
        json.loads(line)["custom_id"]
        for path in ("in.output.jsonl", "in.errors.jsonl")
        if (tmp_path / path).exists()
        for line in read(tmp_path / path)
    ]
    assert len(names) == len(set(names)) == 5000
    assert not mark.exists()


@pytest.fixture(scope="module")
def echo_server_with_batches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("batches")
    arguments = ("--engine", "echo", "--batches", str(folder / "kept"))
    with running_server(folder, *arguments, environment=AT_ONCE) as server:
        yield server
