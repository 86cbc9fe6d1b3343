"""A batch on the real engine, with live calls beside it."""

from __future__ import annotations

import json
import time

from openai import OpenAI

from tests.conftest import Server
from tests.integration.batching import CHAT, jsonl

LINES = 40
TOKENS = 24


def test_every_line_is_answered_once_beside_live_calls(demo_server: Server) -> None:
    def body(number: int) -> dict[str, object]:
        text = f"What do you know about the number {number}?"
        return {
            "model": "demo",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": TOKENS,
            "ignore_eos": True,
        }

    lines = [
        {"custom_id": f"line-{n}", "method": "POST", "url": CHAT, "body": body(n)}
        for n in range(LINES)
    ]
    with OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        live = 0
        deadline_s = time.monotonic() + 120
        while batch.status not in ("completed", "failed"):
            assert time.monotonic() < deadline_s, batch
            batch = client.batches.retrieve(batch.id)
            if live < 5 and batch.request_counts and batch.request_counts.completed > live:
                answer = client.chat.completions.create(
                    model="demo",
                    messages=[{"role": "user", "content": f"How are you, caller {live}?"}],
                    max_tokens=TOKENS,
                    extra_body={"ignore_eos": True},
                )
                assert answer.usage is not None
                assert answer.usage.completion_tokens == TOKENS
                live += 1
            time.sleep(0.05)
        assert batch.status == "completed"
        assert live == 5
        assert batch.error_file_id is None
        assert batch.output_file_id is not None
        content = client.files.content(batch.output_file_id).text
        client.files.delete(file.id)
        client.files.delete(batch.output_file_id)
    found = [json.loads(line) for line in content.splitlines()]
    assert len(found) == LINES
    assert {line["custom_id"] for line in found} == {f"line-{n}" for n in range(LINES)}
    for line in found:
        assert line["response"]["body"]["usage"]["completion_tokens"] == TOKENS
    assert batch.usage is not None
    assert batch.usage.output_tokens == LINES * TOKENS
