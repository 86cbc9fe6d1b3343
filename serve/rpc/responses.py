"""Protobuf messages of answers: whole, and as chunks of a stream. The data comes from api/."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from packhorse.serve.api.chat import ChatBody, ChatChoice, ChatResponder
from packhorse.serve.api.completions import CompletionBody, CompletionChoice, CompletionResponder
from packhorse.serve.api.generate import AnswerHead, CollectedChoice
from packhorse.serve.api.logprobs import PromptLogprobs, ReportedLogprob
from packhorse.serve.api.models import ModelCard, RouteDecision
from packhorse.serve.messages import Chunk, FinishReason, Prompt, ToolCall, Usage
from packhorse.serve.pipeline import Stream
from packhorse.serve.rpc.pb import inference_pb2 as pb

FINISH_REASONS: dict[FinishReason | None, pb.FinishReason] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}


class Encoder(Protocol):
    """Encodes the answers of one call. A stream has an opening, a message per chunk, and usage."""

    id_prefix: str

    def opening(self, head: AnswerHead, prompt: Prompt) -> Any:
        """The first message of a stream."""
        ...

    def chunk(self, index: int, chunk: Chunk, prompt: Prompt) -> Any:
        """The message for a chunk of choice `index`."""
        ...

    def usage(self, usage: Usage) -> Any:
        """The last message of a stream."""
        ...

    def whole(
        self, request_id: str, streams: Sequence[Stream], choices: Sequence[CollectedChoice]
    ) -> Any:
        """The message of a whole answer."""
        ...


class ChatEncoder:
    """Chat and ChatStream."""

    id_prefix = ChatResponder.id_prefix

    def __init__(self, body: ChatBody) -> None:
        self._responder = ChatResponder(body)

    def opening(self, head: AnswerHead, prompt: Prompt) -> pb.ChatChunk:
        opening = _opening(head)
        opening.prompt_token_ids.extend(self._responder.prompt_token_ids(prompt) or ())
        return pb.ChatChunk(opening=opening)

    def chunk(self, index: int, chunk: Chunk, prompt: Prompt) -> pb.ChatChunk:
        if self._responder.all_plain and chunk.is_plain and chunk.finish_reason is None:
            return pb.ChatChunk(index=index, content=chunk.text)
        piece = self._responder.piece(index, chunk, prompt)
        return pb.ChatChunk(
            index=index,
            content=piece.content or "",
            reasoning=piece.reasoning,
            tool_calls=map(_call_piece, piece.tool_calls),
            finish_reason=FINISH_REASONS[piece.finish_reason],
            stop_reason=_stop_reason(piece.stop_reason) if piece.finish_reason else None,
            logprobs=_logprobs(piece.logprobs),
            token_ids=piece.token_ids or (),
        )

    def usage(self, usage: Usage) -> pb.ChatChunk:
        return pb.ChatChunk(usage=usage_message(usage))

    def whole(
        self, request_id: str, streams: Sequence[Stream], choices: Sequence[CollectedChoice]
    ) -> pb.ChatResponse:
        answer = self._responder.whole(request_id, streams, choices)
        return pb.ChatResponse(
            id=answer.head.id,
            created=answer.head.created,
            model=answer.head.model,
            usage=usage_message(answer.usage),
            choices=map(_chat_choice, answer.choices),
            prompt_token_ids=answer.prompt_token_ids or (),
            prompt_logprobs=_prompt_logprobs(answer.prompt_logprobs),
        )


class CompletionEncoder:
    """Complete and CompleteStream."""

    id_prefix = CompletionResponder.id_prefix

    def __init__(self, body: CompletionBody) -> None:
        self._responder = CompletionResponder(body)

    def opening(self, head: AnswerHead, prompt: Prompt) -> pb.CompleteChunk:
        return pb.CompleteChunk(opening=_opening(head))

    def chunk(self, index: int, chunk: Chunk, prompt: Prompt) -> pb.CompleteChunk:
        if self._responder.all_plain and chunk.is_plain and chunk.finish_reason is None:
            return pb.CompleteChunk(index=index, text=chunk.text)
        piece = self._responder.piece(index, chunk, prompt)
        return pb.CompleteChunk(
            index=index,
            text=piece.text,
            finish_reason=FINISH_REASONS[piece.finish_reason],
            stop_reason=_stop_reason(piece.stop_reason) if piece.finish_reason else None,
            logprobs=_logprobs(piece.logprobs and piece.logprobs.entries),
            token_ids=piece.token_ids or (),
            prompt_token_ids=piece.prompt_token_ids or (),
        )

    def usage(self, usage: Usage) -> pb.CompleteChunk:
        return pb.CompleteChunk(usage=usage_message(usage))

    def whole(
        self, request_id: str, streams: Sequence[Stream], choices: Sequence[CollectedChoice]
    ) -> pb.CompleteResponse:
        answer = self._responder.whole(request_id, streams, choices)
        return pb.CompleteResponse(
            id=answer.head.id,
            created=answer.head.created,
            model=answer.head.model,
            usage=usage_message(answer.usage),
            choices=map(_completion_choice, answer.choices),
        )


def _chat_choice(choice: ChatChoice) -> pb.ChatChoice:
    message = pb.Message(
        role="assistant",
        content=choice.content,
        reasoning=choice.reasoning,
        tool_calls=[
            pb.ToolCall(id=call.id or "", name=call.name or "", arguments=call.arguments)
            for call in choice.tool_calls
        ],
    )
    return pb.ChatChoice(
        index=choice.index,
        message=message,
        finish_reason=FINISH_REASONS[choice.finish_reason],
        stop_reason=_stop_reason(choice.stop_reason),
        logprobs=_logprobs(choice.logprobs),
        token_ids=choice.token_ids or (),
    )


def _completion_choice(choice: CompletionChoice) -> pb.CompleteChoice:
    return pb.CompleteChoice(
        index=choice.index,
        text=choice.text,
        finish_reason=FINISH_REASONS[choice.finish_reason],
        stop_reason=_stop_reason(choice.stop_reason),
        logprobs=_logprobs(choice.logprobs and choice.logprobs.entries),
        token_ids=choice.token_ids or (),
        prompt_token_ids=choice.prompt_token_ids or (),
        prompt_logprobs=_prompt_logprobs(choice.prompt_logprobs),
    )


def _opening(head: AnswerHead) -> pb.Opening:
    return pb.Opening(id=head.id, created=head.created, model=head.model)


def usage_message(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        reasoning_tokens=usage.reasoning_tokens,
    )


def _stop_reason(reason: str | int | None) -> pb.StopReason | None:
    if reason is None:
        return None
    if isinstance(reason, int):
        return pb.StopReason(token_id=reason)
    return pb.StopReason(text=reason)


def _call_piece(call: ToolCall) -> pb.ToolCallPiece:
    return pb.ToolCallPiece(index=call.index, id=call.id, name=call.name, arguments=call.arguments)


def _logprobs(entries: Iterable[ReportedLogprob] | None) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token=entry.name,
            token_id=entry.token_id,
            logprob=entry.logprob,
            rank=entry.rank,
            top=_logprobs(entry.top),
        )
        for entry in entries or ()
    ]


def _prompt_logprobs(logprobs: PromptLogprobs | None) -> list[pb.TokenLogprob]:
    return _logprobs(None if logprobs is None else logprobs.entries)


def model(card: ModelCard) -> pb.Model:
    return pb.Model(
        id=card.id,
        created=card.created,
        max_model_len=card.max_model_len,
        parent=card.parent,
        runner=card.runner,
    )


def route(decision: RouteDecision) -> pb.RouteResponse:
    return pb.RouteResponse(
        model=decision.model,
        adapter=decision.adapter,
        stage=decision.stage,
        margin=decision.margin,
        reason=decision.reason,
        trace_json=[json.dumps(step) for step in decision.trace],
    )
