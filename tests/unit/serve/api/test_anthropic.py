"""Messages as chat completions: what reaches the request, what is told, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from packhorse.serve.api.anthropic import CountTokensBody, MessagesBody
from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.validation import validated
from packhorse.serve.errors import Invalid
from packhorse.serve.messages import Constraint, GenerateRequest, Message

HI: dict[str, Any] = {
    "model": "m",
    "max_tokens": 9,
    "messages": [{"role": "user", "content": "hi"}],
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: dict[str, Any] = {"name": "f", "description": "d", "input_schema": SCHEMA}
SEARCH: dict[str, Any] = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
HINT = {"cache_control": {"type": "ephemeral"}}


def message(**fields: Any) -> GenerateRequest:
    (request,) = validated({**HI, **fields}, MessagesBody).to_requests("id")
    return request


def chat(**fields: Any) -> GenerateRequest:
    (request,) = validated({**HI, **fields}, ChatBody).to_requests("id")
    return request


def said(*messages: Any, **fields: Any) -> tuple[Message, ...]:
    """The chat messages of these messages."""
    found = message(messages=list(messages), **fields).messages
    assert found is not None
    return found


def text(words: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **fields}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def use(name: str = "f", **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": "call_1", "name": name, "input": arguments}


def result(content: Any = "18 degrees", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "call_1", "content": content, **fields}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aaaa"}}
SEEN = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"city": "N"}'}}


def test_a_message_is_the_chat_that_means_the_same() -> None:
    same: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "ignore_eos": True,
        "logit_bias": {"7": -1}, "bad_words": ["x"], "stream": True, "priority": 3,
        "cache_salt": "s", "chat_template_kwargs": {"a": 1}, "truncate_prompt_tokens": 5,
    }  # fmt: skip
    sent = message(
        **same,
        system="Be brief.",
        stop_sequences=["a", "b"],
        tools=[TOOL],
        tool_choice={"type": "auto", "disable_parallel_tool_use": True},
    )
    messages = [{"role": "system", "content": "Be brief."}, *HI["messages"]]
    function = {"name": "f", "description": "d", "parameters": SCHEMA}
    assert sent == chat(
        **same,
        messages=messages,
        stop=["a", "b"],
        tools=[{"type": "function", "function": function}],
        parallel_tool_calls=False,
    )


@pytest.mark.parametrize(
    ("choice", "chats"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
    ids=str,
)
def test_tool_choices(choice: dict[str, Any], chats: Any) -> None:
    function = {"name": "f", "description": "d", "parameters": SCHEMA}
    tools = [{"type": "function", "function": function}]
    assert message(tools=[TOOL], tool_choice=choice) == chat(tools=tools, tool_choice=chats)


def test_a_strict_tool_stays_strict() -> None:
    (tool,) = message(tools=[{**TOOL, "type": "custom", "strict": True}]).chat.tools
    assert tool["function"]["strict"] is True


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("hi", "hi"),
        ([text("hi")], "hi"),
        ([text("a"), text("b", **HINT)], [text("a"), text("b")]),
        (["a", text("b")], [text("a"), text("b")]),
        ([], ""),
        ([{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "d"},
           "title": "T", "citations": {"enabled": True}}], "T\nd"),
        ([{"type": "document", "source": {"type": "content", "content": [text("a"), text("b")]}}],
         "a\nb"),
        ([{"type": "search_result", "title": "T", "source": "s", "content": [text("found")]}],
         "T\ns\nfound"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_user_says(content: Any, expected: Any) -> None:
    assert said({"role": "user", "content": content}) == ({"role": "user", "content": expected},)


def test_the_system_prompt_is_the_first_message() -> None:
    parts = [text("x-anthropic-billing-header: cch=1;"), text("a", **HINT), text("b")]
    for system, content in (("s", "s"), ([text("s")], "s"), (parts, [text("a"), text("b")])):
        first, _ = said(user("hi"), system=system)
        assert first == {"role": "system", "content": content}
    assert len(said(user("hi"), system=[])) == 1
    assert len(said(user("hi"), system=parts[:1])) == 1


def test_a_system_message_on_the_way_stays_in_its_place() -> None:
    found = said(user("a"), {"role": "system", "content": "s"}, user("b"))
    assert [each["content"] for each in found] == ["a", "s", "b"]


def test_a_turn_with_a_tool() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "any"}
    found = said(
        user("What weather?"),
        assistant(thought, text("Let me look."), use(city="N")),
        user(result(), text("And tomorrow?")),
    )
    assert found[1:] == (
        {"role": "assistant", "content": "Let me look.", "reasoning": "hm", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees"},
        {"role": "user", "content": "And tomorrow?"},
    )


def test_thinking_that_was_left_out_is_none() -> None:
    hidden = {"type": "thinking", "thinking": "", "signature": "s"}
    found = said(user("x"), assistant(hidden, text("y")), user("z"))
    assert found[1] == {"role": "assistant", "content": "y"}


def test_a_call_without_text_has_no_content() -> None:
    assert said(user("x"), assistant(use(city="N")), user(result()))[1] == {
        "role": "assistant",
        "tool_calls": [CALL],
    }


@pytest.mark.parametrize(
    ("sent", "content"),
    [
        (result(), "18 degrees"),
        (result([text("a"), text("b")]), [text("a"), text("b")]),
        (result([text("a")], is_error=False), "a"),
        (result(None), ""),
        (result([]), ""),
        (result("no such city", is_error=True), "Error: no such city"),
        (result("<tool_use_error>no</tool_use_error>", is_error=True),
         "<tool_use_error>no</tool_use_error>"),
        (result(None, is_error=True), "Error"),
        (result([{"type": "tool_reference", "tool_name": "g"}]), "g"),
    ],
    ids=str,
)  # fmt: skip
def test_results_of_tools(sent: dict[str, Any], content: Any) -> None:
    found = said(user("x"), assistant(use()), user(sent))[2]
    assert found == {"role": "tool", "tool_call_id": "call_1", "content": content}


def test_images_are_chats_parts() -> None:
    there = {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}
    assert said(user(IMAGE, text("What is it?"), there))[0]["content"] == [
        SEEN,
        text("What is it?"),
        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
    ]


def test_images_of_results_come_after_the_last_result() -> None:
    both = result([text("a"), IMAGE]), result([IMAGE])
    for more, last in (([], [SEEN, SEEN]), ([text("so?")], [SEEN, SEEN, text("so?")])):
        found = said(user("x"), assistant(use()), user(*both, *more))[2:]
        assert [(each["role"], each["content"]) for each in found] == [
            ("tool", "a"),
            ("tool", "The image follows."),
            ("user", last),
        ]


def test_messages_of_one_role_in_a_row_are_one() -> None:
    found = said(user("a"), user("b"), assistant("c"), assistant("d"), user("e"))
    assert found == (
        {"role": "user", "content": [text("a"), text("b")]},
        {"role": "assistant", "content": "cd"},
        {"role": "user", "content": "e"},
    )


def test_a_last_assistant_message_is_continued() -> None:
    sent = message(messages=[user("x"), assistant(text("The answer is ("))])
    assert sent.chat.continue_final_message
    assert not sent.chat.add_generation_prompt
    for empty in (assistant(), assistant(" "), assistant({"type": "thinking", "thinking": "hm"})):
        plain = message(messages=[user("x"), empty])
        assert plain.messages == ({"role": "user", "content": "x"},)
        assert not plain.chat.continue_final_message


@pytest.mark.parametrize(
    ("fields", "variables", "effort", "shown"),
    [
        ({}, {}, None, True),
        ({"thinking": {"type": "disabled"}}, {}, "none", True),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, {"enable_thinking": True}, None,
         True),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, {"enable_thinking": True}, None,
         False),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, {}, "high", True),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, {}, "none", True),
        ({"output_config": {"effort": "low"}}, {}, "low", True),
    ],
    ids=str,
)  # fmt: skip
def test_thinking(
    fields: dict[str, Any], variables: dict[str, Any], effort: str | None, shown: bool
) -> None:
    options = message(**fields).chat
    assert options.template_variables == variables
    assert options.reasoning_effort == effort
    assert options.include_reasoning is shown


@pytest.mark.parametrize("place", ["output_config", "output_format"])
def test_a_schema_constrains_the_answer(place: str) -> None:
    wanted = {"type": "json_schema", "schema": SCHEMA}
    field = {"format": wanted} if place == "output_config" else wanted
    assert message(**{place: field}).sampling.constraint == Constraint("json", SCHEMA)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        (HINT, ()),
        ({"system": [text("s", **HINT)]}, ()),
        ({"tools": [{**TOOL, **HINT, "eager_input_streaming": True}]}, ()),
        ({"messages": [user(text("x", **HINT, citations=None))]}, ()),
        ({"metadata": {"user_id": "u"}, "service_tier": "auto"}, ("metadata", "service_tier")),
        ({"context_management": {"edits": []}, "betas": ["b"], "container": "c"},
         ("context_management", "betas", "container")),
        ({"tools": [TOOL, SEARCH]}, ("tools.web_search_20250305",)),
        ({"tools": [SEARCH, {"type": "bash_20250124", "name": "bash"}]},
         ("tools.web_search_20250305", "tools.bash_20250124")),
        ({"tools": [{**TOOL, "defer_loading": True}]}, ("tools.defer_loading",)),
        ({"thinking": {"type": "enabled", "budget_tokens": 1}}, ("thinking.budget_tokens",)),
        ({"messages": [user("x"), assistant({"type": "redacted_thinking", "data": "d"}, text("y")),
                       user("z")]}, ("messages.content.redacted_thinking",)),
        ({"max_tokens_to_sample": 3, "n": 1}, ("max_tokens_to_sample",)),
        ({"return_token_ids": True, "stream_options": {}}, ("return_token_ids", "stream_options")),
        ({"tools": [TOOL], "tool_choice": {"type": "any"},
          "output_format": {"type": "json_schema", "schema": {}}}, ("response_format",)),
        (dict.fromkeys(("system", "tools", "tool_choice", "thinking", "metadata", "x")), ()),
    ],
    ids=str,
)  # fmt: skip
def test_what_has_no_effect_is_told(fields: dict[str, Any], names: tuple[str, ...]) -> None:
    assert set(message(**fields).ignored) == set(names)


def test_names_of_chats_fields_are_told_as_messages_fields() -> None:
    body = validated(
        {**HI, "thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, MessagesBody
    )
    names = ["chat_template_kwargs.enable_thinking", "reasoning_effort", "x"]
    assert body.own_names(names) == ["thinking", "output_config.effort", "x"]
    assert validated(HI, MessagesBody).own_names(names) == names


PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf"}}


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"max_tokens": None}, "max_tokens: Field required"),
        ({"max_tokens": 0}, "ask for at least one token"),
        ({"max_tokens": -2}, "max_tokens=-2"),
        ({"n": 2}, "a message has one answer"),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [user({**IMAGE, "source": {"type": "file", "file_id": "f"}})]},
         "an image needs a source of type base64"),
        ({"messages": [user("x"), assistant(IMAGE)]}, "assistant has no block of type image"),
        ({"messages": [user({"type": "search_result", "content": [IMAGE]})]},
         "blocks of type text alone"),
        ({"messages": [user(PDF)]}, "send the document's text"),
        ({"messages": [user({"type": "text"})]}, "a block of type text needs text"),
        ({"messages": [user({"type": "no such TYPE"})]}, "messages.0.content.0.type"),
        ({"messages": [user(use())]}, "a message of role user has no block of type tool_use"),
        ({"messages": [assistant(result())]}, "role assistant has no block of type tool_result"),
        ({"messages": [user({"type": "tool_result"})]}, "needs tool_use_id"),
        ({"messages": [user("x"), assistant({"type": "tool_use", "id": "1"})]}, "needs name"),
        ({"messages": [user("x"), assistant({"type": "server_tool_use", "id": "1"})]},
         "this server runs no tools"),
        ({"messages": [user("x"), assistant(use())]}, "The last message calls tools"),
        ({"tools": [{"name": "f"}]}, "a tool needs a name and an input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "needs the name of one of the tools"),
        ({"tool_choice": {"type": "tool", "name": "g"}, "tools": [TOOL]}, "not among tools"),
        ({"tool_choice": {"type": "tool", "name": "web_search"}, "tools": [TOOL, SEARCH]},
         "a tool that Anthropic defines"),
        ({"tool_choice": {"type": "any"}, "tools": [SEARCH]}, "a tool that Anthropic defines"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"stop_sequences": ["x"] * 65}, "stop_sequences"),
        ({"temperature": 3}, "temperature=3"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(Invalid) as caught:
        message(**fields)
    assert part in caught.value.message
    assert "aaaa" not in caught.value.message


def test_unknown_fields_can_be_refused_but_hints_are_none() -> None:
    validated({**HI, **HINT, "metadata": {}}, MessagesBody, "refuse")
    with pytest.raises(Invalid, match="context_management"):
        validated({**HI, "context_management": {}}, MessagesBody, "refuse")


def test_tokens_are_counted_without_a_limit_on_them() -> None:
    body = validated({**HI, "max_tokens": None}, CountTokensBody)
    (counted,) = body.to_requests("id")
    assert counted.messages == message().messages
