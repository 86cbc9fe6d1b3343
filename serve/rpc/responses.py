"""Answers: chunks, and answers put together from them, to protobuf messages."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from packhorse.serve.api.answers import Answer, names_of, sum_of
from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.completions import CompletionBody
from packhorse.serve.messages import Chunk, Prompt, TokenLogprob, ToolCall
from packhorse.serve.routing.base import Decision
from packhorse.serve.rpc.pb import inference_pb2 as pb
from packhorse.serve.stream import Stream

REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}


def opening(prefix: str, request_id: str, streams: Sequence[Stream]) -> pb.Opening:
    """What is equal in all of a call's chunks, said once."""
    return pb.Opening(id=prefix + request_id, created=int(time.time()), model=names_of(streams))


def usage(streams: Sequence[Stream]) -> pb.Usage:
    total = sum_of([stream.usage for stream in streams])
    return pb.Usage(
        prompt_tokens=total.prompt_tokens,
        completion_tokens=total.completion_tokens,
        total_tokens=total.prompt_tokens + total.completion_tokens,
        cached_tokens=total.cached_tokens,
        reasoning_tokens=total.reasoning_tokens,
    )


def logprob(entry: TokenLogprob, num_top: int) -> pb.TokenLogprob:
    """With its num_top likeliest; -1: all that the engine told."""
    top = entry.top if num_top < 0 else entry.top[:num_top]
    return pb.TokenLogprob(
        token=entry.token,
        token_id=entry.token_id,
        logprob=entry.logprob,
        rank=entry.rank,
        top=[logprob(other, 0) for other in top],
    )


def _stop_reason(reason: str | int | None) -> pb.StopReason | None:
    if reason is None:
        return None
    if isinstance(reason, int):
        return pb.StopReason(token_id=reason)
    return pb.StopReason(text=reason)


class ChatAnswers:
    """Chat's messages, for one call."""

    prefix = "chatcmpl-"

    def __init__(self, body: ChatBody) -> None:
        self._body = body
        self._num_top = body.top_logprobs or 0

    def opened(self, opened: pb.Opening, prompt: Prompt) -> pb.ChatChunk:
        if self._body.return_token_ids:
            opened.prompt_token_ids.extend(prompt.token_ids)
        return pb.ChatChunk(opening=opened)

    def ended(self, total: pb.Usage) -> pb.ChatChunk:
        return pb.ChatChunk(usage=total)

    def piece(self, index: int, chunk: Chunk, prompt: Prompt) -> pb.ChatChunk:
        if chunk.is_plain and chunk.finish_reason is None and not self._body.return_token_ids:
            return pb.ChatChunk(index=index, content=chunk.text)
        return pb.ChatChunk(
            index=index,
            content=chunk.text,
            reasoning=chunk.reasoning,
            tool_calls=[_call_piece(call) for call in chunk.tool_calls],
            finish_reason=REASONS[chunk.finish_reason],
            stop_reason=_stop_reason(chunk.stop_reason) if chunk.finish_reason else None,
            logprobs=[logprob(entry, self._num_top) for entry in chunk.logprobs or ()],
            token_ids=chunk.token_ids if self._body.return_token_ids else (),
        )

    def whole(
        self, opened: pb.Opening, answers: dict[int, Answer], streams: Sequence[Stream]
    ) -> pb.ChatResponse:
        body = self._body
        made = pb.ChatResponse(
            id=opened.id, created=opened.created, model=opened.model, usage=usage(streams)
        )
        for index in sorted(answers):
            answer = answers[index]
            text = "".join(answer.parts)
            message = pb.Message(
                role="assistant",
                content=None if answer.tool_calls and not text else text,
                reasoning="".join(answer.reasoning) if answer.reasoning else None,
                tool_calls=[
                    pb.ToolCall(id=call.id or "", name=call.name or "", arguments=call.arguments)
                    for call in answer.tool_calls
                ],
            )
            made.choices.append(
                pb.ChatChoice(
                    index=index,
                    message=message,
                    finish_reason=REASONS[answer.finish_reason],
                    stop_reason=_stop_reason(answer.stop_reason),
                    logprobs=[logprob(entry, self._num_top) for entry in answer.logprobs or ()],
                    token_ids=answer.token_ids if body.return_token_ids else (),
                )
            )
        if body.return_token_ids:
            made.prompt_token_ids.extend(streams[0].prompt.token_ids)
        if body.prompt_logprobs is not None:
            entries = answers[0].prompt_logprobs or ()
            made.prompt_logprobs.extend(logprob(entry, -1) for entry in entries)
        return made


class CompleteAnswers:
    """Completions' messages, for one call."""

    prefix = "cmpl-"

    def __init__(self, body: CompletionBody) -> None:
        self._body = body
        self._num_top = body.logprobs or 0
        self._begun: set[int] = set()

    def opened(self, opened: pb.Opening, prompt: Prompt) -> pb.CompleteChunk:
        return pb.CompleteChunk(opening=opened)

    def ended(self, total: pb.Usage) -> pb.CompleteChunk:
        return pb.CompleteChunk(usage=total)

    def piece(self, index: int, chunk: Chunk, prompt: Prompt) -> pb.CompleteChunk:
        body = self._body
        special = body.return_token_ids or body.echo or body.logprobs is not None
        if chunk.is_plain and chunk.finish_reason is None and not special:
            return pb.CompleteChunk(index=index, text=chunk.text)
        answer = Answer()
        answer.add(chunk)
        first = index not in self._begun
        self._begun.add(index)
        choice = self._choice(index, answer, prompt, with_prompt=first)
        return pb.CompleteChunk(
            index=index,
            text=choice.text,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason if chunk.finish_reason else None,
            logprobs=choice.logprobs,
            token_ids=choice.token_ids,
            prompt_token_ids=choice.prompt_token_ids,
        )

    def whole(
        self, opened: pb.Opening, answers: dict[int, Answer], streams: Sequence[Stream]
    ) -> pb.CompleteResponse:
        per_prompt = len(answers) // len(streams)
        return pb.CompleteResponse(
            id=opened.id,
            created=opened.created,
            model=opened.model,
            usage=usage(streams),
            choices=[
                self._choice(
                    index, answers[index], streams[index // per_prompt].prompt, with_prompt=True
                )
                for index in sorted(answers)
            ],
        )

    def _choice(
        self, index: int, answer: Answer, prompt: Prompt, *, with_prompt: bool
    ) -> pb.CompleteChoice:
        body = self._body
        text = "" if body.echo_only else "".join(answer.parts)
        logprobs = [] if body.echo_only else list(answer.logprobs or ())
        if with_prompt and body.echo:
            text = (prompt.text or "") + text
            logprobs = [*(answer.prompt_logprobs or ()), *logprobs]
        wanted = body.logprobs is not None
        prompt_entries = answer.prompt_logprobs or ()
        return pb.CompleteChoice(
            index=index,
            text=text,
            finish_reason=REASONS[answer.finish_reason],
            stop_reason=_stop_reason(answer.stop_reason),
            logprobs=[logprob(entry, self._num_top) for entry in logprobs] if wanted else (),
            token_ids=answer.token_ids if body.return_token_ids else (),
            prompt_token_ids=prompt.token_ids if body.return_token_ids and with_prompt else (),
            prompt_logprobs=(
                [logprob(entry, -1) for entry in prompt_entries]
                if body.prompt_logprobs is not None
                else ()
            ),
        )


def _call_piece(call: ToolCall) -> pb.ToolCallPiece:
    return pb.ToolCallPiece(index=call.index, id=call.id, name=call.name, arguments=call.arguments)


def decided(decision: Decision, base: str) -> pb.RouteResponse:
    return pb.RouteResponse(
        model=decision.adapter or base,
        adapter=decision.adapter,
        stage=decision.stage,
        margin=decision.margin,
        reason=decision.reason,
        trace_json=[json.dumps(step) for step in decision.trace],
    )
