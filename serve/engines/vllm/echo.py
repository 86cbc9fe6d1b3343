"""vLLM without its engine core: renders and parses as VllmEngine does, and answers with the last
message instead of a model's text.

For tests of clients that need an answer that a small model does not give. A prompt that holds a
tool call in the model's own words (`<tool_call>...`) is answered with these words, which vLLM's
tool parser reads; the tool's result that comes back is answered with its text. Never the proof that
a feature of the engine works.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.renderers import renderer_from_config
from vllm.usage.usage_lib import UsageContext

from packhorse.serve.engines.base import Capacity
from packhorse.serve.engines.echo import echoed_text
from packhorse.serve.engines.vllm.arguments import engine_args, refuse_what_would_crash
from packhorse.serve.engines.vllm.chat import Chat, parser_class, template_of
from packhorse.serve.engines.vllm.engine import DEAD, Rendered, VllmEngine
from packhorse.serve.errors import EngineDied, StartupError
from packhorse.serve.messages import AdapterVersion, Chunk, GenerateRequest, Prompt, Route
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.settings.engine import EngineSettings

CAPACITY = Capacity(max_num_seqs=256, kv_cache_tokens=256 * 2048)


class VllmEchoEngine(VllmEngine):
    """Satisfies the Engine protocol. It has no adapters, no log-probabilities and no processes of
    its own; constraints and stop strings are checked and have no effect.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: EngineSettings,
        *,
        metrics: ModelMetrics | None = None,
    ) -> None:
        """`folder` has the tokenizer, the chat template and the configuration. Raises
        StartupError.
        """
        self._metrics = metrics or ModelMetrics(name)
        self._delay_s = settings.echo_delay_s
        self._closed = False
        refuse_what_would_crash(folder, settings)
        args = engine_args(folder, name, settings)
        template_of(settings)
        parser_class(settings)
        try:
            config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
            renderer = renderer_from_config(config)
        except Exception as error:
            # vLLM raises many classes here.
            raise StartupError(f"vLLM could not read {folder}: {error}") from error
        # What VllmEngine's rendering, and Chat, use of vLLM's engine.
        llm: Any = SimpleNamespace(
            renderer=renderer, model_config=config.model_config, vllm_config=config
        )
        self._llm = llm
        self._set_up(settings, {})

    def _set_up(self, settings: EngineSettings, loaded: dict[int, Any]) -> None:
        self._chat = Chat(self._llm, settings)
        self.pooler = None
        self._pools = None
        model = self._llm.model_config
        self.max_model_len = model.max_model_len
        self._vocab_size = model.get_vocab_size()
        self._defaults = model.get_diff_sampling_param()
        self._defaults.pop("max_tokens", None)
        self._by_priority = False
        self.capacity = CAPACITY

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        rendered: Rendered = prompt.engine_input
        reader = rendered.reader
        tokens = self._tokens(echoed_text(request))
        said = tokens[: prompt.max_tokens] or [(self._eos(), "")]
        reason: Any = "stop" if len(said) >= len(tokens) else "length"
        for index in range(request.sampling.n):
            if not request.stream:
                if prompt.when_read is not None:
                    prompt.when_read()
                await asyncio.sleep(self._delay_s * len(said))
                text = "".join(part for _, part in said)
                whole = Chunk(text, [token for token, _ in said], reason, index)
                yield whole if reader is None else reader.whole(whole)
                continue
            for number, (token, text) in enumerate(said, start=1):
                await asyncio.sleep(self._delay_s)
                if self._closed:
                    raise EngineDied(DEAD)
                chunk = Chunk(text, [token], reason if number == len(said) else None, index)
                piece = chunk if reader is None else reader.piece(chunk)
                if piece is not None:
                    yield piece

    def _tokens(self, text: str) -> list[tuple[int, str]]:
        """The text as the tokenizer cuts it: ids, and what each adds to the text. A character of
        several tokens comes with its first.
        """
        tokenizer = self._llm.renderer.get_tokenizer()
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: Sequence[int] = encoded["input_ids"]
        ends = list(itertools.accumulate((end for _, end in encoded["offset_mapping"]), max))
        parts = [text[a:b] for a, b in itertools.pairwise([0, *ends])]
        if parts:  # white space that the tokenizer leaves out at the end
            parts[-1] += text[ends[-1] :]
        return list(zip(ids, parts, strict=True))

    def _eos(self) -> int:
        """An answer has at least one token."""
        return int(self._llm.renderer.get_tokenizer().eos_token_id or 0)

    async def load_adapter(self, adapter: AdapterVersion) -> None:
        raise NotImplementedError("The echo engine of vLLM has no adapters.")

    async def unload_adapter(self, adapter: AdapterVersion) -> None:
        raise NotImplementedError("The echo engine of vLLM has no adapters.")

    async def check(self) -> None:
        if self._closed:
            raise EngineDied(DEAD)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._llm.renderer.shutdown()
