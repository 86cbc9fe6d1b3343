"""What is stored comes back the same, or not at all."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse.serve.cache.codec import (
    COMPRESS_ABOVE_BYTES,
    Result,
    decode,
    encode,
    joined,
    seal,
    unseal,
)
from packhorse.serve.messages import Chunk, EngineTimes, TokenLogprob, ToolCall

SECRET = b"s" * 32
LOGPROB = TokenLogprob("a", 1, -0.5, 1, (TokenLogprob("b", 2, -1.5),))
FULL = Chunk(
    "text", [1, 2], "stop", 1, "END", "because", (ToolCall(0, "{}", "id", "f"),),
    (LOGPROB,), (LOGPROB,), 5, 3,
)  # fmt: skip


def test_a_result_comes_back() -> None:
    result = Result((Chunk("a", [1], "length"), FULL), 12.5)
    assert decode(encode(result)) == result


def test_when_it_was_made_is_not_stored() -> None:
    """Who gets it from the cache has spent no time in the engine."""
    timed = msgspec.structs.replace(FULL, times=EngineTimes(1.0, 2.0, 3.0, 4.0))
    assert decode(encode(Result((timed,), 12.5))).chunks == (FULL,)


@pytest.mark.parametrize("size", [0, 10, COMPRESS_ABOVE_BYTES + 1, 10**6])
def test_a_seal_opens(size: int) -> None:
    content = b"ab" * (size // 2)
    sealed = seal(content, b"key", SECRET)
    assert unseal(sealed, b"key", SECRET) == content
    assert len(sealed) < 10_000
    assert unseal(sealed, b"another", SECRET) is None
    assert unseal(sealed, b"key", b"another") is None


@given(st.data())
def test_what_is_damaged_is_a_miss(data: st.DataObject) -> None:
    sealed = bytearray(seal(b"content" * data.draw(st.integers(0, 1000)), b"key", SECRET))
    if data.draw(st.booleans()):
        sealed = sealed[: data.draw(st.integers(0, len(sealed) - 1))]  # cut short
    else:
        sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    assert unseal(bytes(sealed), b"key", SECRET) is None


@given(st.binary(max_size=100))
def test_what_is_foreign_is_a_miss(value: bytes) -> None:
    assert unseal(value, b"key", SECRET) is None


def test_chunks_are_joined_by_choice() -> None:
    pieces = [
        Chunk("a", [1], index=0, cached_tokens=4, prompt_logprobs=(LOGPROB,), reasoning="x"),
        Chunk("c", [3], index=1, tool_calls=(ToolCall(0, "", "id", "f"),)),
        Chunk("b", [2], "stop", index=0, stop_reason=2, reasoning="y", reasoning_tokens=1),
        Chunk("", [], index=1, tool_calls=(ToolCall(0, '{"a"'), ToolCall(1, "{}", "id2", "g"))),
        Chunk("d", [4], "tool_calls", index=1, tool_calls=(ToolCall(0, ": 1}"),)),
    ]
    one, two = joined(pieces)
    assert one == Chunk(
        "ab", [1, 2], "stop", 0, 2, "xy", prompt_logprobs=(LOGPROB,), cached_tokens=4,
        reasoning_tokens=1,
    )  # fmt: skip
    assert two.tool_calls == (ToolCall(0, '{"a": 1}', "id", "f"), ToolCall(1, "{}", "id2", "g"))
    assert (two.text, two.token_ids, two.finish_reason) == ("cd", [3, 4], "tool_calls")


@given(st.lists(st.tuples(st.text(max_size=5), st.booleans()), min_size=1, max_size=20))
def test_joining_changes_no_byte(pieces: list[tuple[str, bool]]) -> None:
    chunks = [
        Chunk(text, [number], logprobs=(LOGPROB,) if with_logprobs else None)
        for number, (text, with_logprobs) in enumerate(pieces)
    ]
    (whole,) = joined(chunks)
    assert whole.text == "".join(text for text, _ in pieces)
    assert list(whole.token_ids) == list(range(len(pieces)))
    assert len(whole.logprobs or ()) == sum(flag for _, flag in pieces)
    assert joined([whole]) == (whole,)
