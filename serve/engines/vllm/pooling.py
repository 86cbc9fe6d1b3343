"""Embeddings, scores and classes on vLLM's pooling runner, as vLLM's own server makes them.

Texts and token ids go through vLLM's renderer, pairs of a cross-encoder through vLLM's own
processor for them, which knows each model's way to join a query and a document.
"""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from vllm import PoolingParams, PoolingRequestOutput
from vllm.entrypoints.pooling.scoring.io_processor import CrossEncoderIOProcessor
from vllm.entrypoints.pooling.scoring.utils import truncate_text_to_tokens
from vllm.entrypoints.pooling.typing import ScoringRenderParams
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.renderers.chat_utils import ChatTemplateConfig
from vllm.renderers.params import TokenizeParams
from vllm.tasks import POOLING_TASKS
from vllm.v1.engine.async_llm import AsyncLLM

from packhorse.serve.engines.base import check_pooling_room, pooling_task
from packhorse.serve.engines.vllm.chat import Chat
from packhorse.serve.engines.vllm.outputs import PlainOutputs
from packhorse.serve.engines.vllm.sampling import invalid
from packhorse.serve.errors import Invalid, Unavailable
from packhorse.serve.messages import (
    Chunk,
    GenerateRequest,
    Pooler,
    Pooling,
    PoolingTask,
    Prompt,
    Route,
    Vectors,
)

# A text with more for each token that the model takes is probably too long.
MANY_CHARS = 8


class Rendered(NamedTuple):
    """What `render` leaves for `vectors`."""

    engine_input: Any
    params: PoolingParams


def pooler_of(llm: AsyncLLM) -> Pooler | None:
    """What the model can do, as far as its configuration says; None when it generates."""
    config = llm.model_config
    if config.runner_type != "pooling":
        return None
    named: dict[int, str] = getattr(config.hf_config, "id2label", None) or {}
    labels = tuple(named.get(number, "") for number in range(len(named)))
    score_type = config.score_type
    if score_type == "cross-encoder" and config.hf_config.num_labels != 1:
        score_type = None  # it names classes; none of them is a score
    if config.architecture == "JinaForRanking":
        score_type = None  # reads all documents at once, which needs a way of its own
    return Pooler(score_type, labels)


class Pools:
    """The pooling requests of one engine."""

    def __init__(self, llm: AsyncLLM, chat: Chat, pooler: Pooler, template: str | None) -> None:
        """`template` is the chat template of the settings, for pairs."""
        self._llm = llm
        self._chat = chat
        self._max_model_len: int = llm.model_config.max_model_len
        self._vocab_size: int = llm.model_config.get_vocab_size()
        self._numbers = itertools.count()
        self._longest = ("", "")
        """The last text that was far too long, and its beginning."""
        self._pairs: CrossEncoderIOProcessor | None = None
        if pooler.score_type == "cross-encoder":
            self._pairs = CrossEncoderIOProcessor(
                llm.vllm_config, llm.renderer, ChatTemplateConfig(chat_template=template)
            )

    async def render(self, request: GenerateRequest, pooling: Pooling, route: Route) -> Prompt:
        """Raises Invalid."""
        tasks = await self._llm.get_supported_tasks()
        task = pooling_task(request, [name for name in tasks if name in POOLING_TASKS])
        params = self._params(pooling, task)
        try:
            limits = self._limits(request, pooling)
            if pooling.pair is not None:
                engine_input, params = await self._pair(request, pooling, limits, params)
            else:
                engine_input = await self._input(request, limits)
        except NotImplementedError as error:
            raise Invalid(
                "This model's tokenizer cannot cut a query or a document by itself; send "
                "truncate_prompt_tokens.",
                param=request.prompt_param,
            ) from error
        except (VLLMClientError, ValueError, TypeError, RecursionError) as error:
            raise invalid(error, request.prompt_param) from error
        token_ids = engine_input["prompt_token_ids"]
        check_pooling_room(request, len(token_ids), self._max_model_len)
        if route.prefix_cache_salt is not None:
            engine_input["cache_salt"] = route.prefix_cache_salt
        is_lasting = request.messages is None or self._chat.is_lasting(request)
        rendered = Rendered(engine_input, params)
        return Prompt(token_ids, 0, engine_input=rendered, is_lasting=is_lasting)

    def _params(self, pooling: Pooling, task: PoolingTask) -> PoolingParams:
        """vLLM's parameters, checked. Raises Invalid for dimensions that the model has not."""
        params = PoolingParams(
            task=task, dimensions=pooling.dimensions, use_activation=pooling.use_activation
        )
        try:
            params.verify(self._llm.model_config)
        except (VLLMClientError, ValueError) as error:
            raise invalid(error, "dimensions" if pooling.dimensions else None) from error
        return params

    def _limits(self, request: GenerateRequest, pooling: Pooling) -> TokenizeParams:
        encoder = self._llm.model_config.encoder_config or {}
        special = request.add_special_tokens
        default = request.messages is None  # a chat template has its own
        return TokenizeParams(
            max_total_tokens=self._max_model_len,
            max_output_tokens=0,
            truncate_prompt_tokens=request.truncate_prompt_tokens,
            truncation_side=pooling.truncation_side,
            do_lower_case=encoder.get("do_lower_case", False),
            add_special_tokens=default if special is None else special,
            max_total_tokens_param="max_model_len",
        )

    async def _input(self, request: GenerateRequest, limits: TokenizeParams) -> Any:
        renderer = self._llm.renderer
        prompt = request.prompt
        if request.messages is not None:
            template, _ = self._chat.params(request)
            messages = [dict(message) for message in request.messages]
            _, (rendered,) = await renderer.render_chat_async([messages], template, limits)
            return rendered
        if isinstance(prompt, str):
            (rendered,) = await renderer.render_cmpl_async([{"prompt": prompt}], limits)
            return rendered
        token_ids = list(prompt or ())
        unknown = [token for token in token_ids if not 0 <= token < self._vocab_size]
        if unknown:  # it would crash the model
            raise Invalid(
                f"Token id {unknown[0]} is outside the vocabulary (0 to {self._vocab_size - 1}).",
                param=request.prompt_param,
            )
        (rendered,) = await renderer.render_cmpl_async([{"prompt_token_ids": token_ids}], limits)
        return rendered

    async def _pair(
        self,
        request: GenerateRequest,
        pooling: Pooling,
        limits: TokenizeParams,
        params: PoolingParams,
    ) -> tuple[Any, PoolingParams]:
        """The query and the document as one input; where the document begins is in the params."""
        if self._pairs is None:
            raise ValueError("this model does not read pairs")
        query, document = str(request.prompt), str(pooling.pair)
        if limits.truncation_side != "left":
            query, document = await self._bounded(query), await self._bounded(document)
        made = await self._pairs.render_async(
            ScoringRenderParams(
                data_1=query,
                data_2=document,
                chat_template=self._pairs.chat_template,
                max_tokens_per_query=pooling.max_tokens_per_query or 0,
                max_tokens_per_doc=pooling.max_tokens_per_doc or 0,
                tok_params=limits,
                prompt_extras=None,
                skip_mm_cache=False,
                params=params,
                lora_requests=None,
                priorities=0,
            )
        )
        return made["prompts"], made["params"]

    async def _bounded(self, text: str) -> str:
        """The beginning of the text that a token more than fit can hold: what follows is never
        read, and a long query would be tokenized again with each of its documents.
        """
        if len(text) <= self._max_model_len * MANY_CHARS:
            return text
        tokenizer = self._llm.renderer.get_tokenizer()
        if not getattr(tokenizer, "is_fast", False):  # it cannot tell where a token ends
            return text
        if self._longest[0] != text:
            most = self._max_model_len + 1
            cut = await asyncio.to_thread(truncate_text_to_tokens, text, tokenizer, most)
            self._longest = text, cut
        return self._longest[1]

    async def vectors(
        self,
        rendered: Rendered,
        request: GenerateRequest,
        lora: LoRARequest | None,
        closing: asyncio.Future[None],
        *,
        priority: int,
    ) -> Chunk:
        """The answer. Raises what vLLM raises; the request is aborted when this is cancelled."""
        external_id = f"{request.request_id}-{next(self._numbers)}"
        encoding = self._llm.encode(
            rendered.engine_input,
            rendered.params.clone(),  # vLLM writes into it
            external_id,
            lora_request=lora,
            priority=priority,
        )
        outputs = PlainOutputs(encoding, partial(self._llm.abort, external_id), closing)
        output: PoolingRequestOutput | None = None
        try:
            while output is None or not output.finished:
                output = await outputs.get()
        finally:
            if output is None or not output.finished:
                await outputs.abort()
        return _chunk(output)


def _chunk(output: PoolingRequestOutput) -> Chunk:
    if output.error is not None:
        raise Unavailable("The engine gave up on this; send it again.")
    data = output.outputs.data.float().cpu().numpy()
    array = np.ascontiguousarray(data, dtype="<f4")
    if not np.isfinite(array).all():
        raise Invalid(
            "The model's output for an input is not a number; change it, or serve the model with "
            "--dtype float32."
        )
    rows = array.shape[0] if array.ndim > 1 else None
    vectors = Vectors(array.tobytes(), rows)
    return Chunk("", (), "stop", cached_tokens=output.num_cached_tokens or 0, vectors=vectors)
