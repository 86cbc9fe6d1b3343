"""The real engine: vLLM's AsyncLLM in this process, its engine core in a child process.

Prompts go through vLLM's own renderer, so they equal those of plain vLLM. Closing the generator
aborts the request. Uses vLLM's public API alone, and runs without any patch; `patches` are asked
for by name where they are of use. `tests/e2e` is the contract test of every symbol used here.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from packhorse.serve.engines.base import Capacity, answer_budget
from packhorse.serve.engines.images import LoadedImage
from packhorse.serve.engines.vllm import patches
from packhorse.serve.engines.vllm.arguments import (
    engine_args,
    max_active_loras,
    refuse_unpatched,
    refuse_what_would_crash,
    warn_of_missing_scales,
)
from packhorse.serve.engines.vllm.chat import (
    AnswerReader,
    Chat,
    parser_class,
    template_of,
    with_pictures,
)
from packhorse.serve.engines.vllm.constraints import structured_outputs
from packhorse.serve.engines.vllm.health import Health, Heartbeat, has_died
from packhorse.serve.engines.vllm.load_errors import MissingModules
from packhorse.serve.engines.vllm.loras import Loras
from packhorse.serve.engines.vllm.outputs import PlainOutputs, chunks_of, refuse_failure
from packhorse.serve.engines.vllm.patches.forkserver import engines_are_forked
from packhorse.serve.engines.vllm.pooling import Pools, pooler_of
from packhorse.serve.engines.vllm.sampling import effective_sampling, invalid, sampling_params
from packhorse.serve.errors import EngineDied, Invalid, Overloaded, StartupError
from packhorse.serve.messages import AdapterVersion, Chunk, GenerateRequest, Message, Prompt, Route
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.settings.engine import EngineSettings

if TYPE_CHECKING:  # a patch is imported when it is known to fit
    from packhorse.serve.engines.vllm.patches.engine_watch import EngineWatch
    from packhorse.serve.engines.vllm.patches.fast_outputs import ChunkCollector, FastOutputs

logger = logging.getLogger("packhorse.engine")

DEAD = "The engine has stopped."

# vLLM sets process-wide state while it makes an engine.
_making = threading.Lock()


@dataclass(frozen=True, slots=True)
class Rendered:
    """What `render` leaves for `generate`."""

    engine_input: Any
    params: SamplingParams
    reader: AnswerReader | None


class VllmEngine:
    """Satisfies the Engine protocol. Constructing it takes seconds: use a worker thread."""

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: EngineSettings,
        *,
        metrics: ModelMetrics | None = None,
    ) -> None:
        """`name` is the served one. Raises StartupError."""
        self._metrics = metrics or ModelMetrics(name)
        refuse_unpatched(settings)
        refuse_what_would_crash(folder, settings)
        args = engine_args(folder, name, settings)
        # Mistakes that need no engine to be told.
        template_of(settings)
        parser_class(settings)
        self._heartbeat = Heartbeat()
        self._fast: FastOutputs | None = None
        self._watch: EngineWatch | None = None
        self._health: Health | None = None
        loaded: dict[int, LoRARequest] = {}
        missing = MissingModules()
        try:
            with _making, engines_are_forked(), missing:
                self._llm = AsyncLLM.from_engine_args(
                    # The context decides the batch limits: as `vllm serve` has them.
                    args,
                    usage_context=UsageContext.OPENAI_API_SERVER,
                    stat_loggers=[self._stat_logger(loaded)],
                )
        except Exception as error:
            # vLLM raises many classes here, its child's failure among them.
            raise StartupError(missing.explain(folder, error)) from error
        self._closed = False
        self._closing: asyncio.Future[None] | None = None  # made with the first PlainOutputs
        self._numbers = itertools.count()
        try:
            self._set_up(settings, loaded)
            warn_of_missing_scales(folder, settings)
        except Exception:
            if self._health is not None:
                self._health.end_processes()
            self._llm.shutdown()
            raise
        self._report()

    def _stat_logger(self, loaded: dict[int, LoRARequest]) -> Any:
        """What vLLM reports its statistics to; `loaded` are the adapters, as they will be."""
        if not patches.use("lasting_metrics"):
            return self._heartbeat.stat_logger
        from packhorse.serve.engines.vllm.patches.lasting_metrics import stat_logger

        return stat_logger(self._metrics, loaded, self._heartbeat.step)

    def _set_up(self, settings: EngineSettings, loaded: dict[int, LoRARequest]) -> None:
        """What this class needs of vLLM's engine, which is there now."""
        self._chat = Chat(self._llm, settings)
        self.pooler = pooler_of(self._llm)
        self._pools: Pools | None = None
        if self.pooler is not None:
            self._pools = Pools(self._llm, self._chat, self.pooler, template_of(settings))
        if patches.use("fast_outputs"):
            from packhorse.serve.engines.vllm.patches.fast_outputs import FastOutputs

            self._fast = FastOutputs(self._llm)
        self.max_model_len: int = self._llm.model_config.max_model_len
        self._vocab_size: int = self._llm.model_config.get_vocab_size()
        self._defaults: dict[str, Any] = self._llm.model_config.get_diff_sampling_param()
        self._defaults.pop("max_tokens", None)  # ours to decide, see answer_budget
        scheduler = self._llm.vllm_config.scheduler_config
        if patches.use("engine_watch"):
            from packhorse.serve.engines.vllm.patches.engine_watch import EngineWatch

            self._watch = EngineWatch(self._llm)
            self._health = Health(self._watch, self._heartbeat, settings)
        self._loras = Loras(self._llm, loaded)
        self._by_priority = scheduler.policy == "priority"
        cache = self._llm.vllm_config.cache_config
        lora = self._llm.vllm_config.lora_config
        kv_cache_tokens = (cache.num_gpu_blocks or 0) * cache.block_size
        if self.pooler is not None and kv_cache_tokens < self.max_model_len:
            kv_cache_tokens = 0  # an encoder, which has none
        ranks = self._llm.vllm_config.parallel_config.data_parallel_size
        self.capacity = Capacity(
            scheduler.max_num_seqs * ranks,  # of each; blocks of the KV cache are summed by vLLM
            kv_cache_tokens,
            lora.max_loras if lora else 0,
            max_active_loras(settings) if lora else 0,
            lora.max_cpu_loras if lora else 0,
            lora.max_lora_rank if lora else 0,
        )

    def _report(self) -> None:
        """Says what the engine has become, which is not always what was asked for."""
        config = self._llm.vllm_config
        cache = config.cache_config
        tokens = self.capacity.kv_cache_tokens
        if self.pooler is not None:
            logger.info(
                "A pooling model: %s, at most %d tokens a text",
                self.pooler.score_type or "no scores", self.max_model_len,
            )  # fmt: skip
        if tokens:
            logger.info(
                "KV cache: %d tokens (%s), %.1f contexts of %d tokens at once",
                tokens, cache.cache_dtype, tokens / self.max_model_len, self.max_model_len,
            )  # fmt: skip
        compilation = config.compilation_config
        attention = getattr(config.attention_config, "backend", None)
        logger.info(
            "Engine: weights %s (%s), %s, attention %s, at most %d requests and %d tokens a step, "
            "prefix caching %s, chunked prefill %s",
            self._llm.model_config.dtype,
            self._llm.model_config.quantization or "not quantized",
            "eager"
            if self._llm.model_config.enforce_eager
            else f"torch.compile {compilation.mode}, CUDA graphs {compilation.cudagraph_mode}",
            attention or "chosen by vLLM",
            config.scheduler_config.max_num_seqs,
            config.scheduler_config.max_num_batched_tokens,
            "on" if cache.enable_prefix_caching else "off",
            "on" if config.scheduler_config.enable_chunked_prefill else "off",
        )
        logger.info("Patches of vLLM: %s", patches.summary())

    async def tokenize(self, request: GenerateRequest) -> list[int]:
        async with self._chat.loaded_images(request) as images:
            engine_input, _, _ = await self._engine_input(request, images, max_total_tokens=None)
        return list(engine_input["prompt_token_ids"])

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        known = self._known_tokens(token_ids, "tokens")
        text: str = await asyncio.to_thread(self._llm.renderer.get_tokenizer().decode, known)
        return text

    async def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        convert = self._llm.renderer.get_tokenizer().convert_ids_to_tokens
        strings: list[str] = await asyncio.to_thread(convert, list(token_ids))
        return strings

    async def tokenizer_info(self) -> dict[str, Any]:
        return self._chat.tokenizer_info()

    async def render(self, request: GenerateRequest, route: Route) -> Prompt:
        if request.pooling is not None and self._pools is not None:
            return await self._pools.render(request, request.pooling, route)
        constraint = request.sampling.constraint
        structured = structured_outputs(constraint) if constraint else None
        async with self._chat.loaded_images(request) as images:
            engine_input, template, ignored = await self._engine_input(
                request, images, max_total_tokens=self.max_model_len
            )
            digests = tuple(image.digest for image in images)
            del images
        token_ids = engine_input["prompt_token_ids"]
        budget = answer_budget(request, len(token_ids), self.max_model_len)
        reader = None
        if template is not None:
            reader = self._chat.reader(request, structured, template, token_ids)
        params = sampling_params(
            request,
            max_tokens=budget,
            defaults=self._defaults,
            structured=reader.structured if reader else structured,
        )
        if reader:
            params.skip_special_tokens = reader.skip_special_tokens
        if request.priority and not self._by_priority:
            ignored = (*ignored, "priority")
        text = engine_input.get("prompt") if request.echo else None
        if route.prefix_cache_salt is not None:
            engine_input["cache_salt"] = route.prefix_cache_salt
        rendered = Rendered(engine_input, params, reader)
        return Prompt(
            token_ids,
            budget,
            text,
            rendered,
            effective_sampling(params),
            is_parsed=reader is not None,
            is_lasting=template is None or self._chat.is_lasting(request),
            images=digests,
            ignored=ignored,
        )

    async def _engine_input(
        self,
        request: GenerateRequest,
        images: Sequence[LoadedImage] = (),
        *,
        max_total_tokens: int | None,
    ) -> tuple[Any, ChatParams | None, tuple[str, ...]]:
        """vLLM's rendered prompt, for chat what its template was given, and the fields that it has
        no use for. `images` are the conversation's, loaded. Raises Invalid.
        """
        is_chat = request.messages is not None
        special = request.add_special_tokens
        truncate = request.truncate_prompt_tokens
        if truncate == -1:  # to what leaves room for the answer, if any does
            sampling = request.sampling
            wanted = sampling.max_tokens or sampling.default_max_tokens or 1
            if wanted >= self.max_model_len:  # an upper bound, and no demand
                wanted = max(1, sampling.min_tokens)
            truncate = max(1, self.max_model_len - wanted)
        renderer = self._llm.renderer
        prompt = request.prompt
        try:
            limits = TokenizeParams(
                max_total_tokens=max_total_tokens,
                max_output_tokens=0,  # ours to decide, see answer_budget
                truncate_prompt_tokens=truncate,
                add_special_tokens=not is_chat if special is None else special,
                needs_detokenization=request.echo,
            )
            if request.messages is not None:
                template, ignored = self._chat.params(request)
                messages = with_pictures(map(_own_copy, request.messages), images)
                _, (rendered,) = await renderer.render_chat_async([messages], template, limits)
                return rendered, template, ignored
            if isinstance(prompt, str):
                (rendered,) = await renderer.render_cmpl_async([{"prompt": prompt}], limits)
                return rendered, None, ()
            token_ids = self._known_tokens(prompt or (), "prompt")
            if truncate is None and not request.echo:
                return tokens_input(token_ids), None, ()
            prompts = [{"prompt_token_ids": token_ids}]
            (rendered,) = await renderer.render_cmpl_async(prompts, limits)
            return rendered, None, ()
        except (VLLMClientError, ValueError, TypeError, RecursionError) as error:
            raise invalid(error, request.prompt_param) from error
        except RuntimeError as error:
            if not self._closed:
                raise
            raise EngineDied(DEAD, retry_after_s=30) from error  # its threads are gone

    def _known_tokens(self, token_ids: Sequence[int], param: str) -> list[int]:
        """The ids as a list. One outside the vocabulary would crash the model, so it is refused."""
        known = list(token_ids)
        if known and not (min(known) >= 0 and max(known) < self._vocab_size):
            unknown = next(token for token in known if not 0 <= token < self._vocab_size)
            raise Invalid(
                f"Token id {unknown} is outside the vocabulary (0 to {self._vocab_size - 1}).",
                param=param,
            )
        return known

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        rendered: Rendered = prompt.engine_input
        constrained = request.pooling is None and rendered.params.structured_outputs is not None
        outputs = None
        finished = False
        try:
            lora = self._loras.of(route.adapter)
            if self._pools is not None:
                priority = request.priority if self._by_priority else 0
                yield await self._pools.vectors(
                    prompt.engine_input, request, lora, self._when_closing(), priority=priority
                )
                return
            outputs = await self._submit(rendered, request, lora, prompt.when_read)
            reader = rendered.reader
            while not finished:
                output = await outputs.get()
                if isinstance(output, Chunk):
                    finished = output.finish_reason is not None
                    if finished:
                        refuse_failure(output.finish_reason, constrained=constrained)
                    if reader is None:
                        yield output
                        continue
                    chunks: Iterable[Chunk] = (output,)
                else:
                    finished = output.finished
                    chunks = chunks_of(output, self._llm.renderer.get_tokenizer())
                for chunk in chunks:
                    refuse_failure(chunk.finish_reason, constrained=constrained)
                    if reader is None:
                        yield chunk
                    elif not request.stream:
                        yield reader.whole(chunk)
                    elif (piece := reader.piece(chunk)) is not None:
                        yield piece
        except EngineDeadError as error:
            finished = True  # nothing is left to abort
            raise EngineDied(DEAD, retry_after_s=30) from error
        except GracefulHTTPError as error:
            self._metrics.admission_refusals.labels("engine_queue").inc()
            raise Overloaded(f"The engine's queue is full: {error}", retry_after_s=1) from error
        except VLLMClientError as error:
            raise invalid(error, "structured_outputs" if constrained else None) from error
        except Exception as error:
            # What breaks vLLM's output handler is told to all requests, and is the engine's end; so
            # is, often, what fails the question that a first request asks.
            if not await has_died(self._llm):
                raise
            finished = True
            raise EngineDied(DEAD, retry_after_s=30) from error
        finally:
            if outputs is not None and not finished:
                await self._abort(outputs)

    async def _submit(
        self,
        rendered: Rendered,
        request: GenerateRequest,
        lora: LoRARequest | None,
        when_read: Callable[[], None] | None,
    ) -> PlainOutputs | ChunkCollector:
        """Hand the request to the engine; returns what its outputs come out of. Only the fast path
        knows when the prompt is read.
        """
        params, reader = rendered.params, rendered.reader
        plain = params.n == 1 and params.logprobs is None and params.prompt_logprobs is None
        priority = request.priority if self._by_priority else 0
        reasoning: dict[str, Any] = {}
        if reader is not None:
            reasoning["reasoning_ended"] = reader.reasoning_ended
            reasoning["reasoning_parser_kwargs"] = reader.reasoning_kwargs
        if self._fast is not None and plain:
            return await self._fast.submit(
                request.request_id,
                rendered.engine_input,
                params,
                lora=lora,
                priority=priority,
                reasoning=reasoning,
                when_read=when_read,
            )
        # Of its own, because an abort by this id ends all requests that have it.
        external_id = f"{request.request_id}-{next(self._numbers)}"
        outputs = self._llm.generate(
            rendered.engine_input,
            params,
            external_id,
            lora_request=lora,
            priority=priority,
            **{name: value for name, value in reasoning.items() if value is not None},
        )
        abort = partial(self._llm.abort, external_id)
        return PlainOutputs(outputs, abort, self._when_closing())

    def _when_closing(self) -> asyncio.Future[None]:
        """Done when the engine is being closed."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_future()
        return self._closing

    async def _abort(self, outputs: PlainOutputs | ChunkCollector) -> None:
        if isinstance(outputs, PlainOutputs):
            await outputs.abort()
        elif self._fast is not None:
            await self._fast.abort(outputs)

    async def load_adapter(self, adapter: AdapterVersion) -> None:
        await self._loras.load(adapter)

    async def unload_adapter(self, adapter: AdapterVersion) -> None:
        await self._loras.unload(adapter)

    async def check(self) -> None:
        if self._closed or self._llm.errored:
            raise EngineDied(DEAD, retry_after_s=30)
        if self._health is not None:
            self._health.look()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._health is not None:
            self._health.end_processes()
        # vLLM tells its callers of an engine's death, but not of an end that it was asked for.
        if self._closing is not None:
            self._closing.set_result(None)
        if self._watch is not None:
            self._watch.fail_callers()
        elif self._fast is not None:
            self._fast.fail_requests()
        await asyncio.to_thread(self._llm.shutdown)


def _own_copy(message: Message) -> dict[str, Any]:
    """vLLM's renderer turns the arguments of tool calls into objects, in place."""
    copied = dict(message)
    if "tool_calls" in copied:
        copied["tool_calls"] = copy.deepcopy(copied["tool_calls"])
    return copied
