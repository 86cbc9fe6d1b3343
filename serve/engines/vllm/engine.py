"""The real engine: vLLM's AsyncLLM in this process, its EngineCore in a child.

Prompts go through vLLM's own renderer, so they equal those of plain vLLM. Closing the generator
aborts the request. Checked against vLLM 0.32; `tests/e2e` is the contract test of every symbol used
here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncGenerator
from multiprocessing import resource_tracker
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

from serve.engines.base import answer_budget
from serve.errors import Invalid, StartupError, Unavailable
from serve.messages import Chunk, FinishReason, GenerateRequest, Prompt, Route
from serve.settings import EngineSettings

GIB = 1024**3
DEAD = "The engine has stopped; restart the server."
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


def engine_args(folder: Path, name: str, settings: EngineSettings) -> AsyncEngineArgs:
    """vLLM's arguments from ours; unset ones keep vLLM's defaults, but for the CPU, see
    EngineSettings.
    """
    on_cpu = current_platform.is_cpu()
    eager = True if on_cpu and settings.enforce_eager is None else settings.enforce_eager
    optional = {
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "kv_cache_memory_bytes": settings.kv_cache_bytes or (GIB if on_cpu else None),
        "enforce_eager": eager,
    }
    return AsyncEngineArgs(
        model=str(folder),
        served_model_name=name,
        dtype=settings.dtype,
        kv_cache_dtype=settings.kv_cache_dtype,
        seed=settings.seed,
        use_tqdm_on_load=False,
        **{key: value for key, value in optional.items() if value is not None},
    )


def refuse_what_would_crash(folder: Path, settings: EngineSettings) -> None:
    """Raises StartupError for float16 under W8A8 on a CPU: its kernel aborts the whole process."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    rounds_inputs = any(
        (group.get("input_activations") or {}).get("type") == "int" for group in groups.values()
    )
    own = str(config.get("dtype") or config.get("torch_dtype") or "")
    dtype = own if settings.dtype == "auto" else settings.dtype
    if current_platform.is_cpu() and rounds_inputs and dtype in ("float16", "half"):
        raise StartupError(
            f"{folder} has 8-bit weights and activations, which vLLM's CPU kernel runs in bfloat16 "
            f"only, not in {dtype}; pass --dtype bfloat16."
        )


class VllmEngine:
    """Satisfies the Engine protocol. Constructing it takes half a minute: use a worker thread."""

    def __init__(self, folder: Path, name: str, settings: EngineSettings) -> None:
        refuse_what_would_crash(folder, settings)
        # The engine's processes inherit this thread's mask: a terminal's Ctrl-C, which goes to the
        # whole process group, must reach only us, or there is nothing left to drain.
        # (The resource tracker first: its start, part of the first spawn, would unblock SIGINT.)
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._llm = AsyncLLM.from_engine_args(engine_args(folder, name, settings))
        except Exception as error:
            # vLLM raises many classes here, its child's failure among them.
            raise StartupError(f"vLLM could not load {folder}: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.max_model_len: int = self._llm.model_config.max_model_len
        self._defaults: dict[str, Any] = self._llm.model_config.get_diff_sampling_param()
        self._defaults.pop("max_tokens", None)  # ours to decide, see answer_budget
        self._closed = False

    async def render(self, request: GenerateRequest, route: Route) -> Prompt:
        renderer = self._llm.renderer
        is_chat = request.messages is not None
        limits = TokenizeParams(max_total_tokens=self.max_model_len, add_special_tokens=not is_chat)
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
                messages = [dict(message) for message in request.messages]
                _, (engine_input,) = await renderer.render_chat_async([messages], template, limits)
            elif isinstance(request.prompt, str):
                prompts = [{"prompt": request.prompt}]
                (engine_input,) = await renderer.render_cmpl_async(prompts, limits)
            else:
                engine_input = tokens_input(self._known_tokens(request.prompt or ()))
        except (VLLMClientError, ValueError, TypeError, RecursionError) as error:
            raise Invalid(
                f"The request does not render: {_reason(error)}",
                param="messages" if is_chat else "prompt",
            ) from error
        token_ids = tuple(engine_input["prompt_token_ids"])
        budget = answer_budget(request, len(token_ids), self.max_model_len)
        return Prompt(token_ids, budget, engine_input)

    def _known_tokens(self, token_ids: tuple[int, ...]) -> list[int]:
        """The ids as a list. One outside the vocabulary would crash the model, so it is refused."""
        vocab_size: int = self._llm.model_config.get_vocab_size()
        unknown = next((token for token in token_ids if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise Invalid(
                f"Token id {unknown} is outside the vocabulary (0 to {vocab_size - 1}).",
                param="prompt",
            )
        return list(token_ids)

    def _sampling_params(self, request: GenerateRequest, max_tokens: int) -> SamplingParams:
        """vLLM's sampling parameters: the request's over the model's own over vLLM's."""
        sampling = request.sampling
        names = (
            "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "seed",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(sampling, name)) is not None}
        streams = request.stream
        try:
            return SamplingParams(
                **{**self._defaults, **given},
                max_tokens=max_tokens,
                min_tokens=sampling.min_tokens,
                stop=list(sampling.stop),
                ignore_eos=sampling.ignore_eos,
                output_kind=RequestOutputKind.DELTA if streams else RequestOutputKind.FINAL_ONLY,
            )
        except (ValueError, VLLMClientError) as error:
            raise Invalid(_reason(error), param=getattr(error, "parameter", None)) from error

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        params = self._sampling_params(request, prompt.max_tokens)
        outputs = self._llm.generate(prompt.engine_input, params, request.request_id)
        # aclosing: leaving early closes vLLM's generator at once, which aborts the request, instead
        # of when it is collected.
        async with contextlib.aclosing(outputs):
            try:
                async for output in outputs:
                    (completion,) = output.outputs
                    reason = completion.finish_reason
                    if reason is not None and reason not in REASONS:
                        # "abort" without our asking, or vLLM's own "error".
                        raise Unavailable(f"The engine gave up on this ({reason}); send it again.")
                    yield Chunk(
                        completion.text,
                        len(completion.token_ids),
                        None if reason is None else REASONS[reason],
                        output.num_cached_tokens or 0,
                    )
            except EngineDeadError as error:
                raise Unavailable(DEAD, retry_after_s=30) from error
            except VLLMClientError as error:
                raise Invalid(_reason(error), param=getattr(error, "parameter", None)) from error

    async def check(self) -> None:
        if self._closed or self._llm.errored:
            raise Unavailable(DEAD, retry_after_s=30)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._llm.shutdown)


def _reason(error: Exception) -> str:
    """The message alone: vLLM's str() appends a value, which may be the prompt."""
    return str(error.args[0]) if error.args else type(error).__name__
