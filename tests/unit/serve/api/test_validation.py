"""Fields that real clients send and no class has: accepted where harmless, and reported."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessage

from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.completions import CompletionBody
from packhorse.serve.api.tokenize import TokenizeChatBody
from packhorse.serve.api.validation import validated
from packhorse.serve.errors import Invalid
from packhorse.serve.ignored import PLAIN, told
from packhorse.serve.messages import GenerateRequest

ASKED = {"role": "user", "content": "hi"}
CALL: dict[str, Any] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "f", "arguments": '{"a": 1}'},
}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


def body_of(**fields: Any) -> ChatBody:
    return validated({"model": "m", "messages": [ASKED], **fields}, ChatBody)


def chat(**fields: Any) -> GenerateRequest:
    (request,) = body_of(**fields).to_requests("id", default_model="default")
    return request


def sent_back(message: dict[str, Any]) -> Any:
    """How a message of history reaches the engine."""
    return (chat(messages=[ASKED, message, ASKED]).messages or ())[1]


NULLS = [
    "functions",
    "function_call",
    "audio",
    "prediction",
    "verbosity",
    "web_search_options",
    "top_a",
    "suffix",
    "best_of",
    "min_tokens",
    "echo",
    "n",
    "tools",
    "stop",
    "logit_bias",
    "include_reasoning",
    "skip_special_tokens",
    "priority",
    "max_tokens",
    "temperature",
    "stream",
    "stream_options",
    "cache",
    "timeout_s",
    "no_such_field",
]


def test_null_is_absent_everywhere() -> None:
    assert chat(**dict.fromkeys(NULLS)) == chat()
    assert body_of(**dict.fromkeys(NULLS)).ignored == ()
    message = {**ASKED, **dict.fromkeys(("name", "refusal", "tool_calls", "audio", "x"))}
    assert sent_back(message) == ASKED
    tool = {**TOOL, "function": {"name": "f", "description": None, "strict": None, "x": None}}
    assert chat(tools=[tool]).chat.tools == (TOOL,)


def test_null_inside_of_what_is_the_clients_own_stays() -> None:
    parameters = {"type": "object", "properties": {"a": {"default": None, "enum": [None, 1]}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    assert chat(tools=[tool]).chat.tools[0]["function"]["parameters"] == parameters
    assert chat(chat_template_kwargs={"a": None}).chat.template_variables == {"a": None}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"temprature": 0.5, "user": "ada"}, ("temprature", "user")),
        ({"best_of": 1, "functions": [], "modalities": ["text"]}, ("best_of", "functions")),
        ({"messages": [{**ASKED, "cache_control": {"type": "ephemeral"}}]},
         ("messages.cache_control",)),
        ({"messages": [{"role": "user", "content": [
            {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}]},
         ("messages.content.cache_control",)),
        ({"tools": [{**TOOL, "cache_control": {}}]}, ("tools.cache_control",)),
        ({"stream": True, "stream_options": {"include_usages": True}},
         ("stream_options.include_usages",)),
        ({"structured_outputs": {"regex": "a", "rejex": 1}}, ("structured_outputs.rejex",)),
        ({"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
         ("response_format",)),
        ({"a b": 1, "\u4f60": 2, "x" * 200: 3, "a\nset-cookie: b": 4}, ("other",)),
        ({f"f{n}": n for n in range(100)}, tuple(f"f{n}" for n in range(32))),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_told(fields: dict[str, Any], names: tuple[str, ...]) -> None:
    assert body_of(**fields).ignored == names
    assert chat(**fields).ignored == names


@pytest.mark.parametrize(
    ("message", "arrives"),
    [
        # A reasoning model's answer, by either of its names, with text or cut off before it.
        ({"role": "assistant", "content": "15", "reasoning_content": "7 and 8"},
         {"role": "assistant", "content": "15", "reasoning": "7 and 8"}),
        ({"role": "assistant", "content": None, "reasoning": "let me"},
         {"role": "assistant", "content": "", "reasoning": "let me"}),
        ({"role": "assistant", "reasoning": "a", "reasoning_content": "b", "content": "c"},
         {"role": "assistant", "content": "c", "reasoning": "a"}),
        ({"role": "assistant", "content": None, "tool_calls": []},
         {"role": "assistant", "content": ""}),
        # Put together from a stream, or kept as an object.
        ({"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0}]},
         {"role": "assistant", "tool_calls": [CALL]}),
        ({"role": "assistant", "tool_calls": [
            {"id": "call_1", "function": {"name": "f", "arguments": {"a": 1}}}]},
         {"role": "assistant", "tool_calls": [CALL]}),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
         {"role": "assistant", "content": [{"type": "text", "text": "No."}]}),
        ({"role": "assistant", "content": None, "refusal": "No."},
         {"role": "assistant", "content": "No."}),
        ({"role": "assistant", "content": [{"type": "output_text", "text": "hi"}]},
         {"role": "assistant", "content": [{"type": "text", "text": "hi"}]}),
        ({"role": "tool", "content": None, "tool_call_id": "call_1"},
         {"role": "tool", "content": "", "tool_call_id": "call_1"}),
        ({"role": "tool", "content": [], "tool_call_id": "call_1"},
         {"role": "tool", "content": [], "tool_call_id": "call_1"}),
        ({"role": "assistant", "content": "x", "annotations": [{"type": "url_citation"}]},
         {"role": "assistant", "content": "x"}),
        ({"role": "critic 2", "content": "x"}, {"role": "critic 2", "content": "x"}),
        ({"role": "user", "content": ["a", {"type": "text", "text": "b"}]},
         {"role": "user",
          "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
    ],
)  # fmt: skip
def test_history_comes_back_as_clients_keep_it(
    message: dict[str, Any], arrives: dict[str, Any]
) -> None:
    assert sent_back(message) == arrives


def test_an_answer_as_openais_client_dumps_it_can_be_sent_back() -> None:
    choice = {"index": 0, "finish_reason": "tool_calls", "logprobs": None}
    message = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"}
    answer = ChatCompletion.model_validate(
        {"id": "x", "object": "chat.completion", "created": 1, "model": "m",
         "choices": [{**choice, "message": message}]}
    )  # fmt: skip
    dumped = answer.choices[0].message.model_dump()
    assert {"refusal", "annotations", "audio", "function_call"} <= dumped.keys()
    assert dumped.keys() >= set(ChatCompletionMessage.model_fields)
    assert sent_back(dumped) == {"role": "assistant", "tool_calls": [CALL], "reasoning": "hm"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"guided_regex": "a+"}, {"structured_outputs": {"regex": "a+"}}),
        ({"guided_json": {"type": "object"}}, {"structured_outputs": {"json": {"type": "object"}}}),
        ({"guided_choice": ["a", "b"]}, {"structured_outputs": {"choice": ["a", "b"]}}),
        (
            {"guided_json": None, "guided_regex": None, "response_format": {"type": "json_object"}},
            {"response_format": {"type": "json_object"}},
        ),
        ({"max_tokens": 0, "max_completion_tokens": 5}, {"max_completion_tokens": 5}),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}},
            {"response_format": {"type": "text"}},
        ),
        ({"max_tokens": -1}, {}),
        ({"max_tokens": "9"}, {"max_tokens": 9}),
        ({"max_tokens": 3, "max_completion_tokens": 4}, {"max_completion_tokens": 4}),
        ({"max_tokens": 3, "max_completion_tokens": -1}, {}),
        ({"temperature": "0.5"}, {"temperature": 0.5}),
        ({"logit_bias": {"5": 1000}}, {"logit_bias": {"5": 100}}),
        ({"top_p": 0}, {"temperature": 0, "top_k": 1}),
        ({"top_p": 0, "n": 2, "temperature": 0.7}, {"top_k": 1, "n": 2, "temperature": 0.7}),
        ({"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, {}),
        ({"stream_options": {"include_usage": True}}, {}),
        ({"stop": list("abcdefg")}, {"stop": list("abcdefg")}),
    ],
)
def test_what_clients_mean(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert chat(**one) == chat(**other)


def test_as_many_tokens_as_fit() -> None:
    """-1 of llama.cpp's clients; not OpenAI's 16, which is for those who say nothing."""
    body = {"model": "m", "prompt": "a"}
    for fields, default in (({}, 16), ({"max_tokens": None}, 16), ({"max_tokens": -1}, None)):
        (request,) = validated({**body, **fields}, CompletionBody).to_requests("id")
        assert (request.sampling.max_tokens, request.sampling.default_max_tokens) == (None, default)


def test_without_a_model_the_servers_own_is_meant() -> None:
    assert chat(model=None).model == "default"
    assert chat(model="m").model == "m"


def test_what_is_read_is_not_told_as_ignored() -> None:
    parts = [
        {"type": "refusal", "refusal": "No."},
        {"type": "output_text", "text": "hi", "annotations": [], "logprobs": []},
    ]
    body = {"model": "m", "messages": [{"role": "assistant", "content": parts}]}
    assert validated(body, ChatBody, "refuse").ignored == ()


@pytest.mark.parametrize("depth", [100, 900, 950, 960, 990, 2000])
def test_arguments_may_be_deep(depth: int) -> None:
    arguments: Any = {}
    for _ in range(depth):
        arguments = {"a": arguments}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with contextlib.suppress(Invalid):  # and nothing else
        chat(messages=[ASKED, {"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize("other", ["x", [1], 5, {"regex": "b", "json": 1}])
def test_a_constraint_by_two_names_is_refused_and_no_more(other: Any) -> None:
    with pytest.raises(Invalid):
        chat(guided_regex="a", structured_outputs=other)


def test_a_batch_counts_what_it_ignores_once() -> None:
    body = {"model": "m", "prompt": ["a", "b", "c"], "user": "u"}
    requests = validated(body, CompletionBody).to_requests("id")
    assert [request.ignored for request in requests] == [("user",), (), ()]


def test_tokenize_refuses_what_would_give_other_tokens() -> None:
    with pytest.raises(Invalid, match="chat_template"):
        validated({"messages": [ASKED], "chat_template": "x"}, TokenizeChatBody)
    body = {"messages": [ASKED], "reasoning_effort": "low", "documents": [{"text": "x"}]}
    asked = validated(body, TokenizeChatBody).to_request("id", "m")
    assert (asked.chat.reasoning_effort, asked.chat.documents) == ("low", ({"text": "x"},))


def test_names_are_told_as_a_header_can_hold_them() -> None:
    names = ("user", "日本", "a\r\nb: c", "x" * 200, "user", *(f"f{n}" for n in range(99)))
    found = told(names)
    assert found[:2] == ("user", "other")
    assert len(found) == 32
    assert all(PLAIN.fullmatch(name) for name in found)
