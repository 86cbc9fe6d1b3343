"""gRPC's messages say what HTTP's documents say, of the same chunks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.completions import CompletionBody
from packhorse.serve.api.generate import CollectedChoice, head_of, total_usage
from packhorse.serve.api.validation import validated
from packhorse.serve.messages import Chunk, Prompt, Route, TokenLogprob, ToolCall, Usage
from packhorse.serve.rest import responses as rest
from packhorse.serve.rpc import responses as rpc
from tests.protocol_parity import said_in_json, said_in_messages

LOGPROB = TokenLogprob("é", 5, -1.0, 2, (TokenLogprob("x", 6, -0.5, 1),))
PROMPT = Prompt((1, 2), 9, text="ab")
CHUNKS = [
    Chunk("", [3], reasoning="hm"),
    Chunk("a", [4], logprobs=(LOGPROB,)),
    Chunk("b", [5]),
    Chunk("", [6], tool_calls=(ToolCall(0, "", "id", "f"),)),
    Chunk("c", [7], "stop", stop_reason=7, tool_calls=(ToolCall(0, "{}"),)),
]
TEXT_CHUNKS = [
    Chunk("a", [4], logprobs=(LOGPROB,), prompt_logprobs=(LOGPROB,)),
    Chunk("b", [5], "stop", stop_reason="b", logprobs=(LOGPROB,)),
]


@dataclass
class Ended:
    """What is left of a stream after its end."""

    usage: Usage = field(default_factory=lambda: Usage(2, 5, 1))
    prompt: Prompt = PROMPT
    route: Route = field(default_factory=lambda: Route("m"))

    @property
    def context(self) -> Ended:
        return self


def chat(fields: dict[str, Any]) -> tuple[Any, Any]:
    message = {"role": "user", "content": "x"}
    body = validated({"model": "m", "messages": [message], **fields}, ChatBody)
    return rest.ChatEncoder(body), rpc.ChatEncoder(body)


def text(fields: dict[str, Any]) -> tuple[Any, Any]:
    body = validated({"model": "m", "prompt": "ab", **fields}, CompletionBody)
    return rest.CompletionEncoder(body), rpc.CompletionEncoder(body)


CASES = [
    (chat, {}, CHUNKS),
    (chat, {"return_token_ids": True}, CHUNKS),
    (chat, {"logprobs": True, "top_logprobs": 1}, CHUNKS),
    (text, {}, TEXT_CHUNKS),
    (text, {"return_token_ids": True, "echo": True}, TEXT_CHUNKS),
    (text, {"logprobs": 1, "echo": True}, TEXT_CHUNKS),
    (text, {"logprobs": 0, "echo": True, "max_tokens": 0}, TEXT_CHUNKS),
]


@pytest.mark.parametrize(("encoders", "fields", "chunks"), CASES)
def test_a_whole_answer(encoders: Any, fields: dict[str, Any], chunks: list[Chunk]) -> None:
    collected = CollectedChoice()
    for chunk in chunks:
        collected.add(chunk)
    streams: Any = [Ended()]
    document, message = (one.whole("id", streams, [collected]) for one in encoders(fields))
    assert message.id == document["id"]
    assert said_in_messages([message]) == said_in_json([document])


@pytest.mark.parametrize(("encoders", "fields", "chunks"), CASES)
def test_a_stream(encoders: Any, fields: dict[str, Any], chunks: list[Chunk]) -> None:
    in_json, in_protobuf = encoders(fields)
    streams: Any = [Ended()]
    documents = [{"model": "m", "choices": [in_json.event(0, chunk, PROMPT)]} for chunk in chunks]
    documents.append({"choices": [], "usage": rest.usage_json(total_usage(streams))})
    messages = [
        in_protobuf.opening(head_of("id-", "1", streams), PROMPT),
        *(in_protobuf.chunk(0, chunk, PROMPT) for chunk in chunks),
        in_protobuf.usage(total_usage(streams)),
    ]
    assert said_in_messages(messages) == said_in_json(documents)
