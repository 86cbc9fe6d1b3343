"""What the calls on pooling models share, which generate nothing: from a validated body to one
request an input, and from requests to their vectors. /classify and /pooling have no more than this.

embeddings.py and rerank.py have the other calls. How the data is encoded is the protocol's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from packhorse.serve.api.chat import Messages
from packhorse.serve.api.fields import INT32_MAX, INT64_MAX, CacheOptions, TokenIds
from packhorse.serve.api.generate import AnswerHead, CallContext, head_of, total_usage
from packhorse.serve.api.validation import LenientBody, Unsupported
from packhorse.serve.errors import Invalid
from packhorse.serve.messages import (
    ChatOptions,
    GenerateRequest,
    Pooling,
    PoolingTask,
    Sampling,
    Usage,
    Vectors,
)
from packhorse.serve.pipeline import Pipeline, Stream, merged

MAX_VECTOR_BYTES = 128 * 2**20
"""Of all vectors of one call, as float32. Their JSON takes several times as much."""
Input = str | tuple[int, ...]
Texts = Annotated[list[str], Field(fail_fast=True, min_length=1)]
TokenLists = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)]


class PoolingBody(LenientBody):
    """The fields of all calls on pooling models: OpenAI's, and vLLM's additions."""

    unsupported: ClassVar = {
        "padding": Unsupported(("do_not_pad",), "leave it out"),
        "normalize": Unsupported((), "send use_activation"),
        "chat_template": Unsupported((), "templates are the server's to choose"),
        "images": Unsupported(([],), "send text"),
        "data": Unsupported((), "send input"),
    }
    no_effect: ClassVar = frozenset(("user",))

    model: str | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=INT32_MAX)
    """Tokens to keep of too long an input; -1: as many as the model takes."""
    truncation_side: Literal["left", "right"] | None = None
    """Where tokens are left out; None: where the tokenizer does."""
    add_special_tokens: bool | None = None
    use_activation: bool | None = None
    priority: int = Field(0, ge=-(2**63), le=INT64_MAX)
    timeout_s: float | None = Field(None, gt=0)
    cache: CacheOptions | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    user: Any = None

    @model_validator(mode="after")
    def _keeps_something(self) -> PoolingBody:
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens=0 leaves nothing; keep at least one token")
        return self

    def to_requests(self, pipeline: Pipeline, context: CallContext) -> list[GenerateRequest]:
        """One request an input, in order. Raises Invalid, UnknownModel, Forbidden, Unavailable."""
        raise NotImplementedError

    def request(self, pipeline: Pipeline, context: CallContext) -> GenerateRequest:
        """The request without its input."""
        return GenerateRequest(
            context.request_id,
            self.model or pipeline.models.default(context.caller),
            Sampling(),
            add_special_tokens=self.add_special_tokens,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            priority=self.priority,
            caller=context.caller,
            timeout_s=context.timeout_s,
            cache=context.cache,
            cache_salt=self.cache_salt,
            ignored=self.ignored,
            trace=context.trace,
        )


def numbered(
    request: GenerateRequest, inputs: Sequence[tuple[Input, Pooling]], max_inputs: int
) -> list[GenerateRequest]:
    """The requests of one call, which differ in their inputs. Raises Invalid for more than
    max_inputs.
    """
    if len(inputs) > max_inputs:
        raise Invalid(
            f"This call has {len(inputs)} inputs, above the limit of {max_inputs}; send several "
            "calls.",
            param=inputs[-1][1].param,
        )
    return [
        replace(
            request,
            request_id=request.request_id if len(inputs) == 1 else f"{request.request_id}-{number}",
            prompt=prompt,
            pooling=pooling,
            ignored=request.ignored if number == 0 else (),  # counted once a call
        )
        for number, (prompt, pooling) in enumerate(inputs)
    ]


class InputBody(PoolingBody):
    """A body with OpenAI's `input`, or with vLLM's `messages` of one conversation."""

    input: str | TokenIds | Texts | TokenLists | None = None
    messages: Messages | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Messages that stand in `input`, which vLLM takes too. Raises Invalid for an empty list,
        of which each kind of list would say something else.
        """
        sent = document.get("input")
        if sent == []:
            raise Invalid("input: the list is empty; send at least one text.", param="input")
        is_chat = isinstance(sent, list) and bool(sent) and all(isinstance(m, dict) for m in sent)
        if not is_chat or document.get("messages") is not None:
            return document
        kept = {name: value for name, value in document.items() if name != "input"}
        return {**kept, "messages": sent}

    @model_validator(mode="after")
    def _has_one_input(self) -> InputBody:
        if (self.input is None) == (self.messages is None):
            raise ValueError("send input or messages, one of the two")
        parts = [
            part
            for message in self.messages or ()
            for part in (message.content if isinstance(message.content, list) else ())
        ]
        if any(part.type != "text" for part in parts):
            raise ValueError("these calls read text alone; leave out images")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        for name in ("chat_template", "tokenize", "messages", "tools"):
            if name in (self.chat_template_kwargs or ()):
                raise ValueError(f"chat_template_kwargs.{name} is the server's to decide")
        return self

    def pooling(self) -> Pooling:
        """What is wanted of each input."""
        raise NotImplementedError

    def inputs(self) -> list[Input]:
        """The inputs of a batch; one where one was sent."""
        sent: Any = self.input
        if isinstance(sent, str) or isinstance(sent[0], int):
            sent = [sent]
        return [one if isinstance(one, str) else tuple(one) for one in sent]

    def to_requests(self, pipeline: Pipeline, context: CallContext) -> list[GenerateRequest]:
        pooling = replace(self.pooling(), truncation_side=self.truncation_side)
        request = self.request(pipeline, context)
        if self.messages is not None:
            options = ChatOptions(
                add_generation_prompt=self.add_generation_prompt,
                continue_final_message=self.continue_final_message,
                template_variables=self.chat_template_kwargs or {},
            )
            messages = tuple(message.as_message() for message in self.messages)
            return [replace(request, messages=messages, chat=options, pooling=pooling)]
        inputs = [(one, pooling) for one in self.inputs()]
        return numbered(request, inputs, pipeline.max_inputs)


class ClassifyBody(InputBody):
    """POST /classify."""

    def pooling(self) -> Pooling:
        return Pooling("classify", use_activation=self.use_activation)


class PoolBody(InputBody):
    """POST /pooling: the vectors themselves, of each token unless `task` says otherwise."""

    task: PoolingTask | None = None
    dimensions: int | None = Field(None, ge=1, le=INT32_MAX)
    encoding_format: Literal["float", "base64"] = "float"
    embed_dtype: Literal["float32"] = "float32"
    endianness: Literal["native", "little"] = "little"

    def pooling(self) -> Pooling:
        return Pooling(self.task, dimensions=self.dimensions, use_activation=self.use_activation)


class Pooled(NamedTuple):
    """What became of the requests of one call, in order."""

    streams: list[Stream]
    vectors: list[Vectors]

    @property
    def usage(self) -> Usage:
        return total_usage(self.streams)

    def head(self, id_prefix: str, request_id: str) -> AnswerHead:
        return head_of(id_prefix, request_id, self.streams)


async def pool(pipeline: Pipeline, requests: Sequence[GenerateRequest]) -> Pooled:
    """Answer the requests of one call, all or none. Raises ServeError."""
    streams = await pipeline.start_all(requests)
    found: dict[int, Vectors] = {}
    held = 0
    try:
        async with aclosing(merged(streams)) as chunks:
            async for number, chunk in chunks:
                if chunk.vectors is not None:
                    held += len(chunk.vectors.data)
                    if held > MAX_VECTOR_BYTES:
                        raise Invalid(
                            f"The vectors of this call have more than {MAX_VECTOR_BYTES} bytes; "
                            "send fewer or shorter inputs.",
                            param=requests[0].prompt_param,
                        )
                    found[number] = chunk.vectors
    finally:
        for stream in streams:
            await stream.close()
    return Pooled(streams, [found[number] for number in range(len(streams))])


def floats(vectors: Vectors) -> list[float]:
    """All rows, one after the other."""
    return list(struct.unpack(f"<{len(vectors.data) // 4}f", vectors.data))


def rows(vectors: Vectors) -> list[list[float]]:
    """A row a token; one row for a whole text."""
    flat, count = floats(vectors), vectors.rows or 1
    width = len(flat) // count
    return [flat[start : start + width] for start in range(0, len(flat), width)] if width else []


@dataclass(frozen=True, slots=True)
class Classified:
    """The classes of one input."""

    label: str | None
    """The name of the likeliest; None where classes have no names."""
    probabilities: list[float]


def classes(pooled: Pooled) -> list[Classified]:
    """The data of an answer of /classify."""
    found = []
    for stream, vectors in zip(pooled.streams, pooled.vectors, strict=True):
        probabilities = floats(vectors)
        pooler = stream.engine.pooler
        likeliest = max(range(len(probabilities)), key=probabilities.__getitem__)
        labels = pooler.labels if pooler else ()
        label = labels[likeliest] if likeliest < len(labels) else None
        found.append(Classified(label or None, probabilities))
    return found
