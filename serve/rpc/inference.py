"""packhorse.v1.Inference: a method per call, each on the same API layer as HTTP's endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from packhorse.serve.api import models, tokenize
from packhorse.serve.api import pooling as pooling_api
from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.completions import CompletionBody
from packhorse.serve.api.generate import (
    CallContext,
    RefusalsCounted,
    answer_metadata,
    collect,
    head_of,
    requests_of,
    total_usage,
)
from packhorse.serve.api.pooling import Pooled, PoolingBody
from packhorse.serve.messages import AUTO_CACHE, GenerateRequest
from packhorse.serve.pipeline import Pipeline, merged
from packhorse.serve.rpc import pooling, responses
from packhorse.serve.rpc.calls import Call
from packhorse.serve.rpc.pb import inference_pb2 as pb
from packhorse.serve.rpc.requests import chat_body, completion_body, detokenize_body, tokenize_body
from packhorse.serve.rpc.responses import ChatEncoder, CompletionEncoder, Encoder

GeneratingCall = Call[pb.ChatRequest] | Call[pb.CompleteRequest]
PoolingCall = Call[pb.EmbedRequest] | Call[pb.RerankRequest]


class Inference:
    """The public methods are the service's, in snake case; server.py finds them by name."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    async def chat(self, call: Call[pb.ChatRequest]) -> pb.ChatResponse:
        body, requests = self._chat(call, stream=False)
        response: pb.ChatResponse = await self._whole(call, requests, ChatEncoder(body))
        return response

    async def chat_stream(self, call: Call[pb.ChatRequest]) -> None:
        body, requests = self._chat(call, stream=True)
        await self._stream(call, requests, ChatEncoder(body))

    async def complete(self, call: Call[pb.CompleteRequest]) -> pb.CompleteResponse:
        body, requests = self._completion(call, stream=False)
        response: pb.CompleteResponse = await self._whole(call, requests, CompletionEncoder(body))
        return response

    async def complete_stream(self, call: Call[pb.CompleteRequest]) -> None:
        body, requests = self._completion(call, stream=True)
        await self._stream(call, requests, CompletionEncoder(body))

    async def list_models(self, call: Call[pb.ListModelsRequest]) -> pb.ListModelsResponse:
        cards = models.list_models(self._pipeline, call.caller)
        return pb.ListModelsResponse(models=map(responses.model, cards))

    async def tokenize(self, call: Call[pb.TokenizeRequest]) -> pb.TokenizeResponse:
        body = tokenize_body(call.request)
        tokens = await tokenize.tokenize(self._pipeline, body, call.context)
        return pb.TokenizeResponse(
            count=tokens.count,
            max_model_len=tokens.max_model_len,
            tokens=tokens.tokens,
            token_strs=tokens.token_strs or (),
        )

    async def detokenize(self, call: Call[pb.DetokenizeRequest]) -> pb.DetokenizeResponse:
        body = detokenize_body(call.request)
        text = await tokenize.detokenize(self._pipeline, body, call.context)
        return pb.DetokenizeResponse(prompt=text)

    async def route(self, call: Call[pb.ChatRequest]) -> pb.RouteResponse:
        with RefusalsCounted(self._pipeline, call.request_id, call.caller):
            body = chat_body(call.request, stream=False)
        return responses.route(models.decide_route(self._pipeline, body, call.context))

    async def embed(self, call: Call[pb.EmbedRequest]) -> pb.EmbedResponse:
        with RefusalsCounted(self._pipeline, call.request_id, call.caller):
            body = pooling.embed_body(call.request)
            requests = body.to_requests(self._pipeline, self._context(call, body))
        pooled = await self._pool(call, requests)
        return await asyncio.to_thread(pooling.embed_response, pooled, call.request_id)

    async def rerank(self, call: Call[pb.RerankRequest]) -> pb.RerankResponse:
        with RefusalsCounted(self._pipeline, call.request_id, call.caller):
            body = pooling.rerank_body(call.request)
            requests = body.to_requests(self._pipeline, self._context(call, body))
        pooled = await self._pool(call, requests)
        return await asyncio.to_thread(pooling.rerank_response, body, pooled, call.request_id)

    async def _pool(self, call: PoolingCall, requests: Sequence[GenerateRequest]) -> Pooled:
        pooled = await pooling_api.pool(self._pipeline, requests)
        call.trailers |= answer_metadata(self._pipeline, pooled.streams)
        return pooled

    def _chat(
        self, call: Call[pb.ChatRequest], *, stream: bool
    ) -> tuple[ChatBody, list[GenerateRequest]]:
        with RefusalsCounted(self._pipeline, call.request_id, call.caller):
            body = chat_body(call.request, stream=stream)
            return body, requests_of(self._pipeline, body, self._context(call, body))

    def _completion(
        self, call: Call[pb.CompleteRequest], *, stream: bool
    ) -> tuple[CompletionBody, list[GenerateRequest]]:
        with RefusalsCounted(self._pipeline, call.request_id, call.caller):
            body = completion_body(call.request, stream=stream)
            return body, requests_of(self._pipeline, body, self._context(call, body))

    def _context(
        self,
        call: GeneratingCall | PoolingCall,
        body: ChatBody | CompletionBody | PoolingBody,
    ) -> CallContext:
        """The shorter of the field's time and the call's deadline counts. A deadline may be longer
        than the server allows.
        """
        timeout_s = body.timeout_s
        if call.timeout_s is not None:
            left_s = min(max(call.timeout_s, 0.001), self._pipeline.max_request_timeout_s)
            timeout_s = left_s if timeout_s is None else min(timeout_s, left_s)
        policy = body.cache.policy() if body.cache else AUTO_CACHE
        return CallContext(call.request_id, call.caller, timeout_s, policy, call.trace)

    async def _whole(
        self, call: GeneratingCall, requests: Sequence[GenerateRequest], encoder: Encoder
    ) -> Any:
        streams = await self._pipeline.start_all(requests)
        call.trailers |= answer_metadata(self._pipeline, streams)
        choices = await collect(streams)
        return encoder.whole(call.request_id, streams, choices)

    async def _stream(
        self, call: GeneratingCall, requests: Sequence[GenerateRequest], encoder: Encoder
    ) -> None:
        streams = await self._pipeline.start_all(requests)
        call.trailers |= answer_metadata(self._pipeline, streams)
        per_prompt = requests[0].sampling.n
        try:
            head = head_of(encoder.id_prefix, call.request_id, streams)
            await call.send(encoder.opening(head, streams[0].context.prompt))
            if len(streams) == 1:
                prompt = streams[0].context.prompt
                async with aclosing(aiter(streams[0])) as chunks:
                    async for chunk in chunks:
                        await call.send(encoder.chunk(chunk.index, chunk, prompt))
            else:
                async with aclosing(merged(streams)) as numbered:
                    async for number, chunk in numbered:
                        index = number * per_prompt + chunk.index
                        await call.send(encoder.chunk(index, chunk, streams[number].context.prompt))
            await call.send(encoder.usage(total_usage(streams)))
        finally:
            for stream in streams:
                await stream.close()
