"""What clients send beside what is written in any document, and what has to be answered anyway.

SAME: plain vLLM answers it, and we in the same way. OURS: plain vLLM refuses it and we do not; some
clients cannot leave it out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.e2e.conformance import ABSENT, MODEL, Row, changed, chat, text
from tests.e2e.conformance_good import named, sampled, weather
from tests.e2e.conformance_prompts import ASKED, CALLED, GET_WEATHER, result

HELLO = {"role": "user", "content": "Hello!"}
CACHED = {"cache_control": {"type": "ephemeral"}}


def talk(name: str, *messages: dict[str, Any], **fields: Any) -> Row:
    return chat(name, messages=list(messages), **fields)


def tokenize(name: str, **fields: Any) -> Row:
    return Row(name, "/tokenize", changed({"model": MODEL}, fields))


SAME: list[Row] = [
    chat("no model", model=ABSENT),
    text("no model, as text", model=ABSENT),
    # Unknown, or of no use.
    chat("a misspelt field", temprature=0.5),
    chat("nulls of what nobody has", functions=None, audio=None, verbosity=None, top_a=None),
    chat("a misspelt constraint", structured_outputs={"regex": "a", "rejex": 1}),
    tokenize("a field unknown to tokenize", prompt="a", unheard_of=1),
    chat("a variable unknown to the template", chat_template_kwargs={"x": 1}),
    chat("a field sent as a variable", chat_template_kwargs={"add_generation_prompt": False}),
    tokenize("the same for tokenize", messages=[HELLO], chat_template_kwargs={"x": 1}),
    chat("effort for a template without", reasoning_effort="low"),
    chat("no effort for a template without", reasoning_effort="none"),
    chat("no thinking", chat_template_kwargs={"enable_thinking": False}),
    text("priority without its policy", priority=1),
    weather("a tool without its type", tools=[{"function": GET_WEATHER["function"]}],
            tool_choice=named("get_weather")),
    weather("a format and a forced call", tool_choice="required",
            response_format={"type": "json_object"}),
    # Limits.
    chat("two limits", max_tokens=3),
    text("a limit that does not fit", max_tokens=252, ignore_eos=True),
    chat("a chat's limit that does not fit", max_completion_tokens=250),
    text("a bias of 1000", logit_bias={"5": 1000}),
    # Types.
    text("temperature as text", temperature="0"),
    text("max_tokens as text", max_tokens="5"),
    text("max_tokens with a point", max_tokens=5.0),
    sampled("true as a temperature", temperature=True),
    text("true as logprobs", logprobs=True),
    chat("a number as logprobs", logprobs=1),
    text("stream as text", stream="no"),
    text("ids as text", ["1", 2]),
    # History.
    talk("an unknown role", {"role": "robot", "content": "Hello!"}),
    talk("a cache hint on a message", {**HELLO, **CACHED}),
    talk("a cache hint on a part",
         {"role": "user", "content": [{"type": "text", "text": "Hello!", **CACHED}]}),
    weather("a call with its index", messages=[
        ASKED, {**CALLED, "tool_calls": [{**CALLED["tool_calls"][0], "index": 0}]}, result("clear")
    ]),
    talk("reasoning by its old name", {"role": "user", "content": "7+8?"},
         {"role": "assistant", "content": "15", "reasoning_content": "7 and 8 make 15"},
         {"role": "user", "content": "And 9+9?"}),
]  # fmt: skip

OURS: list[Row] = [
    replace(row, status=400, ours=200)
    for row in (
        chat("max_tokens -1", max_tokens=-1, max_completion_tokens=ABSENT),
        text("max_tokens above the context", max_tokens=257),
        chat("top_p 0", top_p=0),
        text("five stop strings", stop=["1", "2", "3", "4", "5"]),
        chat("stream_options alone", stream_options={"include_usage": True}),
        chat("no tools in the list", tools=[]),
        chat("tool_choice auto alone", tool_choice="auto"),
        chat("a number as user", user=5),
    )
]  # fmt: skip
