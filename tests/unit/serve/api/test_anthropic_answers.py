"""What chunks become in messages: blocks, steps, and why it stopped."""

from __future__ import annotations

import json
from typing import Any

import pytest

from packhorse.serve.api.anthropic_answers import (
    MessageResponder,
    Step,
    Stop,
    Text,
    Thought,
    ToolUse,
    stop_of,
)
from packhorse.serve.api.generate import CollectedChoice
from packhorse.serve.messages import Chunk, Prompt, Route, ToolCall, Usage


@pytest.mark.parametrize(
    ("finish", "stop", "calls", "expected"),
    [
        ("stop", None, False, Stop("end_turn", None)),
        ("stop", 7, False, Stop("end_turn", None)),
        ("stop", "END", False, Stop("stop_sequence", "END")),
        ("length", None, False, Stop("max_tokens", None)),
        ("length", None, True, Stop("max_tokens", None)),
        ("tool_calls", None, True, Stop("tool_use", None)),
        ("stop", None, True, Stop("tool_use", None)),  # chat's word for a named tool
    ],
)
def test_why_an_answer_ended(finish: Any, stop: Any, calls: bool, expected: Stop) -> None:
    assert stop_of(finish, stop, calls=calls) == expected


class Ended:
    """What is left of a stream after its end."""

    def __init__(self, *, is_parsed: bool) -> None:
        self.prompt = Prompt((1, 2), 9, is_parsed=is_parsed)
        self.route = Route("m")
        self.usage = Usage(2, 1)

    @property
    def context(self) -> Ended:
        return self


CHUNKS = [
    Chunk("", [1], reasoning="h"),
    Chunk("", [2], reasoning="m"),
    Chunk("One ", [3]),
    Chunk("moment.", [4]),
    Chunk("", [5], tool_calls=(ToolCall(0, "", "call_0", "f"),)),
    Chunk("", [6], tool_calls=(ToolCall(0, '{"city": '),)),
    Chunk("", [7], tool_calls=(ToolCall(0, '"N"}'), ToolCall(1, "{}", "call_1", "g"))),
    Chunk("", [8], "tool_calls"),
]


def collected(chunks: list[Chunk]) -> CollectedChoice:
    choice = CollectedChoice()
    for chunk in chunks:
        choice.add(chunk)
    return choice


def whole_of(choice: CollectedChoice, *, is_parsed: bool = True) -> list[Any]:
    streams: Any = [Ended(is_parsed=is_parsed)]
    return list(MessageResponder().whole("id", streams, choice).blocks)


def test_a_stream_opens_and_closes_each_block() -> None:
    responder = MessageResponder()
    stream: Any = Ended(is_parsed=True)
    steps = [*responder.begin(stream), *(s for chunk in CHUNKS for s in responder.steps(chunk))]
    (signature,) = (step.value for step in steps if step.kind == "signature")
    assert steps == [
        Step("start", 0, block=Thought("", "")),
        Step("thinking", 0, "h"),
        Step("thinking", 0, "m"),
        Step("signature", 0, signature),
        Step("stop", 0),
        Step("start", 1, block=Text("")),
        Step("text", 1, "One "),
        Step("text", 1, "moment."),
        Step("stop", 1),
        Step("start", 2, block=ToolUse("call_0", "f", {})),
        Step("input", 2, '{"city": '),
        Step("input", 2, '"N"}'),
        Step("stop", 2),
        Step("start", 3, block=ToolUse("call_1", "g", {})),
        Step("input", 3, "{}"),
        Step("stop", 3),
    ]
    assert responder.stop == Stop("tool_use", None)
    calls = (ToolCall(0, '{"city": "N"}', "call_0", "f"), ToolCall(1, "{}", "call_1", "g"))
    choice = collected([*CHUNKS[:4], Chunk("", [8], "tool_calls", tool_calls=calls)])
    assert whole_of(choice) == [
        Thought("hm", signature),
        Text("One moment."),
        ToolUse("call_0", "f", {"city": "N"}),
        ToolUse("call_1", "g", {}),
    ]


def test_the_rest_of_a_call_comes_before_text_of_the_same_chunk() -> None:
    """Chunks of a slow reader are joined."""
    responder = MessageResponder()
    responder.steps(Chunk("", [1], tool_calls=(ToolCall(0, '{"a": ', "call_0", "f"),)))
    pieces = (ToolCall(0, "1}"), ToolCall(1, "{}", "call_1", "g"))
    steps = responder.steps(Chunk("Then.", [2, 3], tool_calls=pieces))
    assert [(step.kind, step.index, step.value) for step in steps] == [
        ("input", 0, "1}"),
        ("stop", 0, ""),
        ("start", 1, ""),
        ("text", 1, "Then."),
        ("stop", 1, ""),
        ("start", 2, ""),
        ("input", 2, "{}"),
    ]


def test_an_answer_that_is_not_parsed_is_one_text_even_an_empty_one() -> None:
    responder = MessageResponder()
    stream: Any = Ended(is_parsed=False)
    assert responder.begin(stream) == [Step("start", 0, block=Text(""))]
    assert responder.open_text == 0
    assert responder.steps(Chunk("", [1], "stop")) == [Step("stop", 0)]
    assert responder.open_text is None
    assert whole_of(collected([Chunk("", [1], "stop")]), is_parsed=False) == [Text("")]
    silent = Chunk("", [1], "stop", reasoning="")
    assert whole_of(collected([silent]), is_parsed=True) == []
    assert MessageResponder().steps(silent) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"city": "Nemo', {}),
        ('{"city": "N", "d', {"city": "N"}),
        ('{"a": [1, 2', {"a": [1, 2]}),
        ("", {}),
        ("[1]", {"value": [1]}),
        ("so", {"value": "so"}),
    ],
)
def test_arguments_that_are_no_object_yet(arguments: str, expected: dict[str, Any]) -> None:
    choice = collected([Chunk("", [1], "length", tool_calls=(ToolCall(0, arguments, "c", "f"),))])
    (found,) = whole_of(choice)
    assert found == ToolUse("c", "f", expected)
    json.dumps(found.input)
