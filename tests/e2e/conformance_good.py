"""Requests that plain vLLM answers with 200 and that we must answer in the same way.

Each is sent whole and, if it is in STREAMED, once more as a stream. Sampled rows have a seed and a
high temperature, so that the model, sure as it is of its few facts, says something else.
"""

from __future__ import annotations

from typing import Any

from tests.e2e.conformance import ABSENT, Row, chat, text
from tests.e2e.conformance_prompts import ASKED, CALLED, GET_TIME, GET_WEATHER, result

HELLO = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
HELLO_IDS = [1, 281, 201, 846, 3, 2, 201, 1, 279, 201]  # the same as token ids
IM_END, Y, CAPITAL, HELP, HELLO_TOKEN, NO = 2, 91, 356, 465, 846, 1218
CALL_REGEX = (
    r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "Paris"\}\}\n</tool_call>'
)
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "size"],
    "additionalProperties": False,
}


# What clients send that name every field; temperature and the limits stay as they are.
NULLS_OF_BOTH = [
    "frequency_penalty", "logit_bias", "logprobs", "presence_penalty", "seed", "stop", "stream",
    "top_p", "user", "response_format", "min_p", "top_k", "repetition_penalty",
]  # fmt: skip
NULLS_OF_CHAT = ["n", "tools", "tool_choice", "top_logprobs", "reasoning_effort", "stream_options"]


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def weather(name: str, **fields: Any) -> Row:
    """A question that the demo model answers with a call, if the tool is offered."""
    return chat(
        name,
        "What is the weather in Nemoburg?",
        **{"tools": [GET_WEATHER], "max_completion_tokens": 60, **fields},
    )


def sampled(name: str, **fields: Any) -> Row:
    return text(name, **{"prompt": "The", "temperature": 2, "seed": 7, **fields})


def sampled_chat(name: str, **fields: Any) -> Row:
    return chat(name, **{"temperature": 2, "seed": 7, **fields})


OF_TWO: dict[str, Any] = {
    "tools": [GET_TIME, GET_WEATHER],
    "tool_choice": "required",
    "max_completion_tokens": 40,  # what the prompt with two tools leaves of the context
}

GOOD: list[Row] = [
    # How long and where it ends.
    chat("a chat"),
    text("a completion"),
    chat("Chinese", "你知道莫塔尼亚的国菜叫什么吗?"),
    chat("a thought first", "Tell me what 72 - 14 is.", max_completion_tokens=60),
    chat("max_tokens", max_tokens=3, max_completion_tokens=ABSENT),
    chat("max_completion_tokens", max_completion_tokens=3),
    chat("both limits alike", max_tokens=3, max_completion_tokens=3),
    chat("no limit", max_completion_tokens=ABSENT),
    text("OpenAI's default of 16 tokens", HELLO, max_tokens=ABSENT, ignore_eos=True),
    text("nulls", **dict.fromkeys(NULLS_OF_BOTH), echo=None),
    chat("nulls of a chat", **dict.fromkeys([*NULLS_OF_BOTH, *NULLS_OF_CHAT])),
    chat("min_tokens", "Hello!", min_tokens=16, max_completion_tokens=20),
    text("ignore_eos", HELLO, ignore_eos=True, max_tokens=20),
    text("the context's last token", max_tokens=251, ignore_eos=True),
    # Stops.
    text("a stop string", HELLO, stop=" help"),
    text("a stop string in the answer", HELLO, stop=" help", include_stop_str_in_output=True),
    text("a stop string within a token", HELLO, stop=["lp yo", "nothing"]),
    chat("stop strings", stop=["Felonia", " is"]),
    chat("four stop strings", stop=["1", "2", "3", " is"]),
    text("a stop token", HELLO, stop_token_ids=[HELP]),
    text(
        "a stop token in the answer", HELLO, stop_token_ids=[HELP], include_stop_str_in_output=True
    ),
    text("the end mark shown", HELLO, skip_special_tokens=False, stop_token_ids=[IM_END]),
    text("special tokens shown", HELLO, skip_special_tokens=False, ignore_eos=True),
    # Sampling.
    sampled_chat("a seed"),
    sampled("a seed, as text"),
    sampled("another seed", seed=8),
    sampled("a negative seed", seed=-2),
    sampled("the model's own temperature", temperature=ABSENT),
    sampled("top_k", top_k=2),
    sampled("top_k off", top_k=-1),
    sampled("top_p", top_p=0.5),
    sampled("min_p", min_p=0.2),
    sampled("all at once", top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.1),
    sampled_chat("n", n=2),
    sampled("n, as text", n=3),
    chat("n of one", n=1),
    sampled("presence_penalty", presence_penalty=2.0),
    text("frequency_penalty", "The", frequency_penalty=1.5),
    text("repetition_penalty", "The", repetition_penalty=1.8),
    chat("penalties", presence_penalty=-2, frequency_penalty=1.0, repetition_penalty=0.9),
    text("a token favoured", logit_bias={str(CAPITAL): 100}, max_tokens=3),
    chat("a token forbidden", "Hello!", logit_bias={str(HELLO_TOKEN): -100}),
    text("allowed_token_ids", HELLO, allowed_token_ids=[Y, NO], max_tokens=3),
    chat("bad_words", "Hello!", bad_words=["help", "Hello"]),
    text("priority 0", priority=0),
    # Logprobs.
    chat("logprobs", "Hello!", logprobs=True),
    chat("top_logprobs", "Hello!", logprobs=True, top_logprobs=3),
    chat("top_logprobs 0", "Hello!", logprobs=True, top_logprobs=0),
    chat("logprobs of bytes", "莫塔尼亚的国菜叫什么?", logprobs=True, top_logprobs=1),
    text("logprobs as a number", logprobs=2),
    text("logprobs 0", logprobs=0),
    text("logprobs 20", logprobs=20, max_tokens=2),
    text("logprobs and a stop string", HELLO, logprobs=1, stop=" help"),
    sampled("logprobs of samples", logprobs=1, n=2),
    text("prompt_logprobs", prompt_logprobs=1, max_tokens=1),
    chat("prompt_logprobs of a chat", "Hello!", prompt_logprobs=0, max_completion_tokens=1),
    # Prompts.
    text("echo", echo=True),
    text("echo alone", echo=True, max_tokens=0),
    text("echo with logprobs", echo=True, logprobs=1),
    text("echo alone with logprobs", echo=True, logprobs=1, max_tokens=0),
    text("echo of token ids", HELLO_IDS, echo=True),
    text("token ids", HELLO_IDS),
    text("one token", [301]),
    text("two prompts", ["The capital of Felonia is", HELLO]),
    text("two prompts of token ids", [HELLO_IDS, [301, 356]]),
    text("two prompts, two limits", [HELLO, "The"], stop=" help", logprobs=0),
    sampled("two prompts, two samples", prompt=["The", HELLO], n=2),
    text("a prompt cut to its end", HELLO, truncate_prompt_tokens=4),
    text("a prompt cut to what fits", "one two " * 300, truncate_prompt_tokens=-1, max_tokens=1),
    chat("a chat cut to its end", truncate_prompt_tokens=9),
    text("without special tokens", HELLO, add_special_tokens=False),
    text("return_token_ids", HELLO, return_token_ids=True),
    chat("return_token_ids of a chat", "Hello!", return_token_ids=True),
    chat(
        "continue_final_message",
        messages=[
            {"role": "user", "content": "What is the capital of Felonia?"},
            {"role": "assistant", "content": "The capital of"},
        ],
        continue_final_message=True,
        add_generation_prompt=False,
    ),
    chat("no generation prompt", "Hello!", add_generation_prompt=False, max_completion_tokens=5),
    chat("include_reasoning", "Tell me what 7 + 8 is.", include_reasoning=False),
    # Structured outputs.
    chat("a format of text", "Hello!", response_format={"type": "text"}),
    chat("a JSON object", response_format={"type": "json_object"}, max_completion_tokens=40),
    chat("a JSON schema", response_format=schema_format(CITY), max_completion_tokens=40),
    text("a JSON schema, as text", response_format=schema_format(CITY), max_tokens=40),
    chat("json", structured_outputs={"json": CITY}, max_completion_tokens=40),
    text("json_object", structured_outputs={"json_object": True}, max_tokens=40),
    text("regex", structured_outputs={"regex": r"[a-c]{3}-\d{2}"}),
    chat("choice", structured_outputs={"choice": ["Riverburg", "Lagoburg"]}),
    chat("grammar", structured_outputs={"grammar": 'root ::= "yes " ("and " | "or ") "no"'}),
    sampled_chat("choice, sampled", structured_outputs={"choice": ["a", "b", "c"]}, n=3),
    # Tools. The demo model knows get_weather.
    weather("a tool by default"),
    weather("auto", tool_choice="auto"),
    weather("none", tool_choice="none"),
    weather("required", tool_choice="required"),
    weather("named", tool_choice=named("get_weather")),
    weather("named, of two", **{**OF_TWO, "tool_choice": named("get_time")}),
    weather("named, cut short", tool_choice=named("get_weather"), max_completion_tokens=12),
    weather("required, of two", **OF_TWO),
    weather("no parallel calls", parallel_tool_calls=False, tool_choice="auto"),
    weather("no call wanted", messages=[{"role": "user", "content": "Hello!"}]),
    weather("logprobs of a call", logprobs=True, tool_choice="auto"),
    weather("a call cut short", max_completion_tokens=12),
    weather("a call forced by a regex", structured_outputs={"regex": CALL_REGEX}),
    weather(
        "two calls forced by a regex",
        structured_outputs={"regex": f"{CALL_REGEX}\n{CALL_REGEX}"},
        max_completion_tokens=100,
    ),
    weather(
        "one of two calls",
        structured_outputs={"regex": f"{CALL_REGEX}\n{CALL_REGEX}"},
        max_completion_tokens=100,
        parallel_tool_calls=False,
    ),
    weather("after a tool's result", messages=[ASKED, CALLED, result("clear, 18 degrees")]),
    # Taken without effect.
    chat(
        "fields without effect",
        "Hello!",
        user="ada",
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        safety_identifier="x",
        prompt_cache_key="y",
    ),
]

# vLLM refuses prompt logprobs in a stream.
STREAMED = [row for row in GOOD if "prompt_logprobs" not in row.body]

# A call that max_tokens cuts short stays text in vLLM's whole answer, while its stream has by then
# sent the name as a call's: these streams are held to vLLM's streams, not to the whole answers.
CUT_SHORT = {"a call cut short", "named, cut short"}
