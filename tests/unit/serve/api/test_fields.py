"""Request bodies: which fields reach the request, and which are refused with which message."""

from __future__ import annotations

from typing import Any

import pytest

from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.completions import CompletionBody
from packhorse.serve.api.validation import validated
from packhorse.serve.errors import Invalid
from packhorse.serve.messages import ChatOptions, Constraint, GenerateRequest, Sampling

HI = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


def chat(**fields: Any) -> GenerateRequest:
    (request,) = validated({**HI, **fields}, ChatBody).to_requests("id")
    return request


def complete(**fields: Any) -> list[GenerateRequest]:
    return validated({"model": "m", **fields}, CompletionBody).to_requests("id")


def test_every_sampling_field_arrives() -> None:
    values: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.2,
        "frequency_penalty": -0.2, "repetition_penalty": 1.1, "seed": 7, "min_tokens": 2,
        "ignore_eos": True, "n": 3, "include_stop_str_in_output": True,
        "skip_special_tokens": False, "spaces_between_special_tokens": False,
        "prompt_logprobs": 2,
    }  # fmt: skip
    lists: dict[str, Any] = {
        "stop": ["a", "b"], "stop_token_ids": [1], "bad_words": ["c"], "allowed_token_ids": [4, 5],
    }  # fmt: skip
    sampling = chat(
        **values, **lists, logit_bias={"7": -1}, max_completion_tokens=9, logprobs=True
    ).sampling
    assert {name: getattr(sampling, name) for name in values} == values
    assert {name: list(getattr(sampling, name)) for name in lists} == lists
    assert sampling.logit_bias == {7: -1}
    assert (sampling.max_tokens, sampling.logprobs) == (9, 0)


def test_what_is_not_sent_is_left_to_the_model() -> None:
    assert chat().sampling == Sampling()
    assert chat().chat == ChatOptions()


def test_zero_is_not_unset() -> None:
    assert chat(temperature=0, seed=0).sampling.temperature == 0
    assert chat(seed=0).sampling.seed == 0


def test_fields_without_effect_change_nothing() -> None:
    silent: dict[str, Any] = {
        "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
        "safety_identifier": "s", "prompt_cache_key": "k", "modalities": ["text"],
    }  # fmt: skip
    assert chat(**silent) == chat()


def test_a_completion_has_openais_default_length() -> None:
    (request,) = complete(prompt=[1, 2])
    assert request.prompt == (1, 2)
    assert (request.sampling.max_tokens, request.sampling.default_max_tokens) == (None, 16)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a b", ["a b"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ],
)
def test_a_batch_is_one_request_a_prompt(prompt: Any, prompts: list[Any]) -> None:
    requests = complete(prompt=prompt)
    assert [request.prompt for request in requests] == prompts
    assert len({request.request_id for request in requests}) == len(prompts)


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint("json_object", True)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "object"}},
                }
            },
            Constraint("json", {"type": "object"}),
        ),
        ({"structured_outputs": {"json": {"a": 1}}}, Constraint("json", {"a": 1})),
        ({"structured_outputs": {"json": '{"a": 1}'}}, Constraint("json", {"a": 1})),
        ({"structured_outputs": {"regex": "a+"}}, Constraint("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Constraint("choice", ("a", "b"))),
        ({"structured_outputs": {"grammar": "g"}}, Constraint("grammar", "g")),
        ({"structured_outputs": {"json_object": True}}, Constraint("json_object", True)),
    ],
)
def test_both_ways_to_constrain_an_answer(
    fields: dict[str, Any], constraint: Constraint | None
) -> None:
    assert chat(**fields).sampling.constraint == constraint


def test_tools_are_the_models_choice_unless_said_otherwise() -> None:
    named = {"type": "function", "function": {"name": "f"}}
    assert chat(tools=[TOOL]).chat.tool_choice == "auto"
    assert chat(tools=[TOOL], tool_choice="none").chat.tool_choice == "none"
    assert chat(tools=[TOOL], tool_choice=named).chat.named_tool == "f"
    assert chat(tools=[TOOL], parallel_tool_calls=False).chat.parallel_tool_calls is False


def test_echo_alone_asks_the_engine_for_one_token() -> None:
    (request,) = complete(prompt="a", echo=True, max_tokens=0, logprobs=2)
    assert request.echo
    assert (request.sampling.max_tokens, request.sampling.prompt_logprobs) == (1, 2)


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"max_tokens": -2}, "max_tokens=-2: should be greater than or equal to -1", "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens: should be a valid integer", "max_tokens"),
        ({"max_tokens": 0}, "max_tokens=0 leaves no answer", None),
        ({"temperature": 3}, "temperature=3", "temperature"),
        (
            {"temperature": float("nan")},
            "temperature=nan: should be a finite number",
            "temperature",
        ),
        ({"top_k": -2}, "top_k=-2", "top_k"),
        ({"n": 129}, "n=129", "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias: the keys must be token ids", "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs=true", None),
        ({"prompt_logprobs": 1, "stream": True}, "not streamed", None),
        ({"n": 2, "seed": 2**63 - 1}, "choose a lower seed", None),
        ({"response_format": {"type": "json_schema"}}, "comes with a json_schema", None),
        ({"structured_outputs": {}}, "exactly one of json", None),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one of json", None),
        ({"structured_outputs": {"json": "{"}}, "the schema's text is not JSON", None),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "not both",
            None,
        ),
        ({"tool_choice": "required"}, "tool_choice needs tools", None),
        ({"tool_choice": "required", "tools": []}, "tool_choice needs tools", None),
        ({"include_reasoning": False, "return_token_ids": True}, "hides tokens", None),
        ({"stop": ["a"] * 65}, "stop", "stop"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "names a tool that is not among tools",
            None,
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": "required",
                "structured_outputs": {"regex": "a"},
            },
            "a forced tool call has its own form",
            None,
        ),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "exclude each other",
            None,
        ),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "is the server's to decide", None),
        ({"messages": []}, "messages", "messages"),
        ({"messages": [{"role": "a\nb", "content": "x"}]}, "messages.0.role", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "a message of role user needs content", "messages.0"),
        ({"top_k": 10**30}, "top_k", "top_k"),
        ({"stop": [""]}, "stop.0: ", "stop.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content.0", None),
        ({"best_of": 4}, "best_of: not supported here", "best_of"),
        ({"modalities": ["text", "audio"]}, "modalities.1", "modalities.1"),
        ({"functions": [{"name": "f"}]}, "send tools and tool_choice", "functions"),
    ],
)
def test_a_bad_field_is_named_with_its_value(
    fields: dict[str, Any], message: str, param: str | None
) -> None:
    with pytest.raises(Invalid) as caught:
        chat(**fields)
    assert message in caught.value.message
    if param is not None:
        assert caught.value.param == param


def test_fields_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(Invalid, match="min_tokens=2 is above max_tokens=1"):
        chat(max_tokens=1, min_tokens=2)


def test_what_the_user_wrote_is_never_repeated_in_an_error() -> None:
    with pytest.raises(Invalid) as caught:
        chat(messages=[{"role": "user", "content": {"secret": "secret"}}])
    assert "secret" not in caught.value.message


def test_a_slip_of_the_pen_is_told_where_that_is_wanted() -> None:
    for fields in ({"frobnicate": 1}, {"messages": [{**HI["messages"][0], "frobnicate": 1}]}):
        assert validated({**HI, **fields}, ChatBody).ignored[0].endswith("frobnicate")
        with pytest.raises(Invalid, match=r"frobnicate: this server knows no such field"):
            validated({**HI, **fields}, ChatBody, "refuse")
    # What is known, or would do nothing, is no slip.
    validated({**HI, "user": "u", "best_of": 1, "frobnicate": None}, ChatBody, "refuse")
