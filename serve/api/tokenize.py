"""/tokenize and /detokenize: text or a conversation to token ids, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import Field

from packhorse.serve.api.chat import Conversation, Effort
from packhorse.serve.api.fields import GenerateBody, TokenId
from packhorse.serve.api.generate import CallContext
from packhorse.serve.api.validation import LenientBody
from packhorse.serve.messages import ChatOptions, GenerateRequest, Sampling
from packhorse.serve.pipeline import Pipeline


class TokenizeChatBody(Conversation):
    """POST /tokenize with messages: the prompt that chat would see."""

    unsupported: ClassVar = {"chat_template": GenerateBody.unsupported["chat_template"]}

    documents: list[dict[str, str]] | None = None
    reasoning_effort: Effort | None = None
    model: str | None = None
    add_special_tokens: bool = False
    return_token_strs: bool | None = None

    def to_request(self, request_id: str, model: str) -> GenerateRequest:
        options = ChatOptions(
            tools=self.as_tools(),
            reasoning_effort=self.reasoning_effort,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            documents=tuple(self.documents or ()),
            template_variables=self.chat_template_kwargs or {},
        )
        return GenerateRequest(
            request_id,
            self.model or model,
            Sampling(),
            messages=self.as_messages(),
            chat=options,
            add_special_tokens=self.add_special_tokens,
        )


class TokenizeTextBody(LenientBody):
    """POST /tokenize with a prompt."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None

    def to_request(self, request_id: str, model: str) -> GenerateRequest:
        return GenerateRequest(
            request_id,
            self.model or model,
            Sampling(),
            prompt=self.prompt,
            add_special_tokens=self.add_special_tokens,
        )


class DetokenizeBody(LenientBody):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


TokenizeBody = TokenizeChatBody | TokenizeTextBody


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    """Each token as the vocabulary spells it; None when not requested."""


async def tokenize(pipeline: Pipeline, body: TokenizeBody, context: CallContext) -> Tokens:
    """The tokens of the prompt that a generating request would have. Raises ServeError."""
    caller = context.caller
    request = body.to_request(context.request_id, pipeline.models.default(caller))
    engine = pipeline.models.of(request.model, caller).engine
    token_ids = list(await engine.tokenize(replace(request, caller=caller)))
    strings = None
    if body.return_token_strs:
        strings = await engine.token_strings(token_ids)
    return Tokens(len(token_ids), engine.max_model_len, token_ids, strings)


async def detokenize(pipeline: Pipeline, body: DetokenizeBody, context: CallContext) -> str:
    """The text of token ids. Raises ServeError."""
    caller = context.caller
    model = pipeline.models.of(body.model or pipeline.models.default(caller), caller)
    return await model.engine.detokenize(body.tokens)
