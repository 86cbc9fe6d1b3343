"""Reading answers with vLLM's own parsers, on the demo model's real tokenizer: streamed a token at
a time and whole, both must say the same.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from packhorse.serve.engines.vllm.chat import Chat
from packhorse.serve.errors import Invalid, StartupError
from packhorse.serve.messages import ChatOptions, Chunk, GenerateRequest, Sampling
from packhorse.serve.settings.engine import EngineSettings
from tests.conftest import DEMO

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "model")


def chat(tokenizer: Any, **settings: Any) -> Chat:
    """A Chat over what it needs of an AsyncLLM: the tokenizer and the model's config."""
    renderer = SimpleNamespace(tokenizer=tokenizer, get_tokenizer=lambda: tokenizer)
    hf_config = SimpleNamespace(model_type="llama")
    model_config = SimpleNamespace(model="demo", hf_config=hf_config, trust_remote_code=False)
    llm: Any = SimpleNamespace(renderer=renderer, model_config=model_config)
    return Chat(llm, EngineSettings.model_validate(settings))


def ask(*, stream: bool, **options: Any) -> GenerateRequest:
    return GenerateRequest(
        "id",
        "demo",
        Sampling(),
        messages=({"role": "user", "content": "Weather?"},),
        chat=ChatOptions(**options),
        stream=stream,
    )


def read(tokenizer: Any, text: str, *, stream: bool, **options: Any) -> dict[str, Any]:
    """What the reader makes of an answer."""
    talk = chat(tokenizer, tool_call_parser="hermes", reasoning_parser="qwen3")
    request = ask(stream=stream, **options)
    reader = talk.reader(request, None, talk.params(request)[0], [1, 2, 3])
    assert reader is not None
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if stream:
        pieces = []
        for number, token_id in enumerate(token_ids):
            reason = "stop" if number + 1 == len(token_ids) else None
            pieces.append(reader.piece(Chunk(tokenizer.decode([token_id]), [token_id], reason)))
        chunks = [piece for piece in pieces if piece is not None]
    else:
        chunks = [reader.whole(Chunk(text, token_ids, "stop"))]
    calls = [call for chunk in chunks for call in chunk.tool_calls]
    return {
        "text": "".join(chunk.text for chunk in chunks).strip(),
        "reasoning": "".join(chunk.reasoning or "" for chunk in chunks).strip(),
        "names": [call.name for call in calls if call.name],
        "arguments": "".join(call.arguments for call in calls),
        "reason": chunks[-1].finish_reason,
        "thought": chunks[-1].reasoning_tokens > 0,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_content_and_calls_are_told_apart(tokenizer: Any, stream: bool) -> None:
    text = f"<think>\nI need a tool.\n</think>\n\nLet me see.{CALL}"
    assert read(tokenizer, text, stream=stream, tools=(TOOL,), tool_choice="auto") == {
        "text": "Let me see.",
        "reasoning": "I need a tool.",
        "names": ["get_weather"],
        "arguments": '{"city": "Paris"}',
        "reason": "tool_calls",
        "thought": True,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_hidden_reasoning_stays_hidden(tokenizer: Any, stream: bool) -> None:
    text = "<think>\nsecret\n</think>\n\nHello."
    found = read(tokenizer, text, stream=stream, include_reasoning=False)
    assert (found["text"], found["reasoning"]) == ("Hello.", "")


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_most_when_they_may_not_be_parallel(tokenizer: Any, stream: bool) -> None:
    text = f"<think>\nhm\n</think>\n\n{CALL}\n{CALL}"
    both = read(tokenizer, text, stream=stream, tools=(TOOL,), tool_choice="auto")
    assert both["names"] == ["get_weather"] * 2
    options: dict[str, Any] = {"tools": (TOOL,), "tool_choice": "auto"}
    one = read(tokenizer, text, stream=stream, parallel_tool_calls=False, **options)
    assert one["names"] == ["get_weather"]


def test_an_answer_without_tools_or_reasoning_is_not_read(tokenizer: Any) -> None:
    talk = chat(tokenizer, tool_call_parser="hermes")
    request = ask(stream=False)
    assert talk.reader(request, None, talk.params(request)[0], [1]) is None


def test_tools_need_a_parser(tokenizer: Any) -> None:
    talk = chat(tokenizer)
    request = ask(stream=False, tools=(TOOL,), tool_choice="auto")
    with pytest.raises(Invalid, match="--tool-call-parser"):
        talk.reader(request, None, talk.params(request)[0], [1])


def test_a_tools_schema_is_bounded_too(tokenizer: Any) -> None:
    talk = chat(tokenizer, tool_call_parser="hermes")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"maxLength": 10**6}}}
    request = ask(stream=False, tools=(tool,), tool_choice="required")
    with pytest.raises(Invalid, match="maxLength=1000000"):
        talk.reader(request, None, talk.params(request)[0], [1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tool_call_parser": "nope"}, "nope.*--tool-call-parser"),
        ({"reasoning_parser": "nope"}, "nope"),
        ({"chat_template": "no/such/file.jinja"}, "engine.chat_template"),
    ],
)
def test_a_parser_or_template_that_is_not_there_stops_the_start(
    tokenizer: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(StartupError, match=message):
        chat(tokenizer, **settings)


def test_a_template_can_come_from_a_file(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}{{ mood }}")
    talk = chat(tokenizer, chat_template=str(tmp_path / "t.jinja"))
    assert "mood" in str(talk.params(ask(stream=False))[0].chat_template)
    variables = {"mood": "!", "temper": "!", "add_generation_prompt": False}
    options = {"template_variables": variables, "reasoning_effort": "low"}
    params, ignored = talk.params(ask(stream=False, **options))
    assert ignored == (
        "chat_template_kwargs.add_generation_prompt",
        "chat_template_kwargs.temper",
        "reasoning_effort",
    )
    assert params.chat_template_kwargs["mood"] == "!"
    assert params.chat_template_kwargs["add_generation_prompt"] is True
    assert "temper" not in params.chat_template_kwargs
    assert "reasoning_effort" not in params.chat_template_kwargs
    with pytest.raises(Invalid, match="no place for documents"):
        talk.params(ask(stream=False, documents=({"text": "x"},)))
