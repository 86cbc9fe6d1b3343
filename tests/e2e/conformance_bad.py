"""Requests that must be refused, and those that plain vLLM takes and we refuse on purpose.

A row without `ours` asks for the status class of plain vLLM. One with it says why.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.client import CHAT, TEXT
from tests.e2e.conformance import ABSENT, MODEL, Row, changed, chat, text
from tests.e2e.conformance_good import GET_WEATHER, named, schema_format

OTHER_ANSWER = "the answer would be another without it, and vLLM ignores it"
DROPPED = "vLLM drops it without a word"
FAILS = "vLLM fails on it with 500"
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]


JSON_OBJECT: Any = {"response_format": {"type": "json_object"}}
NAMED: Any = {"tools": [GET_WEATHER], "tool_choice": named("get_weather")}
REQUIRED: Any = {"tools": [GET_WEATHER], "tool_choice": "required"}
NO_NAME: Any = {"type": "function"}
HELLO = {"role": "user", "content": "Hello!"}


def refused(row: Row, status: int = 400) -> Row:
    return replace(row, status=status)


def ours_only(row: Row, why: str, *, plain: int = 200) -> Row:
    """Plain vLLM answers with `plain`, we with 400."""
    return replace(row, status=plain, ours=400, why=why)


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def deep_call() -> dict[str, Any]:
    function = {"name": "f", "arguments": "[" * 5000}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def tokenize(name: str, status: int, **fields: Any) -> Row:
    return Row(name, "/tokenize", changed({"model": MODEL}, fields), status=status)


def detokenize(name: str, status: int, **fields: Any) -> Row:
    return Row(name, "/detokenize", changed({"model": MODEL}, fields), status=status)


BAD: list[Row] = [
    # The envelope.
    Row("not JSON", CHAT, raw=b"{", status=400),
    Row("an empty body", TEXT, raw=b"", status=400),
    Row("a list", CHAT, raw=b"[]", status=400),
    Row("half a surrogate pair", TEXT, raw=b'{"model":"demo","prompt":"\\ud800"}', status=400),
    Row("NaN", TEXT, raw=b'{"model":"demo","prompt":"a","temperature":NaN}', status=400),
    Row("GET of a POST", CHAT, method="GET", status=405),
    Row("no such path", "/v1/nothing", status=404),
    Row("no such model's card", "/v1/models/other", method="GET", status=404),
    refused(chat("another model", model="other"), 404),
    refused(text("another model, as text", model="other"), 404),
    # Messages and prompts.
    refused(chat("no messages", messages=ABSENT)),
    refused(chat("messages as text", messages="Hello!")),
    refused(chat("empty messages", messages=[])),
    refused(chat("a message without a role", messages=[{"content": "Hello!"}])),
    refused(chat("an image for a text model", IMAGE)),
    refused(chat("a part of no known kind", [{"type": "smell", "smell": "rose"}])),
    refused(chat("a number as content", 5)),
    refused(chat("a prompt beyond the context", "one two " * 300)),
    refused(text("no prompt", prompt=ABSENT)),
    refused(text("an empty prompt", "")),
    refused(text("an empty list", [])),
    refused(text("an empty list of ids", [[]])),
    refused(text("text and ids", ["a", 1])),
    refused(text("an id beyond the vocabulary", [2048])),
    refused(text("a negative id", [-1])),
    refused(text("a prompt of 256 tokens", [301] * 256)),
    refused(text("one empty prompt of two", ["a", ""])),
    refused(text("one prompt of two beyond the context", ["a", "one two " * 300])),
    refused(text("a null as a prompt's token", [None])),
    refused(text("an object as a prompt", {"a": 1})),
    refused(text("suffix", suffix=" and")),
    # Limits.
    refused(chat("max_completion_tokens 0", max_completion_tokens=0)),
    refused(text("max_tokens 0 without echo", max_tokens=0)),
    refused(text("min_tokens above max_tokens", min_tokens=20)),
    refused(text("min_tokens -1", min_tokens=-1)),
    refused(text("half a token", max_tokens=5.5)),
    refused(text("71 bits of max_tokens", max_tokens=2**70)),
    refused(text("truncate_prompt_tokens 0", truncate_prompt_tokens=0)),
    refused(text("truncate_prompt_tokens -2", truncate_prompt_tokens=-2)),
    refused(text("truncate_prompt_tokens above the context", truncate_prompt_tokens=300)),
    # Sampling.
    refused(chat("temperature -1", temperature=-1)),
    refused(chat("temperature 3", temperature=3)),
    refused(chat("temperature as a word", temperature="hot")),
    refused(text("top_p 1.1", top_p=1.1)),
    refused(text("top_k -2", top_k=-2)),
    refused(text("top_k 1.5", top_k=1.5)),
    refused(text("min_p 2", min_p=2)),
    refused(text("presence_penalty 3", presence_penalty=3)),
    refused(text("repetition_penalty 0", repetition_penalty=0)),
    refused(text("a seed of 71 bits", seed=2**70)),
    refused(chat("n 0", n=0, temperature=1)),
    refused(chat("n 2 when greedy", n=2)),
    refused(chat("n beyond bounds", n=10**6, temperature=1)),
    refused(text("an empty stop string", stop="")),
    refused(text("numbers as stop strings", stop=[1])),
    refused(text("a stop token beyond the vocabulary", stop_token_ids=[99_999])),
    refused(text("logit_bias for a word", logit_bias={"word": 1})),
    refused(text("logit_bias beyond the vocabulary", logit_bias={"99999": 1})),
    refused(text("no allowed_token_ids", allowed_token_ids=[])),
    refused(text("allowed_token_ids beyond the vocabulary", allowed_token_ids=[99_999])),
    refused(text("an empty bad word", bad_words=[""])),
    # Logprobs.
    refused(chat("top_logprobs alone", top_logprobs=1)),
    refused(chat("top_logprobs 21", logprobs=True, top_logprobs=21)),
    refused(chat("top_logprobs -2", logprobs=True, top_logprobs=-2)),
    refused(text("logprobs 21", logprobs=21)),
    refused(text("logprobs -2", logprobs=-2)),
    refused(text("logprobs as a word", logprobs="many")),
    refused(text("prompt_logprobs 21", prompt_logprobs=21)),
    refused(text("prompt_logprobs streamed", prompt_logprobs=1, stream=True)),
    # Streams.
    refused(chat("stream_options as a list", stream=True, stream_options=[1])),
    refused(chat("stream as a word", stream="maybe")),
    # Structured outputs.
    refused(chat("an unknown format", response_format={"type": "xml"})),
    refused(chat("a schema format without one", response_format={"type": "json_schema"})),
    refused(chat("a schema of no known type", response_format=schema_format({"type": "horse"}))),
    refused(
        chat(
            "a schema format without its schema",
            response_format={"type": "json_schema", "json_schema": {"name": "x"}},
        )
    ),
    refused(chat("a schema of text that is no JSON", structured_outputs={"json": "{"})),
    refused(chat("a regex that looks ahead", structured_outputs={"regex": "(?=a)b"})),
    refused(chat("a grammar with a missing rule", structured_outputs={"grammar": "root ::= a"})),
    refused(chat("numbers as choices", structured_outputs={"choice": [1, 2]})),
    refused(chat("a format and a constraint", structured_outputs={"regex": "a"}, **JSON_OBJECT)),
    refused(chat("two constraints", structured_outputs={"regex": "a", "choice": ["b"]})),
    refused(chat("no constraint", structured_outputs={})),
    refused(chat("no choices", structured_outputs={"choice": []})),
    refused(chat("a bad regex", structured_outputs={"regex": "("})),
    refused(chat("a bad grammar", structured_outputs={"grammar": "root ::= ("})),
    refused(chat("an empty grammar", structured_outputs={"grammar": ""})),
    refused(chat("json_object false", structured_outputs={"json_object": False})),
    # Tools.
    refused(chat("a tool without a function", tools=[{"type": "function"}])),
    refused(chat("a tool without a name", tools=[{"type": "function", "function": {}}])),
    refused(chat("a list as a tool's schema", tools=[tool(parameters=[1])])),
    refused(chat("a tool of another type", tools=[{**GET_WEATHER, "type": "custom"}])),
    refused(chat("tool_choice alone", tool_choice="required")),
    refused(chat("tool_choice without a name", tools=[GET_WEATHER], tool_choice=NO_NAME)),
    refused(chat("a constraint and a named tool", structured_outputs={"regex": "a"}, **NAMED)),
    refused(chat("an unknown tool_choice", tools=[GET_WEATHER], tool_choice="sometimes")),
    refused(chat("a tool not offered", tools=[GET_WEATHER], tool_choice=named("get_time"))),
    refused(
        chat("both ends of the prompt", continue_final_message=True, add_generation_prompt=True)
    ),
    refused(chat("a template from a client", chat_template="{{ messages }}")),
    refused(chat("a template as a variable", chat_template_kwargs={"chat_template": "x"})),
    refused(chat("template variables as a list", chat_template_kwargs=[1])),
    refused(chat("an unknown reasoning_effort", reasoning_effort="very")),
    # Tokens.
    tokenize("nothing to tokenize", 400),
    tokenize("tokenize for another model", 404, model="other", prompt="a"),
    tokenize("tokenize a number", 400, prompt=5),
    detokenize("nothing to detokenize", 400),
    detokenize("detokenize a negative id", 400, tokens=[-1]),
    detokenize("detokenize an id of 63 bits", 400, tokens=[2**62]),
    detokenize("detokenize for another model", 404, model="other", tokens=[1]),
    # Refused by us alone.
    ours_only(chat("functions", functions=[GET_WEATHER["function"]]), OTHER_ANSWER),
    ours_only(text("best_of", best_of=2), OTHER_ANSWER),
    ours_only(
        chat("a constraint and a call", structured_outputs={"regex": "a"}, **REQUIRED), DROPPED
    ),
    ours_only(
        chat("no content", messages=[{"role": "user"}]),
        "a misspelt `content` would be an empty question; vLLM takes it for one",
    ),
    ours_only(chat("documents for a template without", documents=[{"text": "x"}]), DROPPED),
    ours_only(
        chat("a tool with an empty name", tools=[tool(name="")], tool_choice="required"),
        "a call could not name it; vLLM answers with text",
    ),
    ours_only(chat("arguments nested 5000 deep", messages=[HELLO, deep_call()]), FAILS, plain=500),
    ours_only(
        chat("a schema that is only itself", response_format=schema_format({"$ref": "#"})),
        FAILS,
        plain=500,
    ),
]
