"""JSON of answers: log-probabilities, tool calls, echo, usage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.completions import CompletionBody
from packhorse.serve.api.generate import CollectedChoice, total_usage
from packhorse.serve.api.validation import validated
from packhorse.serve.messages import Chunk, Prompt, Route, TokenLogprob, ToolCall, Usage
from packhorse.serve.rest.responses import ChatEncoder, CompletionEncoder, usage_json

PROMPT = Prompt((1, 2), 9, text="ab")
LOGPROB = TokenLogprob(
    "é", 5, -1.0, 2, (TokenLogprob("x", 6, -0.5, 1), TokenLogprob("é", 5, -1.0, 2))
)


@dataclass
class Ended:
    """What is left of a stream after its end."""

    usage: Usage = field(default_factory=lambda: Usage(1, 1))
    prompt: Prompt = PROMPT
    route: Route = field(default_factory=lambda: Route("m"))

    @property
    def context(self) -> Ended:
        return self


def chat(**fields: Any) -> ChatEncoder:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return ChatEncoder(validated(body, ChatBody))


def text(**fields: Any) -> CompletionEncoder:
    return CompletionEncoder(validated({"model": "m", "prompt": "ab", **fields}, CompletionBody))


def whole(encoder: ChatEncoder | CompletionEncoder, *chunks: Chunk) -> dict[str, Any]:
    """The only choice of a whole answer of these chunks."""
    collected = CollectedChoice()
    for chunk in chunks:
        collected.add(chunk)
    streams: Any = [Ended()]
    (choice,) = encoder.whole("id", streams, [collected])["choices"]
    return dict(choice)


def test_a_whole_chat_answer_joins_its_chunks() -> None:
    chunks = Chunk("a", [1]), Chunk("b", [2], "stop", stop_reason=7)
    assert whole(chat(return_token_ids=True), *chunks) == {
        "index": 0,
        "message": {"role": "assistant", "content": "ab", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": 7,
        "token_ids": [1, 2],
    }


def test_a_tool_call_has_no_content() -> None:
    call = ToolCall(0, '{"a": 1}', "id", "f")
    chunk = Chunk("", [1], "tool_calls", tool_calls=(call,), reasoning="hm")
    message = whole(chat(), chunk)["message"]
    assert message["content"] is None
    assert message["reasoning"] == "hm"
    assert message["tool_calls"] == [
        {"id": "id", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    ]


def test_a_streamed_tool_call_is_named_once() -> None:
    first = Chunk("", [1], tool_calls=(ToolCall(0, "", "id", "f"),))
    later = Chunk("", [1], tool_calls=(ToolCall(0, "{}"),))
    assert chat().event(0, first, PROMPT)["delta"] == {
        "tool_calls": [
            {
                "index": 0,
                "function": {"name": "f", "arguments": ""},
                "id": "id",
                "type": "function",
            }
        ]
    }
    assert chat().event(0, later, PROMPT)["delta"] == {
        "tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]
    }


def test_chat_log_probabilities_are_as_many_as_asked_for() -> None:
    chunk = Chunk("é", [5], logprobs=(LOGPROB,))
    own = {"token": "é", "logprob": -1.0, "bytes": [195, 169]}
    other = {"token": "x", "logprob": -0.5, "bytes": [120]}
    for count, top in ((0, []), (1, [other]), (2, [other, own]), (-1, [other, own])):
        encoder = chat(logprobs=True, top_logprobs=count)
        logprobs = encoder.event(0, chunk, PROMPT)["logprobs"]
        assert logprobs == {"content": [{**own, "top_logprobs": top}]}


def test_completion_log_probabilities_keep_their_offsets_over_events() -> None:
    encoder = text(logprobs=1, stream=True)
    first = encoder.event(0, Chunk("é", [5], logprobs=(LOGPROB,)), PROMPT)["logprobs"]
    second = encoder.event(0, Chunk("é", [5], logprobs=(LOGPROB,)), PROMPT)["logprobs"]
    assert first == {
        "tokens": ["é"],
        "token_logprobs": [-1.0],
        "top_logprobs": [{"é": -1.0, "x": -0.5}],
        "text_offset": [0],
    }
    assert second["text_offset"] == [1]


def test_tokens_can_be_named_by_their_ids() -> None:
    encoder = text(logprobs=0, return_tokens_as_token_ids=True)
    choice = whole(encoder, Chunk("é", [5], "stop", logprobs=(LOGPROB,)))
    assert choice["logprobs"]["tokens"] == ["token_id:5"]


def test_the_prompt_is_echoed_once_a_choice() -> None:
    encoder = text(echo=True, n=2, stream=True)
    chunks = [Chunk("c", [3], index=0), Chunk("d", [4], index=1), Chunk("e", [5], index=0)]
    texts = [encoder.event(chunk.index, chunk, PROMPT)["text"] for chunk in chunks]
    assert texts == ["abc", "abd", "e"]


def test_echo_alone_drops_the_token_that_had_to_be_generated() -> None:
    chunk = Chunk("c", [3], "length", logprobs=(LOGPROB,), prompt_logprobs=(LOGPROB,))
    choice = whole(text(echo=True, max_tokens=0, logprobs=1), chunk)
    assert choice["text"] == "ab"
    assert choice["logprobs"]["tokens"] == ["é"]


def test_a_batchs_usage_is_the_sum() -> None:
    streams: Any = [Ended(Usage(1, 2, 1)), Ended(Usage(3, 4, 0, 2))]
    assert usage_json(total_usage(streams)) == {
        "prompt_tokens": 4,
        "completion_tokens": 6,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }


def test_a_choice_of_a_batch_has_its_own_index_and_prompt() -> None:
    collected = [CollectedChoice(texts=[name], finish_reason="stop") for name in "cdef"]
    streams: Any = [Ended(), Ended(prompt=Prompt((3,), 9, text="yz"))]
    encoder = text(prompt=["ab", "yz"], n=2, echo=True, return_token_ids=True)
    choices = encoder.whole("id", streams, collected)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"] for choice in choices] == ["abc", "abd", "yze", "yzf"]
    assert [choice["prompt_token_ids"] for choice in choices] == [[1, 2], [1, 2], [3], [3]]
