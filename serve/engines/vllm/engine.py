"""The real engine: vLLM's AsyncLLM in this process, its EngineCore in a child.

Prompts go through vLLM's own renderer, so they equal those of plain vLLM. Closing the generator
aborts the request. Checked against vLLM 0.32; `tests/e2e` is the contract test of every symbol used
here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from vllm import AsyncEngineArgs, SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.inputs import tokens_input
from vllm.platforms import current_platform
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from serve.errors import Invalid, StartupError, Unavailable
from serve.messages import Chunk, FinishReason, GenerateRequest, Prompt, Route, Sampling
from serve.settings import EngineSettings

GIB = 1024**3
DEAD = "The engine has stopped; restart the server."
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


def engine_args(folder: Path, name: str, settings: EngineSettings) -> AsyncEngineArgs:
    """vLLM's arguments from ours; unset ones keep vLLM's defaults, but for the CPU, see
    EngineSettings.
    """
    args: dict[str, Any] = {
        "model": str(folder),
        "served_model_name": name,
        "dtype": settings.dtype,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "seed": settings.seed,
        "use_tqdm_on_load": False,
    }
    on_cpu = current_platform.is_cpu()
    optional = {
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "kv_cache_memory_bytes": settings.kv_cache_bytes or (GIB if on_cpu else None),
        "enforce_eager": settings.enforce_eager
        if settings.enforce_eager is not None
        else (True if on_cpu else None),
    }
    return AsyncEngineArgs(
        **args, **{key: value for key, value in optional.items() if value is not None}
    )


def sampling_params(sampling: Sampling, *, max_tokens: int, stream: bool) -> SamplingParams:
    """vLLM's sampling parameters. Raises Invalid when vLLM finds a value out of range."""
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            stop=list(sampling.stop),
            ignore_eos=sampling.ignore_eos,
            output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        )
    except (ValueError, VLLMClientError) as error:
        raise Invalid(str(error), param=getattr(error, "parameter", None)) from error


class VllmEngine:
    """Satisfies the Engine protocol. Constructing it takes half a minute and blocks: use a worker
    thread.
    """

    def __init__(self, folder: Path, name: str, settings: EngineSettings) -> None:
        args = engine_args(folder, name, settings)
        try:
            self._llm = AsyncLLM.from_engine_args(args)
        except Exception as error:
            raise StartupError(f"vLLM could not load {folder}: {error}") from error
        self.max_model_len: int = self._llm.model_config.max_model_len
        self._closed = False

    async def render(self, request: GenerateRequest, route: Route) -> Prompt:
        renderer = self._llm.renderer
        limits = TokenizeParams(
            max_total_tokens=self.max_model_len, add_special_tokens=request.messages is None
        )
        param = "messages" if request.messages is not None else "prompt"
        try:
            if request.messages is not None:
                tools = [dict(tool) for tool in request.tools] or None
                template = ChatParams(
                    chat_template_kwargs={
                        "add_generation_prompt": True,
                        "tokenize": False,
                        "tools": tools,
                    }
                )
                _, (engine_input,) = await renderer.render_chat_async(
                    [[dict(message) for message in request.messages]], template, limits
                )
            elif isinstance(request.prompt, str):
                (engine_input,) = await renderer.render_cmpl_async(
                    [{"prompt": request.prompt}], limits
                )
            else:
                engine_input = tokens_input(self._known_tokens(request.prompt or ()))
        except (VLLMClientError, ValueError, TypeError) as error:
            raise Invalid(f"The request does not render: {error}", param=param) from error
        token_ids = tuple(engine_input["prompt_token_ids"])
        if not token_ids:
            raise Invalid("The prompt is empty; send at least one token.", param=param)
        room = self.max_model_len - len(token_ids)
        if room <= 0:
            raise Invalid(
                f"The prompt has {len(token_ids)} tokens, which leaves no room for an answer "
                f"within the model's {self.max_model_len}; shorten it.",
                param=param,
            )
        wanted = request.sampling.max_tokens
        if wanted is not None and wanted > room:
            raise Invalid(
                f"max_tokens={wanted} and the prompt's {len(token_ids)} tokens are above the "
                f"model's {self.max_model_len}; lower max_tokens to {room} or shorten the prompt.",
                param="max_tokens",
            )
        return Prompt(token_ids, wanted or room, engine_input)

    def _known_tokens(self, token_ids: tuple[int, ...]) -> list[int]:
        """The ids as a list. An id outside the vocabulary would crash the model's embedding, so it
        is refused here.
        """
        vocab_size: int = self._llm.model_config.get_vocab_size()
        unknown = next((token for token in token_ids if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise Invalid(
                f"Token id {unknown} is outside the vocabulary (0 to {vocab_size - 1}).",
                param="prompt",
            )
        return list(token_ids)

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        params = sampling_params(
            request.sampling, max_tokens=prompt.max_tokens, stream=request.stream
        )
        outputs = self._llm.generate(prompt.engine_input, params, request.request_id)
        # aclosing: leaving early closes vLLM's generator at once, which aborts the request, instead
        # of at collection.
        async with contextlib.aclosing(outputs):
            try:
                async for output in outputs:
                    (completion,) = output.outputs
                    reason = completion.finish_reason
                    if reason is not None and reason not in REASONS:
                        # "abort" without our asking, or vLLM's own "error": the engine is going
                        # down or has failed it.
                        raise Unavailable(
                            f"The engine gave up on this request ({reason}); send it again."
                        )
                    yield Chunk(
                        completion.text,
                        len(completion.token_ids),
                        None if reason is None else REASONS[reason],
                        output.num_cached_tokens or 0,
                    )
            except EngineDeadError as error:
                raise Unavailable(DEAD, retry_after_s=30) from error
            except (VLLMClientError, ValueError) as error:
                raise Invalid(str(error), param=getattr(error, "parameter", None)) from error

    async def check(self) -> None:
        if self._closed or self._llm.errored:
            raise Unavailable(DEAD, retry_after_s=30)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._llm.shutdown)
