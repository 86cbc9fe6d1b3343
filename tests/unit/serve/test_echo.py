"""What the echo engines answer with."""

from __future__ import annotations

from typing import Any

import pytest

from packhorse.serve.engines.echo import echoed_text
from packhorse.serve.messages import GenerateRequest, Sampling

PARTS = [{"type": "text", "text": "clear,"}, {"type": "text", "text": "18 degrees"}]


def request(**of: Any) -> GenerateRequest:
    return GenerateRequest(request_id="r", model="m", sampling=Sampling(), **of)


@pytest.mark.parametrize(
    ("last", "text"),
    [
        ({"role": "user", "content": "Hello!"}, "Hello!"),
        ({"role": "tool", "content": PARTS}, "clear,\n18 degrees"),
        ({"role": "assistant", "tool_calls": []}, ""),
    ],
    ids=["text", "parts", "nothing"],
)
def test_the_last_message_is_echoed(last: dict[str, Any], text: str) -> None:
    messages = ({"role": "user", "content": "before"}, last)
    assert echoed_text(request(messages=messages)) == text


def test_a_prompt_is_echoed() -> None:
    assert echoed_text(request(prompt="Hello!")) == "Hello!"
    assert echoed_text(request(prompt=(5, 6))) == "5 6"
