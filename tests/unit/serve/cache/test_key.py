"""What changes an answer changes the key; what does not, does not."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse.serve.api.chat import ChatBody
from packhorse.serve.cache.key import is_repeatable, scopes_of
from packhorse.serve.messages import (
    CachePolicy,
    ChatOptions,
    Constraint,
    EffectiveSampling,
    GenerateRequest,
    Prompt,
    Route,
    Sampling,
)
from tests.unit.serve.cache.making import GREEDY, ask, caller, digest, version

PROMPT = Prompt((1, 2, 3), 10, effective_sampling=GREEDY)
# Another value for every field of Sampling. What the engine settles is below.
OTHER_SAMPLING: dict[str, Any] = {
    "min_tokens": 1,
    "n": 2,
    "stop": ("x",),
    "stop_token_ids": (7,),
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "logit_bias": {3: 1.0},
    "bad_words": ("damn",),
    "allowed_token_ids": (1, 2),
    "logprobs": 0,
    "prompt_logprobs": 0,
    "constraint": Constraint("regex", "a+"),
}
# Their effect is in the prompt: the sampling in effect, and how many tokens the answer may have.
BY_PROMPT = {"max_tokens", "default_max_tokens", *EffectiveSampling._fields}
SAMPLED = EffectiveSampling(temperature=0.7, seed=1)
OTHER_EFFECTIVE: dict[str, Any] = {
    "temperature": 0.8,
    "top_p": 0.9,
    "top_k": 3,
    "min_p": 0.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "seed": 2,
}
OTHER_CHAT: dict[str, Any] = {
    "tools": ({"type": "function", "function": {"name": "f"}},),
    "tool_choice": "required",
    "named_tool": "f",
    "parallel_tool_calls": False,
    "include_reasoning": False,
    "reasoning_effort": "low",
    "add_generation_prompt": False,
    "continue_final_message": True,
    "documents": ({"text": "x"},),
    "template_variables": {"enable_thinking": False},
}


def test_the_tables_name_every_field() -> None:
    assert set(OTHER_SAMPLING) | BY_PROMPT == {field.name for field in fields(Sampling)}
    assert set(OTHER_EFFECTIVE) == set(EffectiveSampling._fields)
    assert set(OTHER_CHAT) == {field.name for field in fields(ChatOptions)}


@pytest.mark.parametrize("name", OTHER_SAMPLING)
def test_every_sampling_field_is_in_it(name: str) -> None:
    assert digest(ask(**{name: OTHER_SAMPLING[name]})) != digest(ask())


@pytest.mark.parametrize("name", OTHER_EFFECTIVE)
def test_every_effective_parameter_is_in_it(name: str) -> None:
    one = replace(PROMPT, effective_sampling=SAMPLED)
    other = replace(PROMPT, effective_sampling=SAMPLED._replace(**{name: OTHER_EFFECTIVE[name]}))
    assert digest(prompt=one) != digest(prompt=other)


@pytest.mark.parametrize("name", OTHER_CHAT)
def test_how_an_answer_is_parsed_is_in_it(name: str) -> None:
    one, parsed = ask(), replace(PROMPT, is_parsed=True)
    other = replace(one, chat=replace(one.chat, **{name: OTHER_CHAT[name]}))
    assert digest(one, prompt=parsed) != digest(other, prompt=parsed)


@pytest.mark.parametrize(
    "other",
    [
        {"fingerprint": b"other"},
        {"salt": "u" * 32},
        {"epochs": ["1", "", ""]},
        {"epochs": ["", "1", ""]},
        {"route": Route("other")},
        {"route": Route("echo", version())},
        {"prompt": replace(PROMPT, token_ids=(1, 2, 4))},
        {"prompt": replace(PROMPT, token_ids=(1, 2))},
        {"prompt": replace(PROMPT, max_tokens=11)},
        {"prompt": replace(PROMPT, is_parsed=True)},
    ],
    ids=str,
)
def test_everything_around_the_request_is_in_it(other: dict[str, Any]) -> None:
    assert digest(**other) != digest()


def test_another_version_of_an_adapter_is_another_key() -> None:
    one, two = Route("echo", version()), Route("echo", version(digest="b" * 64))
    assert digest(route=one) != digest(route=two)


@pytest.mark.parametrize(
    "same",
    [
        {"request_id": "other"},
        {"stream": True},
        {"priority": 3},
        {"timeout_s": 3.0},
        {"caller": caller("anonymous", max_concurrent=1)},
        {"cache": CachePolicy("always", 3.0)},
        {"echo": True},
        {"messages": ({"role": "user", "content": "rendered to the same tokens"},)},
    ],
    ids=str,
)
def test_what_changes_no_answer_is_not_in_it(same: dict[str, Any]) -> None:
    assert digest(replace(ask(), **same)) == digest()


def test_streams_of_parsed_answers_are_apart() -> None:
    parsed = replace(PROMPT, is_parsed=True)
    assert digest(ask(stream=True), prompt=parsed) != digest(ask(), prompt=parsed)


def test_sets_have_no_order() -> None:
    one = ask(stop_token_ids=(1, 2), bad_words=("a", "b"), logit_bias={1: 0.5, 2: 1.0})
    two = ask(stop_token_ids=(2, 1, 1), bad_words=("b", "a"), logit_bias={2: 1.0, 1: 0.5})
    assert digest(one) == digest(two)


def test_the_order_of_a_schema_counts() -> None:
    """It is the order in which the model writes."""
    one = Constraint("json", {"properties": {"a": {}, "b": {}}})
    two = Constraint("json", {"properties": {"b": {}, "a": {}}})
    assert digest(ask(constraint=one)) != digest(ask(constraint=two))


def test_without_effect_at_temperature_0() -> None:
    other = GREEDY._replace(seed=3, top_p=0.5, top_k=4, min_p=0.1)
    assert digest(prompt=replace(PROMPT, effective_sampling=other)) == digest()


def request_of(body: dict[str, Any]) -> GenerateRequest:
    (request,) = ChatBody.model_validate_json(json.dumps(body)).to_requests("id")
    return request


BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
WRITTEN_OUT = {
    "n": 1,
    "min_tokens": 0,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "stop": [],
    "logit_bias": {},
    "stream": False,
    "tool_choice": "none",
    "user": "x",
    "logprobs": False,
}


@given(st.permutations([*BODY, *WRITTEN_OUT]), st.sets(st.sampled_from([*WRITTEN_OUT])))
def test_neither_order_nor_defaults_written_out_change_it(
    order: list[str], left_out: set[str]
) -> None:
    full = {**BODY, **WRITTEN_OUT}
    body = {name: full[name] for name in order if name not in left_out}
    assert digest(request_of(body)) == digest(request_of(BODY))


def test_aliases_are_one_field() -> None:
    one = request_of({**BODY, "max_tokens": 5, "stop": "x"})
    two = request_of({**BODY, "max_completion_tokens": 5, "stop": ["x"]})
    assert one.sampling == two.sampling
    assert digest(one) == digest(two)


tokens = st.lists(st.integers(0, 2**31 - 1), max_size=8).map(tuple)


@given(tokens, tokens, st.integers(1, 99), st.integers(1, 99))
def test_equal_only_if_all_is_equal(
    one: tuple[int, ...], two: tuple[int, ...], most: int, other_most: int
) -> None:
    first = digest(prompt=replace(PROMPT, token_ids=one, max_tokens=most))
    second = digest(prompt=replace(PROMPT, token_ids=two, max_tokens=other_most))
    assert (first == second) == (one == two and most == other_most)


@pytest.mark.parametrize(
    ("effective", "seed", "expected"),
    [
        (GREEDY, None, True),
        (GREEDY, 1, True),
        (SAMPLED, 1, True),
        (EffectiveSampling(), None, False),
        (SAMPLED, None, False),
        (EffectiveSampling(), -1, False),
    ],
)
def test_what_is_repeatable(effective: EffectiveSampling, seed: int | None, expected: bool) -> None:
    """A seed counts when the request itself has it (that of the server is one for all), and the
    engine takes it for one: -1 is "random" to vLLM.
    """
    assert is_repeatable(ask(seed=seed), replace(PROMPT, effective_sampling=effective)) is expected


def test_scopes() -> None:
    assert scopes_of(Route("m", version("clinic")), b"\x01\x02") == (
        "all",
        "model:m",
        "adapter:clinic",
        "tenant:0102",
    )
