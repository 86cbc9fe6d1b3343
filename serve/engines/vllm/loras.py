"""Adapters in vLLM: each version is a LoRA of its own, with its own name, number and path."""

from __future__ import annotations

from packhorse.serve.engines.vllm.health import has_died
from packhorse.serve.engines.vllm.patches.lasting_metrics import show_adapters
from packhorse.serve.errors import EngineDied, Invalid, Unavailable
from packhorse.serve.messages import AdapterVersion
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError


class Loras:
    """Those of one engine. vLLM would load what it does not have in the middle of a step, and die
    of what it cannot load; so here nothing is asked for that was not loaded before.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._loaded: dict[int, LoRARequest] = {}
        show_adapters(llm, self._loaded)

    async def load(self, adapter: AdapterVersion) -> None:
        """Raises Invalid with vLLM's reason, EngineDied."""
        request = LoRARequest(adapter.engine_name, adapter.int_id, str(adapter.folder))
        try:
            await self._llm.add_lora(request)
        except EngineDeadError as error:
            raise EngineDied("The engine has stopped.", retry_after_s=30) from error
        except Exception as error:  # what the core raised, as text
            if await has_died(self._llm):
                raise EngineDied("The engine has stopped.", retry_after_s=30) from error
            raise Invalid(
                f"The engine does not take the adapter {adapter.name!r}: {error}"
            ) from error
        self._loaded[adapter.int_id] = request

    async def unload(self, adapter: AdapterVersion) -> None:
        """Raises EngineDied."""
        self._loaded.pop(adapter.int_id, None)
        try:
            await self._llm.remove_lora(adapter.int_id)
        except EngineDeadError as error:
            raise EngineDied("The engine has stopped.", retry_after_s=30) from error

    def of(self, adapter: AdapterVersion | None) -> LoRARequest | None:
        """What to give with a request. Raises Unavailable when it is not loaded."""
        if adapter is None:
            return None
        request = self._loaded.get(adapter.int_id)
        if request is None:
            raise Unavailable(
                f"The engine has lost the adapter {adapter.name!r}; the server's log says why."
            )
        return request
