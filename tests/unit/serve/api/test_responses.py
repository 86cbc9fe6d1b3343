"""Responses: bodies to chat requests, tools and their calls, truncation. Over HTTP:
tests/integration/test_responses.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.responses.answer import Answer
from packhorse.serve.api.responses.body import ResponseBody
from packhorse.serve.api.responses.items import InputItem, kept_ids, messages_of
from packhorse.serve.api.responses.store import Kept
from packhorse.serve.api.responses.tools import custom_input
from packhorse.serve.api.responses.truncation import fitting
from packhorse.serve.api.validation import validated
from packhorse.serve.errors import Invalid
from packhorse.serve.messages import Chunk, Constraint, GenerateRequest, ToolCall
from tests.e2e.same_requests import SAME, Same, as_response

FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CUSTOM = {"type": "custom", "name": "run", "description": "Runs."}
NAMESPACE = {"type": "namespace", "name": "files", "description": "x", "tools": [FUNCTION]}


def chat_of(**body: Any) -> ChatBody:
    made = validated({"input": "hi", **body}, ResponseBody)
    said = made.input
    items = [InputItem(role="user", content=said)] if isinstance(said, str) else list(said or ())
    return made.to_chat(items, made.plan())


def request_of(**body: Any) -> GenerateRequest:
    (request,) = chat_of(**body).to_requests("1")
    return request


def messages(*items: dict[str, Any], instructions: str | None = None) -> list[dict[str, Any]]:
    read = validated({"input": list(items)}, ResponseBody).input
    assert isinstance(read, list)
    return messages_of(read, instructions)


@pytest.mark.parametrize("same", SAME, ids=lambda same: same.name)
def test_the_same_said_as_chat_is_the_same_request(same: Same) -> None:
    (chat,) = validated(same.chat, ChatBody).to_requests("1")
    response = request_of(**as_response(same.chat))
    # No text beside calls is said in two ways.
    plain = [
        {k: v for k, v in message.items() if k != "content" or v or "tool_calls" not in message}
        for message in chat.messages or ()
    ]
    assert list(response.messages or ()) == plain
    assert replace(response, messages=chat.messages) == chat


def test_instructions_and_leading_system_messages_are_one() -> None:
    developer = {"role": "developer", "content": [{"type": "input_text", "text": "Two."}]}
    user = {"role": "user", "content": "hi"}
    assert messages(developer, user, instructions="One.") == [
        {"role": "system", "content": "One.\n\nTwo."}, user,
    ]  # fmt: skip
    assert messages(user, developer)[1] == {"role": "system", "content": "Two."}


def test_what_the_assistant_did_in_a_turn_is_one_message() -> None:
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text",
                                                               "text": "hm"}]}  # fmt: skip
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]}
    calls = [
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"x": 1}'},
        {"type": "custom_tool_call", "call_id": "b", "name": "run", "input": 'ls "é"'},
        {
            "type": "function_call", "call_id": "c", "name": "read", "namespace": "files",
            "arguments": {"p": 1},
        },
    ]  # fmt: skip
    made = messages(thought, said, *calls)
    (message,) = made
    assert message["reasoning"] == "hm"
    assert message["content"] == "Let me see."
    functions = [call["function"] for call in message["tool_calls"]]
    assert [function["name"] for function in functions] == ["f", "run", "files__read"]
    assert json.loads(functions[1]["arguments"]) == {"input": 'ls "é"'}
    assert json.loads(functions[2]["arguments"]) == {"p": 1}
    assert len(messages(said, thought, said, said)) == 3
    assert messages({"type": "reasoning", "summary": [], "encrypted_content": "x"}) == []


def test_outputs_of_calls_are_tool_messages() -> None:
    parts = [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]
    made = messages(
        {"type": "function_call_output", "call_id": "a", "output": "x"},
        {"type": "custom_tool_call_output", "call_id": "b", "output": parts},
        {"type": "function_call_output", "call_id": "c", "output": {"y": 1}},
    )
    assert [message["tool_call_id"] for message in made] == ["a", "b", "c"]
    assert made[0]["content"] == "x"
    assert [part["text"] for part in made[1]["content"]] == ["one", "two"]
    assert made[2]["content"] == '{"y": 1}'


def test_what_sdks_dump_is_taken() -> None:
    dumped = {
        "id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
        "phase": None,
        "content": [{"type": "output_text", "text": "yes", "annotations": [], "logprobs": None}],
    }  # fmt: skip
    refused = {**dumped, "content": [{"type": "refusal", "refusal": "no"}]}
    assert messages(dumped, refused) == [
        {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"},
    ]  # fmt: skip
    assert chat_of(input=[dumped, {"role": "user", "content": "hi"}]).ignored == ()


@pytest.mark.parametrize(
    ("item", "word"),
    [
        ({"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}, "image_url"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "text"),
        ({"role": "user", "content": [{"type": "input_file"}]}, "input_file"),
        ({"role": "user"}, "content"),
        ({"content": "hi"}, "role"),
        ({"role": "tool", "content": "hi"}, "role"),
        ({"type": "function_call"}, "name"),
        ({"type": "function_call_output", "call_id": "a"}, "output"),
        ({"type": "local_shell_call", "id": "1"}, "local_shell_call"),
        ({"type": "item_reference"}, "id"),
    ],
)
def test_items_that_cannot_be_read_are_refused(item: dict[str, Any], word: str) -> None:
    with pytest.raises(Invalid, match=word) as caught:
        validated({"input": [item]}, ResponseBody)
    assert (caught.value.param or "").startswith("input")


def test_images_are_what_they_are_in_chat() -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "low"}
    text = {"type": "input_text", "text": "What is it?"}
    made = chat_of(input=[{"role": "user", "content": [text, image]}])
    (message,) = made.as_messages()
    url = {"url": "data:image/png;base64,AA=="}
    assert message["content"][1] == {"type": "image_url", "image_url": url}
    assert made.ignored == ()
    (kept,) = kept_ids([InputItem.model_validate({"role": "user", "content": [image]})], "0" * 32)
    assert kept["content"] == [{**image, "detail": "auto"}]
    assert messages(kept) == [{"role": "user", "content": [message["content"][1]]}]
    with pytest.raises(Invalid, match="image"):
        chat_of(input=[{"role": "developer", "content": [image]}])
    with pytest.raises(Invalid, match="image"):
        chat_of(instructions="x", input=[{"role": "developer", "content": [text, image]}])


def test_histories_of_hosted_tools_are_left_out_and_told() -> None:
    items = [{"type": "web_search_call", "id": "ws_1", "action": {"query": "x"}},
             {"role": "user", "content": "hi"}]  # fmt: skip
    chat = chat_of(input=items)
    assert chat.ignored == ("input.web_search_call",)
    assert len(chat.messages) == 1


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"n": 2}, "n"),
        ({"max_tokens": 5}, "max_output_tokens"),
        ({"max_completion_tokens": 5}, "max_output_tokens"),
        ({"response_format": {"type": "json_object"}}, "text.format"),
        ({"conversation": "c"}, "previous_response_id"),
        ({"prompt": {"id": "p"}}, "instructions"),
        ({"background": True, "store": False}, "store"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "16"),
        ({"metadata": {"x": "y" * 513}}, "512"),
        ({"max_output_tokens": 0}, "at least one"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "schema"),
        ({"tool_choice": "required", "tools": [{"type": "web_search"}]}, "required"),
        ({"tool_choice": {"type": "web_search"}, "tools": [{"type": "web_search"}]}, "hosted"),
        ({"tool_choice": {"type": "function", "name": "g"}, "tools": [FUNCTION]}, "not among"),
        (
            {
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "g"}]},
                "tools": [FUNCTION],
            },
            "not among",
        ),
        ({"tools": [{"type": "custom"}]}, "name"),
    ],
)
def test_what_would_change_the_answer_is_refused(body: dict[str, Any], word: str) -> None:
    with pytest.raises(Invalid, match=word):
        chat_of(**body)


def test_faults_have_this_apis_names() -> None:
    with pytest.raises(Invalid) as caught:
        chat_of(max_output_tokens=-2)
    assert caught.value.param == "max_output_tokens"
    nested: dict[str, Any] = {"format": {"type": "other"}}
    with pytest.raises(Invalid) as caught:
        chat_of(text=nested)
    assert caught.value.param == "text.format.type"


def test_tools_become_functions() -> None:
    chat = chat_of(tools=[FUNCTION, CUSTOM, NAMESPACE, {"type": "web_search", "x": {"y": 1}}])
    functions = [tool.function for tool in chat.tools or ()]
    assert [function.name for function in functions] == ["f", "run", "files__f"]
    schema = functions[1].parameters
    assert schema is not None
    assert schema["required"] == ["input"]
    assert chat.ignored == ("tools.web_search",)
    assert request_of(tools=[{"type": "web_search"}]).chat.tools == ()


def test_a_grammar_is_told_to_the_model() -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /a+/"}
    chat = chat_of(tools=[{**CUSTOM, "format": grammar}])
    (tool,) = chat.tools or ()
    assert tool.function.description == (
        "Runs.\n\nThe input follows this lark grammar:\nstart: /a+/"
    )
    assert chat.ignored == ("tools.format",)


@pytest.mark.parametrize(
    ("choice", "expected", "named"),
    [
        (None, "auto", None),
        ("none", "none", None),
        ("required", "required", None),
        ({"type": "function", "name": "f"}, "named", "f"),
        ({"type": "function", "function": {"name": "f"}}, "named", "f"),
        ({"type": "custom", "name": "run"}, "named", "run"),
        ({"type": "function", "name": "f", "namespace": "files"}, "named", "files__f"),
    ],
)
def test_choices_of_tools(choice: Any, expected: str, named: str | None) -> None:
    options = request_of(tools=[FUNCTION, CUSTOM, NAMESPACE], tool_choice=choice).chat
    assert (options.tool_choice, options.named_tool) == (expected, named)


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_are_offered(mode: str) -> None:
    allowed = [{"type": "custom", "name": "run"}, {"type": "web_search"}]
    choice = {"type": "allowed_tools", "mode": mode, "tools": allowed}
    options = request_of(tools=[FUNCTION, CUSTOM], tool_choice=choice).chat
    assert [tool["function"]["name"] for tool in options.tools] == ["run"]
    assert options.tool_choice == mode


def test_a_forced_call_needs_no_format() -> None:
    form = {"format": {"type": "json_object"}}
    chat = chat_of(text=form, tools=[FUNCTION], tool_choice="required")
    assert chat.ignored == ("text.format",)
    assert request_of(text=form).sampling.constraint == Constraint("json_object", True)


def test_vllms_fields_are_taken() -> None:
    request = request_of(
        top_k=3, min_p=0.1, seed=4, stop=["x"], cache_salt="s", priority=2, timeout_s=3,
        repetition_penalty=1.1, structured_outputs={"regex": "a+"}, guided_json=None,
        chat_template_kwargs={"enable_thinking": False}, skip_special_tokens=False,
        request_id="x", enable_response_messages=False,
    )  # fmt: skip
    sampling = request.sampling
    assert (sampling.top_k, sampling.min_p, sampling.seed, sampling.stop) == (3, 0.1, 4, ("x",))
    assert (request.cache_salt, request.priority) == ("s", 2)
    assert sampling.constraint == Constraint("regex", "a+")
    assert request.chat.template_variables == {"enable_thinking": False}
    assert not sampling.skip_special_tokens
    assert set(request.ignored) == {"request_id", "enable_response_messages"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"input": "ls -l"}', "ls -l"),
        ('{"input": "a\\nb \\u00e9 \\ud83d\\ude00"}', "a\nb é 😀"),
        ('{"input": "a\\nb', "a\nb"),
        ('{"input": "a\\', "a"),
        ('{"input": "a\\u00', "a"),
        ('{"input": "a"', "a"),
        ('{"input": ', '{"input": '),
        ("ls -l", "ls -l"),
        ('{"other": 1}', '{"other": 1}'),
        ('["input"]', '["input"]'),
        ('{"input": 5}', '{"input": 5}'),
        ("", ""),
    ],
)
def test_free_text_is_read_out_of_arguments(arguments: str, expected: str) -> None:
    assert custom_input(arguments) == expected


def test_the_rest_of_a_call_comes_before_text_of_the_same_chunk() -> None:
    """Chunks of a slow reader are joined."""
    body = validated({"input": "hi", "tools": [FUNCTION]}, ResponseBody)
    answer = Answer(body, body.plan(), "0" * 32)
    answer.add(Chunk("", [1], tool_calls=(ToolCall(0, '{"a": ', "call_0", "f"),)))
    events = answer.add(Chunk("Then.", [2], "stop", tool_calls=(ToolCall(0, "1}"),)))
    done = dict(events)["response.function_call_arguments.done"]
    assert done["arguments"] == '{"a": 1}'
    call, message = answer.document()["output"]
    assert (call["arguments"], message["content"][0]["text"]) == ('{"a": 1}', "Then.")


def test_half_a_character_is_kept_as_a_question_mark() -> None:
    kept = Kept({"output": [{"text": "a\ud83d"}]}, [{"text": "😀"}], 1.5)
    back = Kept.decoded(kept.encoded())
    assert back == Kept({"output": [{"text": "a?"}]}, [{"text": "😀"}], 1.5)


def test_items_without_an_id_get_one_of_their_response() -> None:
    items = [InputItem(role="user", content="a"), InputItem(id="msg_x", role="user", content="b")]
    documents = kept_ids(items, "0" * 32)
    assert [document["id"] for document in documents] == [f"msg_{'0' * 32}_i0", "msg_x"]


# Truncation


def item(kind: str) -> InputItem:
    """`user`, or `call:a` and `output:a`; of one word."""
    name, _, call_id = kind.partition(":")
    if name == "call":
        return InputItem(type="function_call", call_id=call_id, name="f", arguments="w")
    if name == "output":
        return InputItem(type="function_call_output", call_id=call_id, output="w")
    return InputItem(role=name, content="w")  # type: ignore[arg-type]


async def words_of(items: Sequence[InputItem]) -> int:
    return sum(
        len((i.text or i.arguments or (i.output if isinstance(i.output, str) else "")).split())
        for i in items
    )


@pytest.mark.parametrize(
    ("kinds", "room", "left"),
    [
        ("user assistant user", 3, "user assistant user"),
        ("user assistant user", 2, "user"),
        ("system user assistant user", 2, "system user"),
        ("user user user user", 3, "user user user"),
        ("user call:a output:a user assistant user", 3, "user assistant user"),
        # One turn that is too long: whole calls go, its question last.
        ("user call:a output:a call:b output:b", 3, "call output"),
        ("user call:a call:b output:a output:b assistant", 2, "assistant"),
        # Even the shortest does not fit: the engine says so.
        ("user assistant user", 0, "user"),
        ("user", 0, "user"),
        ("system", 0, "system"),
    ],
)
async def test_the_oldest_items_go_first(kinds: str, room: int, left: str) -> None:
    items = [item(kind) for kind in kinds.split()]
    kept = await fitting(items, words_of, room * 2, room)  # half of the context is the answer's
    names = [one.role or {"function_call": "call"}.get(one.type, "output") for one in kept]
    assert " ".join(names) == left


async def test_few_looks_find_the_place() -> None:
    looks = 0

    async def counted(items: Sequence[InputItem]) -> int:
        nonlocal looks
        looks += 1
        return await words_of(items)

    kept = await fitting([item("user") for _ in range(1000)], counted, 200, 100)
    assert len(kept) == 100
    assert looks <= 12
