"""A result, and the bytes that are stored of it.

Stored values come back from a server that others write to. So each begins with a version and a
keyed checksum over its key and content: a value that is damaged, cut short, foreign, or stored
under another key is a miss.
"""

from __future__ import annotations

import hashlib
import hmac
import zlib
from collections.abc import Iterable

import msgspec

from packhorse.serve.messages import Chunk, ToolCall

_MAGIC = b"PH\x01"
_PLAIN, _COMPRESSED = b"p", b"z"
_CHECK_BYTES = 16
COMPRESS_ABOVE_BYTES = 4096
# Nothing that was stored is larger; something else could be, once decompressed.
MAX_BYTES = 2**30


class Result(msgspec.Struct, frozen=True, array_like=True):
    """A finished answer: one chunk a choice, in their order."""

    chunks: tuple[Chunk, ...]
    created_s: float
    """Unix time."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Result)


def encode(result: Result) -> bytes:
    """The content alone, as the memory tier has it. When it was made is nobody else's time."""
    chunks = tuple(
        chunk if chunk.times is None else msgspec.structs.replace(chunk, times=None)
        for chunk in result.chunks
    )
    return _encoder.encode(Result(chunks, result.created_s))


def decode(content: bytes) -> Result:
    return _decoder.decode(content)


def seal(content: bytes, key: bytes, secret: bytes) -> bytes:
    """What is stored under the key where others can write."""
    kind = _PLAIN
    if len(content) > COMPRESS_ABOVE_BYTES:
        kind, content = _COMPRESSED, zlib.compress(content, 1)
    return _MAGIC + kind + _check(kind + content, key, secret) + content


def unseal(value: bytes, key: bytes, secret: bytes) -> bytes | None:
    """The content, or None for what `seal` did not make of this key with this secret."""
    head = len(_MAGIC) + 1
    kind, content = value[len(_MAGIC) : head], value[head + _CHECK_BYTES :]
    check = value[head : head + _CHECK_BYTES]
    expected = _check(kind + content, key, secret)
    if not value.startswith(_MAGIC) or not hmac.compare_digest(check, expected):
        return None
    if kind == _COMPRESSED:
        return zlib.decompressobj().decompress(content, MAX_BYTES)
    return content


def _check(content: bytes, key: bytes, secret: bytes) -> bytes:
    made = hashlib.blake2b(key=hashlib.sha256(secret).digest(), digest_size=_CHECK_BYTES)
    made.update(key)
    made.update(content)
    return made.digest()


def joined(chunks: Iterable[Chunk]) -> tuple[Chunk, ...]:
    """The chunks of an answer as one a choice. What they say stays the same, byte for byte."""
    choices: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        choices.setdefault(chunk.index, []).append(chunk)
    return tuple(_joined(choices[index]) for index in sorted(choices))


def _joined(chunks: list[Chunk]) -> Chunk:
    if len(chunks) == 1:
        return chunks[0]
    last = chunks[-1]
    logprobs = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    reasoning = [chunk.reasoning for chunk in chunks if chunk.reasoning is not None]
    return Chunk(
        "".join(chunk.text for chunk in chunks),
        [token for chunk in chunks for token in chunk.token_ids],
        last.finish_reason,
        last.index,
        last.stop_reason,
        "".join(reasoning) if reasoning else None,
        _joined_calls(piece for chunk in chunks for piece in chunk.tool_calls),
        tuple(logprobs) if any(chunk.logprobs is not None for chunk in chunks) else None,
        next((chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs), None),
        max(chunk.cached_tokens for chunk in chunks),
        last.reasoning_tokens,
        last.times,
    )


def _joined_calls(pieces: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
    calls: dict[int, ToolCall] = {}
    for piece in pieces:
        call = calls.get(piece.index)
        if call is not None:
            piece = ToolCall(
                piece.index,
                call.arguments + piece.arguments,
                call.id or piece.id,
                call.name or piece.name,
            )
        calls[piece.index] = piece
    return tuple(calls.values())
