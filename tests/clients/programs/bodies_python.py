"""What other clients put into the body: messages as they come back, nulls, fields for other
servers, and values that cannot be had.
"""

from __future__ import annotations

import json
from typing import Any

from common import CAPITAL, GET_WEATHER, MODEL, RESULT, WEATHER, call, main
from raw import ASKED, CHAT, GREEDY, TEXT, body_of, good, sent


def history(*messages: Any, **more: Any) -> Any:
    return good(sent(CHAT, body_of(messages=list(messages), **more)))


def call_again(**more: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": '{"city": "Nemoburg"}'}
    return {"id": "call_1", "type": "function", "function": function, **more}


AGAIN = {"role": "user", "content": "And the capital of Vadunia?"}


@call
def replayed_index() -> Any:
    """S04."""
    asked = {"role": "user", "content": WEATHER}
    turn = {"role": "assistant", "content": None, "tool_calls": [call_again(index=0)]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": RESULT}
    return history(asked, turn, result, tools=[GET_WEATHER])


@call
def replayed_reasoning_content() -> Any:
    """S05."""
    turn = {"role": "assistant", "content": "15", "reasoning_content": "7 and 8 make 15"}
    return history(ASKED, turn, AGAIN)


@call
def nulls() -> Any:
    """S06."""
    names = ["functions", "function_call", "audio", "prediction", "verbosity", "top_a"]
    absent: Any = dict.fromkeys([*names, "web_search_options"])
    return good(sent(CHAT, body_of(**absent)))


@call
def nulls_of_completions() -> Any:
    """S06."""
    prompt = {**GREEDY, "prompt": "The capital of Felonia is", "suffix": None, "best_of": None}
    return good(sent(TEXT, json.dumps(prompt).encode()))


@call
def reasoning_alone() -> Any:
    """S07."""
    return history(
        ASKED, {"role": "assistant", "content": None, "reasoning": "let me think"}, AGAIN
    )


@call
def nothing_said() -> Any:
    """S07: no text and no call."""
    return history(ASKED, {"role": "assistant", "content": None, "tool_calls": []}, AGAIN)


@call
def cache_control() -> Any:
    """S35."""
    part = {"type": "text", "text": CAPITAL, "cache_control": {"type": "ephemeral"}}
    return history({"role": "user", "content": [part]})


@call
def more_than_there_is_room() -> Any:
    """S30: an upper bound, lowered to what is left."""
    return good(sent(CHAT, body_of(max_tokens=64_000)))


@call
def no_upper_bound() -> Any:
    """S34: -1 is what clients send that cannot leave it out."""
    return good(sent(CHAT, body_of(max_tokens=-1)))


@call
def top_p_of_0() -> Any:
    """S33."""
    return good(sent(CHAT, body_of(top_p=0)))


@call
def five_stops() -> Any:
    """S32."""
    return good(sent(CHAT, body_of(stop=["\n\n", "User:", "###", "<end>", "Assistant:"])))


@call
def no_reasoning_effort() -> Any:
    """S31: of a model that knows none."""
    return good(sent(CHAT, body_of(reasoning_effort="none")))


@call
def thinking_switched_off() -> Any:
    """S31."""
    return good(sent(CHAT, body_of(chat_template_kwargs={"enable_thinking": False})))


@call
def unknown_fields() -> Any:
    """What gateways and front ends add."""
    return good(sent(CHAT, body_of(chat_id="c1", session_id="s1", metadata={"a": "b"}, num_ctx=9)))


@call
def completions() -> Any:
    prompt = {**GREEDY, "prompt": "The capital of Felonia is"}
    return good(sent(TEXT, json.dumps(prompt).encode()))


@call
def tokenize() -> Any:
    status, text = sent("/tokenize", json.dumps({"model": MODEL, "prompt": CAPITAL}).encode())
    if status != 200:
        raise AssertionError(f"status {status}: {text[:300]}")
    return {"count": json.loads(text)["count"]}


if __name__ == "__main__":
    main()
