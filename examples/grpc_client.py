"""A typed asyncio client of Packhorse's gRPC, and a command that uses it.

    python examples/grpc_client.py --address 127.0.0.1:9000 --model demo-int8 "Who are you?"

It uses the messages that come with Packhorse; elsewhere, generate them from proto/, see
docs/grpc.md.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

import grpc

from packhorse.serve.rpc.pb import inference_pb2 as pb

SERVICE = "/packhorse.v1.Inference/"


class Client:
    """`async with Client("127.0.0.1:9000") as client: ...`; raises grpc.aio.AioRpcError."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """`credentials` for TLS, as of grpc.ssl_channel_credentials."""
        # Long answers have long pauses: pings find out whether the server is there.
        options = [("grpc.keepalive_time_ms", 60_000), ("grpc.keepalive_timeout_ms", 20_000)]
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=options)
        self._metadata = [("authorization", f"Bearer {api_key}")] if api_key else []

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def chat(
        self, model: str, messages: Sequence[pb.Message], *, timeout_s: float | None = None,
        **options: Any,
    ) -> pb.ChatResponse:  # fmt: skip
        """A whole answer. `options` are fields of pb.Options."""
        call = self._channel.unary_unary(
            SERVICE + "Chat",
            request_serializer=pb.ChatRequest.SerializeToString,
            response_deserializer=pb.ChatResponse.FromString,
        )
        request = pb.ChatRequest(model=model, messages=messages, options=pb.Options(**options))
        answer: pb.ChatResponse = await call(request, timeout=timeout_s, metadata=self._metadata)
        return answer

    async def chat_stream(
        self, model: str, messages: Sequence[pb.Message], *, timeout_s: float | None = None,
        **options: Any,
    ) -> AsyncIterator[pb.ChatChunk]:  # fmt: skip
        """Its pieces as they come; the last has the usage. Leaving the loop ends the answer."""
        start = self._channel.unary_stream(
            SERVICE + "ChatStream",
            request_serializer=pb.ChatRequest.SerializeToString,
            response_deserializer=pb.ChatChunk.FromString,
        )
        request = pb.ChatRequest(model=model, messages=messages, options=pb.Options(**options))
        call = start(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for chunk in call:
                yield chunk
        finally:
            call.cancel()


async def ask(address: str, model: str, question: str, api_key: str | None) -> None:
    """Print the answer as it comes, then its tokens."""
    messages = [pb.Message(role="user", content=question)]
    async with Client(address, api_key=api_key) as client:
        async for chunk in client.chat_stream(model, messages, temperature=0):
            print(chunk.content, end="", flush=True)
            if chunk.HasField("usage"):
                usage = chunk.usage
    print(f"\n({usage.prompt_tokens} tokens read, {usage.completion_tokens} written)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("question")
    parser.add_argument("--address", default="127.0.0.1:9000", help="[default: %(default)s]")
    parser.add_argument("--model", required=True)
    parser.add_argument("--api-key")
    given = parser.parse_args()
    asyncio.run(ask(given.address, given.model, given.question, given.api_key))


if __name__ == "__main__":
    main()
