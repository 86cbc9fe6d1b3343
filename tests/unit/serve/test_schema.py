"""Request bodies: what is taken over, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serve.errors import Invalid
from serve.messages import Sampling
from serve.rest.errors import invalid_from
from serve.rest.schema import ChatBody, CompletionBody

HI = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat(**fields: Any) -> ChatBody:
    try:
        return ChatBody.model_validate({**HI, **fields})
    except ValidationError as error:
        raise invalid_from(error) from error


def test_every_sampling_field_arrives() -> None:
    values: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.2,
        "frequency_penalty": -0.2, "repetition_penalty": 1.1, "seed": 7, "min_tokens": 2,
        "ignore_eos": True,
    }  # fmt: skip
    sampling = chat(**values, stop=["a", "b"], max_completion_tokens=9).to_request("id").sampling
    assert chat().to_request("id").sampling == Sampling()
    assert {name: getattr(sampling, name) for name in values} == values
    assert sampling.stop == ("a", "b")
    assert sampling.max_tokens == 9


def test_zero_is_not_unset() -> None:
    assert chat(temperature=0, seed=0).to_request("id").sampling.temperature == 0
    assert chat(seed=0).to_request("id").sampling.seed == 0


def test_a_completion_has_openais_default_length() -> None:
    body = CompletionBody.model_validate({"model": "m", "prompt": [1, 2]})
    request = body.to_request("id")
    assert request.prompt == (1, 2)
    assert (request.sampling.max_tokens, request.sampling.default_max_tokens) == (None, 16)


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"max_tokens": -1}, "max_tokens=-1: should be greater than or equal to 1", "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens: should be a valid integer", "max_tokens"),
        ({"max_tokens": True}, "max_tokens=True: should be a valid integer", "max_tokens"),
        ({"temperature": 3}, "temperature=3", "temperature"),
        (
            {"temperature": float("nan")},
            "temperature=nan: should be a finite number",
            "temperature",
        ),
        ({"top_k": -2}, "top_k=-2", "top_k"),
        ({"n": 2}, "n=2", "n"),
        ({"messages": []}, "messages", "messages"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages.0.role", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "a message of role user needs content", "messages.0"),
        ({"frobnicate": 1}, "frobnicate: this server knows no such field", "frobnicate"),
        ({"top_k": 10**30}, "top_k", "top_k"),
        ({"stop": [""]}, "stop.0: ", "stop.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content.0", None),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream=true", None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tool_choice='none'", None),
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


@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": 1, "max_completion_tokens": 2}, {"max_tokens": 1, "min_tokens": 2}],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match="max_tokens=1"):
        chat(**fields).to_request("id")


def test_what_the_user_wrote_is_never_repeated_in_an_error() -> None:
    with pytest.raises(Invalid) as caught:
        chat(messages=[{"role": "user", "content": "secret", "mood": "secret"}])
    assert "secret" not in caught.value.message
