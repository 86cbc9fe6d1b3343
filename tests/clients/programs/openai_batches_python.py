"""The official Python client's files and batches."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
from common import BASE_URL, CAPITAL, KEY, MODEL, WRONG_KEY, call, main, refused, said

client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0, timeout=60)
CHAT = "/v1/chat/completions"
BODY: Any = {
    "model": MODEL, "temperature": 0, "max_completion_tokens": 20,
    "messages": [{"role": "user", "content": CAPITAL}],
}  # fmt: skip
ENDS = ("completed", "failed", "expired", "cancelled")
WAIT_S = 90.0


def line(number: int, url: str = CHAT, **more: Any) -> dict[str, Any]:
    body = {**BODY, **more}
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": body}


def upload(lines: list[dict[str, Any]]) -> Any:
    text = "".join(json.dumps(each) + "\n" for each in lines)
    return client.files.create(file=("lines.jsonl", text.encode()), purpose="batch")


def begin(lines: list[dict[str, Any]], endpoint: Any = CHAT) -> Any:
    return client.batches.create(
        input_file_id=upload(lines).id, endpoint=endpoint, completion_window="24h"
    )


def waited(batch: Any) -> Any:
    deadline_s = time.monotonic() + WAIT_S
    while batch.status not in ENDS:
        if time.monotonic() > deadline_s:
            raise AssertionError(f"still {batch.status} after {WAIT_S:.0f} s")
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    return batch


def lines_of(file_id: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()]


@call
def files() -> Any:
    """Uploaded, described, listed, read and deleted."""
    sent = [line(1), line(2)]
    made = upload(sent)
    if client.files.retrieve(made.id).bytes != made.bytes or lines_of(made.id) != sent:
        raise AssertionError("the file is another")
    if made.id not in [file.id for file in client.files.list()]:
        raise AssertionError("the file is not in the list")
    client.files.delete(made.id)
    gone = refused(lambda: client.files.retrieve(made.id), openai.NotFoundError, status=404)
    return {"bytes": made.bytes, "gone": gone["error"]}


@call
def batch() -> Any:
    done = waited(begin([line(number) for number in range(8)]))
    counts = done.request_counts
    if done.status != "completed" or (counts.total, counts.completed, counts.failed) != (8, 8, 0):
        raise AssertionError(f"{done.status}, {counts}, {done.errors}")
    answers = lines_of(done.output_file_id)
    if sorted(each["custom_id"] for each in answers) != [f"line-{n}" for n in range(8)]:
        raise AssertionError(f"other lines: {[each['custom_id'] for each in answers]}")
    first = answers[0]["response"]
    if first["status_code"] != 200 or first["body"]["usage"]["completion_tokens"] < 1:
        raise AssertionError(f"{first}")
    return said(first["body"]["choices"][0]["message"]["content"])


@call
def errors() -> Any:
    """A line that is refused is in the file of errors; the others are answered."""
    done = waited(begin([line(1), line(2, messages=[]), line(3)]))
    good = [each["custom_id"] for each in lines_of(done.output_file_id)]
    (bad,) = lines_of(done.error_file_id)
    if sorted(good) != ["line-1", "line-3"] or bad["custom_id"] != "line-2":
        raise AssertionError(f"answered: {good}; refused: {bad}")
    if done.request_counts.failed != 1 or bad["response"]["status_code"] != 400:
        raise AssertionError(f"{done.request_counts}, {bad}")
    return {"refused": bad["custom_id"]}


@call
def cancel() -> Any:
    begun = begin([line(number, max_completion_tokens=400) for number in range(400)])
    client.batches.cancel(begun.id)
    done = waited(client.batches.retrieve(begun.id))
    if done.status != "cancelled" or begun.id not in [each.id for each in client.batches.list()]:
        raise AssertionError(f"{done.status}")
    return {"completed": done.request_counts.completed}


@call
def wrong_key() -> Any:
    other = client.with_options(api_key=WRONG_KEY)
    return refused(lambda: other.batches.list(), openai.AuthenticationError, status=401)


if __name__ == "__main__":
    main()
