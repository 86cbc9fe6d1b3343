"""packhorse.v1.Inference: the same calls on the service as HTTP's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from packhorse.serve.api.answers import Answer, collect, headers_of
from packhorse.serve.api.chat import ChatBody, DetokenizeBody
from packhorse.serve.api.completions import CompletionBody
from packhorse.serve.api.validation import validated
from packhorse.serve.errors import ServeError
from packhorse.serve.messages import AUTO_CACHE, GenerateRequest
from packhorse.serve.rpc.calls import Call, Handler
from packhorse.serve.rpc.pb import inference_pb2 as pb
from packhorse.serve.rpc.requests import chat_body, complete_body, tokenize_body
from packhorse.serve.rpc.responses import ChatAnswers, CompleteAnswers, decided, opening, usage
from packhorse.serve.service import Service
from packhorse.serve.stream import Stream, merged

Body = TypeVar("Body", ChatBody, CompletionBody)
Asked = Call[pb.ChatRequest] | Call[pb.CompleteRequest]


class Inference:
    """A method for each of the service's."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def handlers(self) -> dict[str, Handler]:
        return {
            "Chat": self.chat,
            "ChatStream": self.chat_stream,
            "Complete": self.complete,
            "CompleteStream": self.complete_stream,
            "ListModels": self.list_models,
            "Tokenize": self.tokenize,
            "Detokenize": self.detokenize,
            "Route": self.route,
        }

    async def chat(self, call: Call[pb.ChatRequest]) -> pb.ChatResponse:
        body, asked = self._checked(call, chat_body, stream=False)
        answers = ChatAnswers(body)
        return answers.whole(*await self._whole(call, asked, answers.prefix))

    async def chat_stream(self, call: Call[pb.ChatRequest]) -> None:
        body, asked = self._checked(call, chat_body, stream=True)
        await self._stream(call, asked, ChatAnswers(body))

    async def complete(self, call: Call[pb.CompleteRequest]) -> pb.CompleteResponse:
        body, asked = self._checked(call, complete_body, stream=False)
        answers = CompleteAnswers(body)
        return answers.whole(*await self._whole(call, asked, answers.prefix))

    async def complete_stream(self, call: Call[pb.CompleteRequest]) -> None:
        body, asked = self._checked(call, complete_body, stream=True)
        await self._stream(call, asked, CompleteAnswers(body))

    def _checked(
        self, call: Asked, read: Callable[..., Body], *, stream: bool
    ) -> tuple[Body, list[GenerateRequest]]:
        try:
            body = read(call.request, stream=stream)
            return body, self._asked(call, body)
        except ServeError as error:
            self._service.refused(call.request_id, error, call.caller)
            raise

    def _asked(self, call: Asked, body: ChatBody | CompletionBody) -> list[GenerateRequest]:
        """The shorter of the field's time and the call's own counts; a call may have longer than
        the server gives.
        """
        timeout_s = body.timeout_s
        if call.timeout_s is not None:
            left_s = min(max(call.timeout_s, 0.001), self._service.max_request_timeout_s)
            timeout_s = left_s if timeout_s is None else min(timeout_s, left_s)
        policy = body.cache.policy() if body.cache else AUTO_CACHE
        default = self._service.models.default(call.caller)
        asked = body.to_requests(
            call.request_id, call.caller, timeout_s, policy, default_model=default
        )
        return [replace(one, trace=call.trace) for one in asked] if call.trace else asked

    async def _whole(
        self, call: Asked, asked: Sequence[GenerateRequest], prefix: str
    ) -> tuple[pb.Opening, dict[int, Answer], Sequence[Stream]]:
        streams = await self._service.start_all(asked)
        self._mark(call, streams)
        try:
            found = await collect(streams)
        finally:
            for stream in streams:
                await stream.close()
        return opening(prefix, call.request_id, streams), found, streams

    async def _stream(
        self,
        call: Asked,
        asked: Sequence[GenerateRequest],
        answers: ChatAnswers | CompleteAnswers,
    ) -> None:
        streams = await self._service.start_all(asked)
        self._mark(call, streams)
        choices = asked[0].sampling.n
        try:
            opened = opening(answers.prefix, call.request_id, streams)
            await call.send(answers.opened(opened, streams[0].prompt))
            if len(streams) == 1:
                prompt = streams[0].prompt
                async with aclosing(aiter(streams[0])) as chunks:
                    async for chunk in chunks:
                        await call.send(answers.piece(chunk.index, chunk, prompt))
            else:
                async with aclosing(merged(streams)) as pieces:
                    async for number, chunk in pieces:
                        index = number * choices + chunk.index
                        await call.send(answers.piece(index, chunk, streams[number].prompt))
            await call.send(answers.ended(usage(streams)))
        finally:
            for stream in streams:
                await stream.close()

    def _mark(self, call: Asked, streams: Sequence[Stream]) -> None:
        """What HTTP says in headers, in trailers."""
        service = self._service
        call.marks |= headers_of(
            streams, has_adapters=service.models.has_adapters, has_cache=service.has_cache
        )

    async def list_models(self, call: Call[pb.ListModelsRequest]) -> pb.ListModelsResponse:
        service = self._service
        return pb.ListModelsResponse(
            models=[
                pb.Model(
                    id=name,
                    created=service.created_s,
                    max_model_len=service.engine.max_model_len,
                    parent=None if name == service.model else service.model,
                )
                for name in service.models.names(call.caller)
            ]
        )

    async def tokenize(self, call: Call[pb.TokenizeRequest]) -> pb.TokenizeResponse:
        service, body = self._service, tokenize_body(call.request)
        asked = body.to_request(call.request_id, service.models.default(call.caller))
        asked = replace(asked, caller=call.caller)
        token_ids = list(await service.tokenize(asked))
        return pb.TokenizeResponse(
            count=len(token_ids),
            max_model_len=service.engine.max_model_len,
            tokens=token_ids,
            token_strs=(
                await service.engine.token_strings(token_ids) if body.return_token_strs else ()
            ),
        )

    async def detokenize(self, call: Call[pb.DetokenizeRequest]) -> pb.DetokenizeResponse:
        asked = {"tokens": list(call.request.tokens)}
        if call.request.HasField("model"):
            asked["model"] = call.request.model  # type: ignore[assignment]
        body = validated(asked, DetokenizeBody)
        service = self._service
        model = body.model or service.models.default(call.caller)
        service.models.check(model, call.caller)
        return pb.DetokenizeResponse(prompt=await service.engine.detokenize(body.tokens))

    async def route(self, call: Call[pb.ChatRequest]) -> pb.RouteResponse:
        _, (asked,) = self._checked(call, chat_body, stream=False)
        return decided(self._service.models.decide(asked), self._service.model)
